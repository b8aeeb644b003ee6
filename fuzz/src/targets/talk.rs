//! The other side of a conversation: it sends what the input says, a part after each time it was spoken to, and keeps what it
//! was sent.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

/// Between the parts of a talk.
pub const PART: u8 = 0xFF;

/// How long it waits for the end: for ever, as far as a person can tell.
const PATIENCE: Duration = Duration::from_secs(20);

/// How long it waits before a part: the program may wait for the rest of something, too.
pub const PAUSE: Duration = Duration::from_millis(5);

/// A socket of either kind.
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

/// Sends the parts, each after something has come, but the first, for which it waits only if `listens`. After the last one it
/// closes its side, and reads up to the end. Returns all that has come.
///
/// # Panics
/// If the other side neither sends nor closes.
pub fn talk(socket: &mut impl Socket, parts: &[&[u8]], listens: bool) -> Vec<u8> {
    let mut heard = Vec::new();
    for (number, part) in parts.iter().enumerate() {
        if (number > 0 || listens) && !hear(socket, &mut heard, Some(PAUSE)) {
            return heard;
        }
        // The other side may have gone: what it has sent before still counts.
        if socket.write_all(part).is_err() {
            break;
        }
    }
    socket.end();
    while hear(socket, &mut heard, None) {}
    heard
}

/// Waits until something has come, or the pause is over. Returns `false` at the end.
///
/// # Panics
/// If nothing comes, and there is no pause.
pub fn hear(socket: &mut impl Socket, heard: &mut Vec<u8>, pause: Option<Duration>) -> bool {
    let mut space = [0; 16 * 1024];
    socket.wait(Some(pause.unwrap_or(PATIENCE)));
    match socket.read(&mut space) {
        Ok(0) => false,
        Ok(count) => {
            heard.extend_from_slice(&space[..count]);
            true
        }
        Err(error) if error.kind() == ErrorKind::Interrupted => true,
        Err(error) if pause.is_some() && matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => true,
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
            panic!("nothing is sent, and the connection is not closed, after {}", heard.escape_ascii())
        }
        Err(_) => false,
    }
}
