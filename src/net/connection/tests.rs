//! Tests of connections: lines, waiting, TLS.

use super::*;
use crate::net::tls::{self, Trust};
use std::io::Read;
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::Duration;

const NAME: &str = "relay.example.net";

fn trace() -> Trace {
    let id = "1".to_string();
    Trace { id, us: 'P', them: 'C' }
}

fn connection(socket: impl Into<OwnedFd>) -> Connection {
    Connection::new(socket.into(), trace()).unwrap()
}

fn soon() -> Instant {
    Instant::now() + Duration::from_secs(20)
}

fn in_millis(count: u64) -> Instant {
    Instant::now() + Duration::from_millis(count)
}

fn unix() -> (UnixStream, UnixStream) {
    UnixStream::pair().unwrap()
}

fn tcp() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (one, listener.accept().unwrap().0)
}

fn sides() -> (ServerTls, ClientTls) {
    let (certificate, key) = tls::self_signed(&[NAME]).unwrap();
    (ServerTls::from_pem(&certificate, &key), ClientTls::new(&Trust::pin(&certificate)).unwrap())
}

/// Two connections after the TLS handshake: server, client.
fn secured(server: impl Into<OwnedFd>, client: impl Into<OwnedFd>) -> (Connection, Connection) {
    let (accepting, connecting) = sides();
    let (mut server, mut client) = (connection(server), connection(client));
    thread::scope(|scope| {
        scope.spawn(|| server.start_tls_server(&accepting, soon()).unwrap());
        client.start_tls_client(&connecting, NAME, soon(), None).unwrap();
    });
    (server, client)
}

/// Pairs of connections: in clear, and under TLS, over TCP and over Unix sockets.
fn each_kind() -> Vec<(Connection, Connection)> {
    let ((a, b), (c, d), (e, f)) = (unix(), tcp(), unix());
    vec![(connection(a), connection(b)), secured(c, d), secured(e, f)]
}

