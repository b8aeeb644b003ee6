//! The system log: each line is one datagram to the socket of syslogd, in the form of RFC 3164 and of syslog(3).

use std::io;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use log::Level;
use rustix::io::Errno;

use super::log_queue::{LogLine, LogSink};
use crate::clock::Zone;

/// The sockets of syslogd: on Linux and most BSDs; FreeBSD and NetBSD; macOS.
const USUAL_PATHS: [&str; 3] = ["/dev/log", "/var/run/log", "/var/run/syslog"];

/// The facility `mail` of RFC 3164 section 4.1.1.
const MAIL_FACILITY: u8 = 2;

/// After this time without a read by syslogd, the socket is connected anew: another syslogd may have the path.
const SEND_TIMEOUT: Duration = Duration::from_secs(1);

/// The pause before the next attempt if syslogd does not run or, on a BSD, its buffer is full.
const RETRY_PAUSE: Duration = Duration::from_millis(100);

/// A line that the system rejects as too long is cut, but not to fewer octets than every syslogd must accept.
const SHORTEST_CUT: usize = 480;

/// The severity of a level (RFC 3164 section 4.1.1).
pub(super) fn severity(level: Level) -> u8 {
    match level {
        Level::Error => 3,
        Level::Warn => 4,
        Level::Info => 6,
        Level::Debug | Level::Trace => 7,
    }
}

/// A connection to syslogd, made anew whenever it is lost. If no syslogd runs, lines wait for it.
pub(super) struct Syslog {
    path: Option<PathBuf>,
    zone: Zone,
    socket: Option<UnixDatagram>,
    /// Gets the lines until syslogd is reached for the first time.
    fallback: Option<Box<dyn LogSink>>,
}

impl Syslog {
    /// `path`: the socket of syslogd; `None`: that of this system. `fallback`: gets the lines until syslogd is reached;
    /// `None`: they wait.
    pub fn new(path: Option<&Path>, fallback: Option<Box<dyn LogSink>>) -> Syslog {
        Syslog { path: path.map(Path::to_owned), zone: Zone::system(), socket: None, fallback }
    }

    /// `<22>Jan  2 03:04:05 odmr[4711]: event=…`
    fn datagram(&self, line: &LogLine) -> String {
        let priority = MAIL_FACILITY * 8 + severity(line.level);
        let time = self.zone.rfc3164(line.timestamp());
        format!("<{priority}>{time} odmr[{}]: {}", std::process::id(), line.text)
    }
}

impl LogSink for Syslog {
    fn write(&mut self, line: &LogLine) -> io::Result<()> {
        let mut datagram = self.datagram(line);
        loop {
            let socket = match self.socket.take().map_or_else(|| connect(self.path.as_deref()), Ok) {
                Ok(socket) => socket,
                Err(_) => match &mut self.fallback {
                    Some(fallback) => return fallback.write(line),
                    None => {
                        thread::sleep(RETRY_PAUSE);
                        continue;
                    }
                },
            };
            self.fallback = None;
            let Err(error) = socket.send(datagram.as_bytes()) else {
                self.socket = Some(socket);
                return Ok(());
            };
            match Errno::from_io_error(&error) {
                Some(Errno::MSGSIZE) if datagram.len() > SHORTEST_CUT => {
                    let half = (0..=datagram.len() / 2).rev().find(|at| datagram.is_char_boundary(*at));
                    datagram.truncate(half.unwrap_or(0));
                    datagram.push('…');
                    self.socket = Some(socket);
                }
                // The next attempt connects anew: another syslogd may have the path by then.
                Some(Errno::AGAIN | Errno::INTR) => {}
                _ => thread::sleep(RETRY_PAUSE),
            }
        }
    }
}

/// Connects to the socket `path`, or to that of this system.
///
/// # Errors
///
/// No syslogd listens there; the text names the path.
pub(super) fn connect(path: Option<&Path>) -> io::Result<UnixDatagram> {
    let mut first_error = None;
    for path in path.map_or_else(|| USUAL_PATHS.map(Path::new).to_vec(), |path| vec![path]) {
        let connected = UnixDatagram::unbound().and_then(|socket| {
            socket.connect(path)?;
            socket.set_write_timeout(Some(SEND_TIMEOUT))?;
            Ok(socket)
        });
        match connected {
            Ok(socket) => return Ok(socket),
            Err(error) => {
                first_error.get_or_insert(io::Error::new(error.kind(), format!("{}: {error}", path.display())));
            }
        }
    }
    Err(first_error.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_too_long_for_the_system_is_cut() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("log");
        let syslogd = UnixDatagram::bind(&path).unwrap();
        let mut syslog = Syslog::new(Some(&path), None);
        for size in [10, 1_000_000] {
            syslog.write(&LogLine { level: Level::Info, time: 0, text: "é".repeat(size) }).unwrap();
            let mut space = vec![0; 1_000_000];
            let length = syslogd.recv(&mut space).unwrap();
            let text = std::str::from_utf8(&space[..length]).unwrap();
            assert!(text.starts_with("<22>") && text.ends_with(if size == 10 { "éé" } else { "é…" }), "{length}");
        }
    }
}
