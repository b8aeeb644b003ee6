//! The socket `ROOT/.wake`, by which other processes wake the daemon that works in a directory of mail.
//!
//! A process that has stored mail for the daemon to send, has made mail due, or has changed the configuration, sends a
//! datagram of one word. It is only a hint: without it, the daemon finds the mail at its next scan. So a process does
//! not wait until it can send a datagram, any process may send one, and a flood of datagrams causes one scan each 100
//! ms.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags};

use crate::net::cancel::{CancelToken, poll};
use crate::net::trace::quoted;
use crate::threads;

const NAME: &str = ".wake";

/// The pause after datagrams have arrived: equal ones that arrive during the pause count as one.
const WAKE_PAUSE: Duration = Duration::from_millis(100);

/// Datagrams that are read at once. Linux has room for eleven by default.
const DATAGRAMS_AT_ONCE: usize = 1000;

/// How often, and with which pause, a command tries again to send a datagram for which there is no room.
const ATTEMPTS: u32 = 20;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(50);

/// Why another process wakes the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WakeReason {
    /// It has stored mail that is to be sent.
    Outgoing,
    /// An administrator has made mail due now.
    Retry,
    /// It has changed the configuration of the provider.
    Reload,
}

impl WakeReason {
    const ALL: [WakeReason; 3] = [WakeReason::Outgoing, WakeReason::Retry, WakeReason::Reload];

    fn word(self) -> &'static str {
        match self {
            WakeReason::Outgoing => "outgoing",
            WakeReason::Retry => "retry",
            WakeReason::Reload => "reload",
        }
    }

    /// Wakes the daemon of the directory `root`, if there is one. It never waits.
    pub fn send(self, root: &Path) {
        let _ = self.try_send(root);
    }

    /// Wakes the daemon of the directory `root`; waits up to a second if the socket has no room for the datagram.
    ///
    /// # Errors
    ///
    /// `NotFound` and `ConnectionRefused`: no daemon has the socket; the errors of the system.
    pub fn send_surely(self, root: &Path) -> io::Result<()> {
        let is_full =
            |result: &io::Result<()>| matches!(result, Err(error) if error.kind() == io::ErrorKind::WouldBlock);
        let (mut sent, mut attempts) = (self.try_send(root), 0);
        while is_full(&sent) && attempts < ATTEMPTS {
            attempts += 1;
            std::thread::sleep(ATTEMPT_PAUSE);
            sent = self.try_send(root);
        }
        sent
    }

    fn try_send(self, root: &Path) -> io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.set_nonblocking(true)?;
        with_path_of(root, &mut |path| socket.send_to(self.word().as_bytes(), path).map(drop))
    }
}

/// Calls `call` with the path of the socket. The system permits about 100 octets; a longer path begins with a descriptor of
/// the directory, which works on Linux only.
fn with_path_of(root: &Path, call: &mut dyn FnMut(&Path) -> io::Result<()>) -> io::Result<()> {
    match call(&root.join(NAME)) {
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
            let directory = File::open(root)?;
            call(Path::new(&format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd())))
        }
        called => called,
    }
}

/// The socket of the daemon. It is removed when this is dropped.
struct WakeSocket {
    socket: UnixDatagram,
    path: PathBuf,
}

/// Makes the socket, in place of the one that a killed daemon has left, and starts a thread that calls `woken` with each
/// reason until `cancel` is cancelled. The caller must hold the lock of the directory until the thread has ended. `mode`: the
/// permissions of the socket. Returns `None` after a failure, which is logged.
pub fn receive_wakes(
    root: &Path, mode: u32, cancel: &CancelToken, woken: Box<dyn Fn(WakeReason) + Send>,
) -> Option<JoinHandle<()>> {
    let cancel = cancel.clone();
    let started = WakeSocket::bind(root, mode)
        .and_then(|socket| threads::spawn("wake", move || socket.receive(&cancel, &*woken)));
    let failed = |error: &io::Error| {
        let error = quoted(format!("{}: {error}", root.join(NAME).display()));
        let consequence = "mail that other processes store waits";
        log::warn!("event=wake-failed error={error} consequence={consequence:?}");
    };
    started.inspect_err(failed).ok()
}

impl WakeSocket {
    fn bind(root: &Path, mode: u32) -> io::Result<WakeSocket> {
        let path = root.join(NAME);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut bound = None;
        with_path_of(root, &mut |path| {
            bound = Some(UnixDatagram::bind(path)?);
            Ok(())
        })?;
        let socket = bound.ok_or(io::ErrorKind::NotFound)?;
        let wake = WakeSocket { socket, path };
        wake.socket.set_nonblocking(true)?;
        fs::set_permissions(&wake.path, Permissions::from_mode(mode))?;
        Ok(wake)
    }

