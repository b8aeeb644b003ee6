//! The peer of a session. It sends the parts of the input, each after it has received something, and stores what it
//! receives.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// The octet between two parts of an input.
pub const PART: u8 = 0xFF;

/// How long the peer waits for the end of the session. A session that takes longer hangs.
const END_TIMEOUT: Duration = Duration::from_secs(20);

/// How long the peer waits before it sends a part: the program may be waiting for the rest of a line, and send nothing.
pub const PAUSE: Duration = Duration::from_millis(5);

/// A socket: Unix or TCP.
pub trait Socket: Read + Write {
    fn wait(&self, time: Option<Duration>);
    fn end(&self);
}

impl Socket for UnixStream {
    fn wait(&self, time: Option<Duration>) {
        self.set_read_timeout(time).expect("a timeout");
    }

    fn end(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

impl Socket for std::net::TcpStream {
    fn wait(&self, time: Option<Duration>) {
        self.set_read_timeout(time).expect("a timeout");
    }

    fn end(&self) {
        let _ = self.shutdown(Shutdown::Write);
    }
}

/// Sends the parts. Before each part it waits until octets have arrived; before the first part, only if `waits`. After the
/// last part it closes its side, and reads up to the end. Returns all octets that have arrived.
///
/// # Panics
/// The other side neither sends nor closes.
pub fn play(socket: &mut impl Socket, parts: &[&[u8]], waits: bool) -> Vec<u8> {
    let mut received = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        if (number > 0 || waits) && !receive(socket, &mut received, Some(PAUSE)) {
            return received;
        }
        // The other side may have closed the connection. Read what it has sent before.
        if socket.write_all(part).is_err() {
            break;
        }
    }
    socket.end();
    while receive(socket, &mut received, None) {}
    received
}

/// Waits until octets have arrived, or the pause is over. Returns `false` at the end of the connection.
///
/// # Panics
/// Nothing arrives within 20 seconds, and there is no pause.
pub fn receive(socket: &mut impl Socket, received: &mut Vec<u8>, pause: Option<Duration>) -> bool {
    let mut space = [0; 16 * 1024];
    socket.wait(Some(pause.unwrap_or(END_TIMEOUT)));
    match socket.read(&mut space) {
        Ok(0) => false,
        Ok(count) => {
            received.extend_from_slice(&space[..count]);
            true
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => true,
        Err(error) if pause.is_some() && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => true,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("nothing is sent, and the connection is not closed, after {}", received.escape_ascii())
        }
        Err(_) => false,
    }
}