fn next_line(connection: &mut Connection) -> Line {
    let cancel = CancelToken::new().unwrap();
    loop {
        match connection.take_line(1000) {
            Line::None => {}
            line => return line,
        }
        assert_eq!(connection.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
        assert_ne!(connection.fill().unwrap(), Filled::End);
    }
}

/// Reads until `count` octets have arrived, as a polling thread does.
fn gather(connection: &mut Connection, count: usize) -> Vec<u8> {
    let (mut received, cancel) = (Vec::new(), CancelToken::new().unwrap());
    while received.len() < count {
        assert_eq!(connection.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
        connection.fill().unwrap();
        received.extend_from_slice(connection.received());
        connection.consume(usize::MAX);
    }
    received
}

fn text(count: usize) -> Vec<u8> {
    (0..count).map(|index| (index % 251) as u8).collect()
}

fn whole(line: &[u8]) -> Line {
    Line::Whole(line.to_vec())
}

/// Feeds `input` in two parts, cut at every place; the lines must be the same.
fn check_lines(input: &[u8], limit: usize, ends: LineEnd, expected: &[Line]) {
    for cut in 0..=input.len() {
        let (peer, ours) = unix();
        let (mut peer, mut ours) = (connection(peer), connection(ours));
        let mut lines = Vec::new();
        for part in [&input[..cut], &input[cut..]] {
            peer.send(part);
            assert!(peer.flush().unwrap());
            ours.fill().unwrap();
            loop {
                match ours.take(limit, ends) {
                    Line::None => break,
                    line => lines.push(line),
                }
            }
        }
        assert_eq!(lines, expected, "cut at {cut}");
    }
}

#[test]
fn only_crlf_ends_a_line() {
    let lines = [whole(b"NOOP"), whole(b""), whole(b"a\nb\rc"), whole(b"d\r")];
    check_lines(b"NOOP\r\n\r\na\nb\rc\r\nd\r\r\nrest", 20, LineEnd::CrLf, &lines);
}

#[test]
fn a_bare_lf_ends_a_reply() {
    let lines = [whole(b"250-a"), whole(b"250 b"), whole(b"")];
    check_lines(b"250-a\n250 b\r\n\nrest", 20, LineEnd::Lf, &lines);
}

#[test]
fn a_line_that_is_too_long_is_reported_once_and_discarded() {
    let lines = [whole(b"12345678"), Line::TooLong, whole(b"NOOP"), Line::TooLong, whole(b"x")];
    check_lines(
        b"12345678\r\n123456789\r\nNOOP\r\n12345678901234\n5678901\r234567890\r\nx\r\n",
        10,
        LineEnd::CrLf,
        &lines,
    );
}

#[test]
fn a_line_without_end_is_counted_and_discarded() {
    let (peer, ours) = unix();
    let (mut peer, mut ours) = (connection(peer), connection(ours));
    for round in 0..40 {
        peer.send(&[b'x'; 50_000]);
        peer.flush().unwrap();
        while let Filled::Bytes(_) = ours.fill().unwrap() {}
        let expected = if round == 0 { Line::TooLong } else { Line::None };
        assert_eq!(ours.take_line(1000), expected);
        assert!(ours.received().is_empty());
    }
    assert_eq!(ours.discarded(), 2_000_000);
    peer.send(b"\r\nQUIT\r\n");
    peer.flush().unwrap();
    ours.fill().unwrap();
    assert_eq!(ours.take_line(1000), whole(b"QUIT"));
    assert_eq!(ours.discarded(), 0);
}

#[test]
fn lines_pass_in_both_directions_in_clear_and_under_tls() {
    for (mut one, mut other) in each_kind() {
        for _ in 0..3 {
            one.send(b"250-a\r\n250 b\r\n");
            assert!(one.flush().unwrap());
            assert_eq!(next_line(&mut other), whole(b"250-a"));
            assert_eq!(next_line(&mut other), whole(b"250 b"));
            other.send(b"RSET\r\n");
            assert!(other.flush().unwrap());
            assert_eq!(next_line(&mut one), whole(b"RSET"));
            assert_eq!(one.fill().unwrap(), Filled::Nothing);
        }
    }
}

/// Rules: PIPE-07.
#[test]
fn a_wait_flushes_first() {
    for (mut one, mut other) in each_kind() {
        thread::scope(|scope| {
            scope.spawn(|| {
                one.send(b"250 go on\r\n");
                assert_eq!(next_line(&mut one), whole(b"NOOP"));
            });
            assert_eq!(next_line(&mut other), whole(b"250 go on"));
            other.send(b"NOOP\r\n");
            other.flush_all(soon(), None).unwrap();
        });
    }
}

/// Rules: PIPE-05.
#[test]
fn flush_does_not_wait_for_a_peer_that_does_not_read() {
    let sent = text(8_000_000);
    for (mut one, mut other) in each_kind() {
        one.send(&sent);
        let mut rounds = 0;
        let mut before = usize::MAX;
        while one.unsent() < before {
            before = one.unsent();
            assert!(!one.flush().unwrap());
            rounds += 1;
        }
        assert!(rounds < 100 && one.unsent() > 1_000_000);
        assert!(one.interest().contains(PollFlags::OUT));
        let late = one.flush_all(in_millis(50), None).unwrap_err();
        assert_eq!(late.kind(), io::ErrorKind::TimedOut);
        let received = thread::scope(|scope| {
            scope.spawn(|| one.flush_all(soon(), None).unwrap());
            gather(&mut other, sent.len())
        });
        assert!(received == sent);
        assert_eq!(one.unsent(), 0);
        assert_eq!(one.interest(), PollFlags::IN);
    }
}

#[test]
fn two_peers_that_both_send_do_not_wait_for_each_other() {
    // More octets than the buffers of the sockets hold, and fewer than `READ_BUFFER_LIMIT`.
    for (mut one, mut other) in each_kind() {
        let sent = text(READ_BUFFER_LIMIT);
        let exchange = |connection: &mut Connection| {
            connection.send(&sent);
            connection.flush_all(soon(), None).unwrap();
            assert!(gather(connection, sent.len()) == sent);
        };
        thread::scope(|scope| {
            scope.spawn(|| exchange(&mut one));
            exchange(&mut other);
        });
    }
}

#[test]
fn fill_reads_nothing_while_the_read_buffer_is_full() {
    for (mut one, mut other) in each_kind() {
        one.send(&text(4_000_000));
        for _ in 0..100 {
            one.flush().unwrap();
            other.fill().unwrap();
        }
        let waiting = other.received().len();
        assert!((READ_BUFFER_LIMIT..READ_BUFFER_LIMIT + READ_SIZE).contains(&waiting), "{waiting}");
        assert_eq!(other.fill().unwrap(), Filled::Nothing);
        assert!(!other.interest().contains(PollFlags::IN));
        other.consume(waiting);
        assert!(other.interest().contains(PollFlags::IN));
        assert!(matches!(other.fill().unwrap(), Filled::Bytes(_)));
    }
}

#[test]
fn an_idle_connection_uses_little_memory() {
    for (mut one, mut other) in each_kind() {
        let sent = text(300_000);
        one.send(&sent);
        thread::scope(|scope| {
            scope.spawn(|| one.flush_all(soon(), None).unwrap());
            gather(&mut other, sent.len());
        });
        let capacity = other.read.octets.capacity() + one.out.octets.capacity();
        assert!(capacity <= 2 * IDLE_CAPACITY, "{capacity}");
    }
}

#[test]
fn a_peer_that_sends_slowly_does_not_extend_the_deadline() {
    let (peer, ours) = unix();
    let cancel = CancelToken::new().unwrap();
    let sender = thread::spawn(move || {
        for _ in 0..500 {
            if (&peer).write_all(b"x").is_err() {
                return;
            }
            thread::sleep(Duration::from_millis(10));
        }
    });
    let mut ours = connection(ours);
    let (start, deadline) = (Instant::now(), in_millis(100));
    while ours.wait_input(deadline, &cancel).unwrap() == WaitResult::Ready {
        assert_ne!(ours.fill().unwrap(), Filled::End);
        assert_eq!(ours.take_line(1000), Line::None);
    }
    assert!(start.elapsed() >= Duration::from_millis(100));
    drop(ours);
    sender.join().unwrap();
}

#[test]
fn cancel_ends_every_wait() {
    let cancel = CancelToken::new().unwrap();
    let pairs = [unix(), unix()];
    thread::scope(|scope| {
        for (_, ours) in &pairs {
            let cancel = cancel.clone();
            scope.spawn(move || {
                let mut ours = connection(ours.try_clone().unwrap());
                assert_eq!(ours.wait_input(soon(), &cancel).unwrap(), WaitResult::Cancelled);
            });
        }
        thread::sleep(Duration::from_millis(20));
        assert!(!cancel.is_cancelled());
        cancel.cancel();
        cancel.cancel();
    });
    let mut found = [PollFd::from_borrowed_fd(cancel.fd(), PollFlags::IN)];
    assert_eq!(rustix::event::poll(&mut found, None).unwrap(), 1);
    assert!(found[0].revents().contains(PollFlags::IN));
}

#[test]
fn the_peer_sees_an_end_after_shutdown() {
    for (mut one, mut other) in each_kind() {
        one.send(b"221 bye\r\n");
        one.shutdown();
        assert_eq!(next_line(&mut other), whole(b"221 bye"));
        let cancel = CancelToken::new().unwrap();
        assert_eq!(other.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
        for _ in 0..2 {
            assert_eq!(other.fill().unwrap(), Filled::End);
        }
        assert!(other.ended());
        assert_eq!(other.interest(), PollFlags::empty());
    }
}

/// Rules: TLS-20.
#[test]
fn the_end_of_a_tls_connection_without_close_notify_is_an_error() {
    let (a, b) = unix();
    let (mut one, mut other) = secured(a, b);
    one.send(b"250 ok\r\n");
    one.flush().unwrap();
    rustix::net::shutdown(one.output_fd(), rustix::net::Shutdown::Write).unwrap();
    assert_eq!(next_line(&mut other), whole(b"250 ok"));
    for _ in 0..2 {
        let error = other.fill().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}

/// A session that has failed may have queued the end of a message that counts as deferred.
#[test]
fn a_dropped_connection_sends_close_notify_and_no_queued_octets() {
    for queued in ["", ".\r\n"] {
        let (a, b) = tcp();
        let (mut one, mut other) = secured(a, b);
        one.send(queued.as_bytes());
        drop(one);
        let cancel = CancelToken::new().unwrap();
        let found = loop {
            assert_eq!(other.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
            match other.fill() {
                Ok(Filled::Nothing) => {}
                found => break found.map_err(|error| error.kind()),
            }
        };
        let end = if queued.is_empty() { Ok(Filled::End) } else { Err(io::ErrorKind::UnexpectedEof) };
        assert_eq!(found, end);
    }
}

#[test]
fn shutdown_sends_no_close_notify_if_octets_are_unsent() {
    let (a, b) = unix();
    let (mut one, mut other) = secured(a, b);
    one.send(&text(4_000_000));
    one.shutdown();
    let error = loop {
        match other.fill() {
            Ok(Filled::Bytes(count)) => other.consume(count),
            Ok(found) => assert_eq!(found, Filled::Nothing),
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
}

#[test]
fn the_peer_gets_the_last_reply_even_if_its_octets_were_not_read() {
    let (a, b) = tcp();
    let (mut one, mut other) = (connection(a), connection(b));
    other.send(&text(100_000));
    other.flush().unwrap();
    thread::sleep(Duration::from_millis(20));
    one.send(b"421 closing\r\n");
    one.shutdown();
    assert_eq!(next_line(&mut other), whole(b"421 closing"));
}

#[test]
fn a_421_is_read_before_a_write_error_is_returned() {
    let (peer, ours) = unix();
    (&peer).write_all(b"421 closing\r\n").unwrap();
    drop(peer);
    let mut ours = connection(ours);
    ours.send(b"NOOP\r\n");
    assert_eq!(next_line(&mut ours), whole(b"421 closing"));
    assert!(ours.flush().is_err());
    assert_eq!(ours.interest(), PollFlags::IN);
}

#[test]
fn two_pipes_are_a_connection() {
    let (theirs, output) = rustix::pipe::pipe().unwrap();
    let (input, peer) = rustix::pipe::pipe().unwrap();
    let mut ours = Connection::over(input, Some(output), trace());
    rustix::io::write(&peer, b"NOOP\r\n").unwrap();
    ours.send(b"250 ok\r\n");
    assert_eq!(next_line(&mut ours), whole(b"NOOP"));
    let mut received = [0; 8];
    rustix::io::read(&theirs, &mut received).unwrap();
    assert_eq!(&received, b"250 ok\r\n");
    drop(peer);
    assert_eq!(ours.fill().unwrap(), Filled::End);
    ours.send(&[b'x'; 1_000_000]);
    assert!(!ours.flush().unwrap());
    drop(theirs);
    assert_eq!(ours.flush().unwrap_err().kind(), io::ErrorKind::BrokenPipe);
}

/// Rules: TLS-04, TLS-05.
#[test]
fn octets_after_starttls_are_rejected_on_both_sides() {
    let (accepting, connecting) = sides();
    for input in [&b"STARTTLS\r\nEHLO evil\r\n"[..], b"STARTTLS\r\n\r\n"] {
        let (peer, ours) = unix();
        let mut ours = connection(ours);
        (&peer).write_all(input).unwrap();
        ours.fill().unwrap();
        assert_eq!(ours.take_line(1000), whole(b"STARTTLS"));
        let error = ours.start_tls_server(&accepting, soon()).unwrap_err();
        assert!(error.to_string().contains("after STARTTLS"), "{error}");
        let error = ours.start_tls_client(&connecting, NAME, soon(), None).unwrap_err();
        assert!(error.to_string().contains("after STARTTLS"), "{error}");
        assert!(ours.tls_info().is_none());
    }
}

#[test]
fn octets_in_clear_that_arrive_during_the_handshake_are_an_error() {
    let (accepting, _) = sides();
    let (peer, ours) = unix();
    let mut ours = connection(ours);
    ours.send(b"220 go\r\n");
    (&peer).write_all(b"EHLO evil\r\n").unwrap();
    let error = ours.start_tls_server(&accepting, soon()).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    let mut received = [0; 8];
    (&peer).read_exact(&mut received).unwrap();
    assert_eq!(&received, b"220 go\r\n");
}

#[test]
fn octets_that_arrive_with_the_end_of_the_handshake_are_not_lost() {
    let (accepting, connecting) = sides();
    let (a, b) = unix();
    let (mut server, mut client) = (connection(a), connection(b));
    thread::scope(|scope| {
        scope.spawn(|| {
            client.start_tls_client(&connecting, NAME, soon(), None).unwrap();
            client.send(b"EHLO example.org\r\n");
            client.flush().unwrap();
        });
        server.start_tls_server(&accepting, soon()).unwrap();
        assert_eq!(next_line(&mut server), whole(b"EHLO example.org"));
    });
    assert!(server.start_tls_server(&accepting, soon()).is_err());
}

#[test]
fn a_failed_handshake_reports_the_cause() {
    let (accepting, connecting) = sides();
    let (_peer, ours) = unix();
    let error = connection(ours).start_tls_server(&accepting, in_millis(50)).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    let (peer, ours) = unix();
    drop(peer);
    let error = connection(ours).start_tls_client(&connecting, NAME, soon(), None).unwrap_err();
    assert!(error.to_string().starts_with("TLS with relay.example.net: "), "{error}");
    let (peer, ours) = tcp();
    (&peer).write_all(b"220 plain\r\n").unwrap();
    let error = connection(ours).start_tls_client(&connecting, NAME, soon(), None).unwrap_err();
    assert!(error.to_string().contains("not TLS"), "{error}");
}

#[test]
fn a_rejected_certificate_is_reported_on_both_sides() {
    let (accepting, _) = sides();
    let (_, other) = sides();
    let (a, b) = tcp();
    let (mut server, mut client) = (connection(a), connection(b));
    thread::scope(|scope| {
        scope.spawn(|| {
            let error = client.start_tls_client(&other, NAME, soon(), None).unwrap_err();
            assert!(error.to_string().contains("`pin`"), "{error}");
            client.shutdown();
        });
        let error = server.start_tls_server(&accepting, soon()).unwrap_err();
        assert!(error.to_string().contains("rejected this side's certificate"), "{error}");
    });
}

#[test]
fn tls_1_2_works_over_a_connection() {
    let (certificate, key) = tls::self_signed(&[NAME]).unwrap();
    let accepting = ServerTls::from_pem(&certificate, &key);
    let connecting = ClientTls::tls12(&Trust::pin(&certificate));
    let (a, b) = tcp();
    let (mut server, mut client) = (connection(a), connection(b));
    thread::scope(|scope| {
        scope.spawn(|| server.start_tls_server(&accepting, soon()).unwrap());
        client.start_tls_client(&connecting, NAME, soon(), None).unwrap();
    });
    assert_eq!(server.tls_info().unwrap().version, "TLSv1.2");
    assert_eq!(server.tls_info(), client.tls_info());
    server.send(b"220 hello\r\n");
    server.shutdown();
    assert_eq!(next_line(&mut client), whole(b"220 hello"));
    assert_eq!(client.fill().unwrap(), Filled::End);
}

/// Copies octets one at a time.
fn copy_slowly(mut from: UnixStream, mut to: UnixStream) {
    let mut octet = [0];
    while let Ok(1) = from.read(&mut octet) {
        if to.write_all(&octet).is_err() {
            return;
        }
    }
    let _ = to.shutdown(std::net::Shutdown::Write);
}

#[test]
fn tls_works_octet_by_octet() {
    let ((a, b), (c, d)) = (unix(), unix());
    let (b2, c2) = (b.try_clone().unwrap(), c.try_clone().unwrap());
    thread::scope(|scope| {
        scope.spawn(|| copy_slowly(b, c));
        scope.spawn(|| copy_slowly(c2, b2));
        let (mut server, mut client) = secured(a, d);
        server.send(b"220 hello\r\n");
        server.flush().unwrap();
        assert_eq!(next_line(&mut client), whole(b"220 hello"));
        client.send(b"QUIT\r\n");
        client.shutdown();
        assert_eq!(next_line(&mut server), whole(b"QUIT"));
        let cancel = CancelToken::new().unwrap();
        while server.fill().unwrap() != Filled::End {
            assert_eq!(server.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
        }
    });
}

/// Sends garbage again and again, until the other side closes. Returns the octets that it has received.
fn babble(mut peer: TcpStream) -> io::Result<Vec<u8>> {
    let mut received = vec![0; 10_000];
    for _ in 0..40 {
        peer.write_all(&[b'x'; 10_000])?;
        thread::sleep(Duration::from_millis(5));
    }
    peer.shutdown(std::net::Shutdown::Write)?;
    peer.read_to_end(&mut received).map(|_| received.split_off(10_000))
}

/// A fatal alert at the end of what a peer has received (RFC 8446 section 6).
fn ends_with_alert(octets: &[u8]) -> bool {
    matches!(octets, [.., 0x15, 0x03, _, 0, 2, 2, _])
}

#[test]
fn the_alert_about_a_failed_handshake_arrives_although_the_peer_still_sends() {
    let (accepting, connecting) = sides();
    for accepts in [true, false] {
        let (peer, ours) = tcp();
        let peer = thread::spawn(move || babble(peer));
        let mut ours = connection(ours);
        let error = match accepts {
            true => ours.start_tls_server(&accepting, soon()),
            false => ours.start_tls_client(&connecting, NAME, soon(), None),
        };
        assert!(error.unwrap_err().to_string().contains("not TLS"));
        drop(ours);
        let received = peer.join().unwrap().unwrap();
        assert!(ends_with_alert(&received), "{received:x?}");
    }
}

#[test]
fn the_alert_about_a_broken_record_arrives_although_the_peer_still_sends() {
    for (accepts, close) in [
        (true, Connection::close as fn(Connection)),
        (false, Connection::close),
        (true, Connection::close_without_waiting),
    ] {
        let (a, b) = tcp();
        let raw = if accepts { b.try_clone() } else { a.try_clone() }.unwrap();
        let (server, client) = secured(a, b);
        let (mut ours, mut theirs) = if accepts { (server, client) } else { (client, server) };
        let peer = thread::spawn(move || {
            let mut raw = raw;
            rustix::io::ioctl_fionbio(&raw, false).unwrap();
            for _ in 0..40 {
                raw.write_all(b"\x17\x03\x03\x00\x20 a record that is not sealed......").unwrap();
                thread::sleep(Duration::from_millis(5));
            }
            raw.shutdown(std::net::Shutdown::Write).unwrap();
            rustix::io::ioctl_fionbio(&raw, true).unwrap();
            let cancel = CancelToken::new().unwrap();
            assert_eq!(theirs.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
            theirs.fill().unwrap_err().to_string()
        });
        assert_eq!(ours.wait_input(soon(), &CancelToken::new().unwrap()).unwrap(), WaitResult::Ready);
        assert_eq!(ours.fill().unwrap_err().kind(), io::ErrorKind::InvalidData);
        close(ours);
        let error = peer.join().unwrap();
        assert!(error.contains("alert (BadRecordMac)"), "{error}");
    }
}

#[test]
fn the_wait_for_a_peer_that_does_not_close_after_an_alert_is_short() {
    let (accepting, _) = sides();
    let (peer, ours) = tcp();
    (&peer).write_all(b"EHLO example.org\r\n").unwrap();
    let begun = Instant::now();
    assert!(connection(ours).start_tls_server(&accepting, in_millis(100)).is_err());
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    let (peer, ours) = tcp();
    (&peer).write_all(b"EHLO example.org\r\n").unwrap();
    let begun = Instant::now();
    assert!(connection(ours).start_tls_server(&accepting, soon()).is_err());
    assert!(begun.elapsed() < ALERT_TIMEOUT * 3, "{:?}", begun.elapsed());
}

/// Exim sends QUIT in clear, in one piece with its last record.
#[test]
fn octets_decrypted_before_clear_text_are_reported_first() {
    let (theirs, ours) = unix();
    let mut clear = theirs.try_clone().unwrap();
    let (mut server, mut client) = secured(theirs, ours);
    server.send(b"250 ok\r\n");
    assert!(server.flush().unwrap());
    clear.write_all(b"QUIT\r\n").unwrap();
    let cancel = CancelToken::new().unwrap();
    assert_eq!(client.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
    assert_eq!(next_line(&mut client), whole(b"250 ok"));
    for _ in 0..2 {
        assert_eq!(client.wait_input(soon(), &cancel).unwrap(), WaitResult::Ready);
        let error = client.fill().unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (io::ErrorKind::InvalidData, "the peer spoke outside TLS")
        );
    }
    assert!(client.ended() && client.received().is_empty());
}
