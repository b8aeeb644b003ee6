//! Replies of a name server. The input has the replies to one query after the other, each with its length in two octets
//! before it. If the first octet of the input is even, the name server of this target inserts the id and the question of the
//! query into each reply.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use odmr::ids::Ids;
use odmr::mail::address::Domain;
use odmr::net::cancel::CancelToken;
use odmr::net::resolver::{Answer, MxRoute, Record, Resolver, Rtype};

use super::check;

/// The most replies of one input.
const MOST_REPLIES: usize = 12;

/// Octets of the header.
const HEADER: usize = 12;

/// A reply with RCODE 5, which the server sends after each reply: it always matches the query, so the resolver does not wait.
const RCODE_5: [u8; 13] = [1, 0, 0, 0x81, 0x85, 0, 1, 0, 0, 0, 0, 0, 0];

/// A name server in two threads.
struct NameServer {
    address: SocketAddr,
    /// Shared by all runs, so that an id does not come again soon: a late reply must not match a later query.
    ids: Ids,
    /// Sends the replies to the next queries.
    replies: Vec<Sender<Vec<Vec<u8>>>>,
}

pub fn run(input: &[u8]) {
    static SERVER: OnceLock<NameServer> = OnceLock::new();
    let server = SERVER.get_or_init(start);
    let Some((how, rest)) = input.split_first() else { return };
    let replies = split(rest, how & 1 == 0);
    for sender in &server.replies {
        sender.send(replies.clone()).expect("the server runs");
    }
    let cancel = CancelToken::new().expect("a token");
    let resolver = Resolver::at(server.address, &server.ids);
    let resolver = resolver.within(Instant::now() + Duration::from_secs(5), &cancel);
    let domain = Domain::parse("example.org").expect("a domain");
    match how >> 1 & 7 {
        0 => match resolver.route(&domain) {
            Ok(MxRoute::Hosts(hosts)) => {
                assert!(hosts.len() <= 100 && hosts.is_sorted_by_key(|host| host.preference));
                for (number, host) in hosts.iter().enumerate() {
                    assert!(host.host.as_str().bytes().all(|octet| octet.is_ascii_graphic()), "{}", host.host);
                    assert!(!hosts[..number].iter().any(|other| other.host == host.host));
                }
            }
            Ok(_) => {}
            Err(error) => check::shown(&error.to_string()),
        },
        1 => match resolver.addresses(&domain) {
            Ok(addresses) => assert!(addresses.len() <= 100),
            Err(error) => check::shown(&error.to_string()),
        },
        kind => {
            let kinds = [Rtype::TXT, Rtype::TLSA, Rtype::PTR, Rtype::CNAME, Rtype::MX, Rtype::AAAA];
            let kind = kinds[usize::from(kind) - 2];
            match resolver.records(&domain, kind) {
                Ok(Answer::Records(records)) => {
                    assert!(!records.is_empty());
                    assert!(records.iter().all(|record| is_of(record, kind)));
                }
                Ok(_) => {}
                Err(error) => check::shown(&error.to_string()),
            }
        }
    }
}

/// Whether a record has the type that was asked for.
fn is_of(record: &Record, kind: Rtype) -> bool {
    match record {
        Record::Exchange(..) => kind == Rtype::MX,
        Record::Address(address) => kind == if address.is_ipv4() { Rtype::A } else { Rtype::AAAA },
        Record::Target(_) => [Rtype::PTR, Rtype::CNAME].contains(&kind),
        Record::Text(_) => kind == Rtype::TXT,
        Record::Tlsa(..) => kind == Rtype::TLSA,
    }
}

/// The replies of the input.
fn split(mut rest: &[u8], repeats: bool) -> Vec<Vec<u8>> {
    let mut replies = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<2>() {
        let length = usize::from(u16::from_be_bytes(*length)).min(after.len());
        let (reply, after) = after.split_at(length);
        replies.push([&[u8::from(repeats)], reply].concat());
        rest = after;
        if replies.len() == MOST_REPLIES {
            break;
        }
    }
    replies
}

fn start() -> NameServer {
    let (socket, listener) = loop {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        if let Ok(socket) = UdpSocket::bind(listener.local_addr().expect("an address")) {
            break (socket, listener);
        }
    };
    let address = listener.local_addr().expect("an address");
    let (udp, udp_replies) = channel();
    let (tcp, tcp_replies) = channel();
    thread::spawn(move || serve_udp(&socket, &udp_replies));
    thread::spawn(move || serve_tcp(&listener, &tcp_replies));
    NameServer { address, ids: Ids::fixed(), replies: vec![udp, tcp] }
}

/// The next reply of the latest input, or one with RCODE 5 if none is left.
fn next_reply(waiting: &Receiver<Vec<Vec<u8>>>, replies: &mut Vec<Vec<u8>>, query: &[u8]) -> Vec<u8> {
    while let Ok(fresh) = waiting.try_recv() {
        *replies = fresh;
        replies.reverse();
    }
    match replies.pop() {
        Some(reply) => made(&reply, query),
        None => made(&RCODE_5, query),
    }
}

/// The reply without its first octet, which says whether the id and the question of the query are inserted.
fn made(reply: &[u8], query: &[u8]) -> Vec<u8> {
    let (unchanged, reply) = (reply.first() != Some(&1), reply.get(1..).unwrap_or_default());
    if unchanged || reply.len() < HEADER || query.len() <= HEADER {
        return reply.to_vec();
    }
    // The name of the question has no pointers; its labels may have any octets.
    let mut end = HEADER;
    while query.get(end).is_some_and(|length| *length > 0) {
        end += usize::from(query[end]) + 1;
    }
    let end = (end + 5).min(query.len());
    let question = &query[HEADER..end];
    let (flags, counts) =
        ([reply[2] | 0x80, reply[3]], [0, 1, reply[6], reply[7], reply[8], reply[9], reply[10], reply[11]]);
    [&query[..2], &flags, &counts, question, &reply[HEADER..]].concat()
}

fn serve_udp(socket: &UdpSocket, waiting: &Receiver<Vec<Vec<u8>>>) {
    let (mut query, mut replies) = ([0; 2048], Vec::new());
    while let Ok((length, peer)) = socket.recv_from(&mut query) {
        let query = &query[..length];
        for reply in [next_reply(waiting, &mut replies, query), made(&RCODE_5, query)] {
            let _ = socket.send_to(&reply, peer);
        }
    }
}

fn serve_tcp(listener: &TcpListener, waiting: &Receiver<Vec<Vec<u8>>>) {
    let mut replies = Vec::new();
    for stream in listener.incoming() {
        let Ok(mut stream) = stream else { continue };
        let mut length = [0; 2];
        if stream.read_exact(&mut length).is_err() {
            continue;
        }
        let mut query = vec![0; u16::from_be_bytes(length).into()];
        if stream.read_exact(&mut query).is_err() {
            continue;
        }
        for reply in [next_reply(waiting, &mut replies, &query), made(&RCODE_5, &query)] {
            let length = u16::try_from(reply.len()).unwrap_or(u16::MAX);
            let _ = stream.write_all(&[&length.to_be_bytes(), &reply[..length.into()]].concat());
        }
    }
}