    fn receive(self, cancel: &CancelToken, woken: &dyn Fn(WakeReason)) {
        while !cancel.is_cancelled() {
            let descriptors = [self.socket.as_fd(), cancel.fd()];
            let _ = poll(&mut descriptors.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)), None);
            self.words().into_iter().for_each(woken);
            // Pause before the next look, so that a flood does not keep the processor busy.
            cancel.wait_until(Some(Instant::now() + WAKE_PAUSE));
        }
    }

    /// Reads the datagrams that have arrived, each reason once. An unknown word counts as `Outgoing`: such datagrams may have
    /// left no room for a valid one.
    fn words(&self) -> Vec<WakeReason> {
        let (mut arrived, mut datagram) = (Vec::new(), [0; 16]);
        for _ in 0..DATAGRAMS_AT_ONCE {
            let Ok(octets) = self.socket.recv(&mut datagram) else { break };
            let mut known = WakeReason::ALL.into_iter();
            let reason = known.find(|reason| datagram[..octets] == *reason.word().as_bytes());
            let reason = reason.unwrap_or(WakeReason::Outgoing);
            if !arrived.contains(&reason) {
                arrived.push(reason);
            }
        }
        arrived
    }
}

impl Drop for WakeSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn directories() -> (tempfile::TempDir, Vec<PathBuf>) {
        let directory = tempfile::tempdir().unwrap();
        let long = directory.path().join("a-directory-with-a-long-name".repeat(5));
        fs::create_dir(&long).unwrap();
        let short = directory.path().to_owned();
        (directory, if cfg!(target_os = "linux") { vec![short, long] } else { vec![short] })
    }

    #[test]
    fn a_datagram_wakes_the_daemon_of_its_directory() {
        let (_directory, roots) = directories();
        for root in roots {
            // No daemon has run, or it was killed.
            assert!(WakeReason::Retry.send_surely(&root).is_err());
            let killed = WakeSocket::bind(&root, 0o600).unwrap();
            let left = root.join("left");
            fs::rename(root.join(NAME), &left).unwrap();
            drop(killed);
            fs::rename(&left, root.join(NAME)).unwrap();
            assert!(WakeReason::Retry.send_surely(&root).is_err());

            let (cancel, (sender, receiver)) = (CancelToken::new().unwrap(), mpsc::channel());
            let woken = Box::new(move |reason| sender.send(reason).unwrap());
            let daemon = receive_wakes(&root, 0o600, &cancel, woken).unwrap();
            assert_eq!(fs::metadata(root.join(NAME)).unwrap().permissions().mode() & 0o777, 0o600);
            let patience = Duration::from_secs(10);
            for reason in WakeReason::ALL {
                reason.send_surely(&root).unwrap();
                assert_eq!(receiver.recv_timeout(patience), Ok(reason));
            }
            // Datagrams of other programs.
            let program = UnixDatagram::unbound().unwrap();
            for text in [&b""[..], b"outgoing ", b"OUTGOING", &[0xff; 5000]] {
                let send = || with_path_of(&root, &mut |path| program.send_to(text, path).map(drop));
                while send().is_err() {
                    std::thread::sleep(ATTEMPT_PAUSE);
                }
            }
            WakeReason::Retry.send_surely(&root).unwrap();
            while receiver.recv_timeout(patience) != Ok(WakeReason::Retry) {}
            cancel.cancel();
            daemon.join().unwrap();
            assert!(!root.join(NAME).exists() && receiver.try_recv().is_err());
        }
    }

    /// Other programs have filled the queue of the socket: one of their datagrams counts as the word that had no room.
    #[test]
    fn the_daemon_wakes_even_if_there_was_no_room_for_the_word() {
        let root = tempfile::tempdir().unwrap();
        let wake = WakeSocket::bind(root.path(), 0o600).unwrap();
        assert_eq!(wake.words(), []);
        let program = UnixDatagram::unbound().unwrap();
        program.set_nonblocking(true).unwrap();
        while program.send_to(b"held", root.path().join(NAME)).is_ok() {}
        WakeReason::Outgoing.send(root.path());
        assert_eq!(wake.words(), [WakeReason::Outgoing]);
    }

    #[test]
    fn a_directory_in_place_of_the_socket_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join(NAME)).unwrap();
        assert!(WakeSocket::bind(root.path(), 0o600).is_err());
        assert!(root.path().join(NAME).is_dir());
    }
}
