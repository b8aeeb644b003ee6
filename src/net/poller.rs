//! Waiting for thousands of descriptors at once, by epoll(7) or kqueue(2): an idle one costs no time.
//!
//! A descriptor is reported once when it becomes ready, and not again before a call on it was not ready. So after a report
//! the thread must read until `WouldBlock` or until it gets fewer octets than it has room for, and write until `WouldBlock`.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token, Waker};

/// The most reports of one wait; the next wait returns the others.
const EVENTS_LIMIT: usize = 1024;

const WAKER: Token = Token(usize::MAX);

/// Waits for descriptors, and for its [`PollerWaker`].
pub struct Poller {
    poll: Poll,
    events: Events,
    waker: PollerWaker,
}

/// Ends a wait from another thread.
#[derive(Clone)]
pub struct PollerWaker {
    waker: Arc<Waker>,
    /// The poller was woken since its last wait ended, and need not be woken again.
    woken: Arc<AtomicBool>,
}

/// A descriptor that has become ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReadyDescriptor {
    /// The number that was given to [`Poller::watch`].
    pub number: usize,
    /// The peer has closed its side, or the connection has an error: read until the end, even after fewer octets than there
    /// was room for.
    pub closed: bool,
}

impl Poller {
    /// A poller that watches no descriptor.
    ///
    /// # Errors
    /// The system has no descriptors left.
    pub fn new() -> io::Result<Poller> {
        let poll = Poll::new()?;
        let waker = Arc::new(Waker::new(poll.registry(), WAKER)?);
        let waker = PollerWaker { waker, woken: Arc::default() };
        Ok(Poller { poll, events: Events::with_capacity(EVENTS_LIMIT), waker })
    }

    /// A waker, by which another thread ends a wait of this poller.
    pub fn waker(&self) -> PollerWaker {
        self.waker.clone()
    }

    /// Watches a descriptor for octets to read or room to write. `number`: any but `usize::MAX`; several descriptors may have
    /// the same.
    ///
    /// # Errors
    /// `PermissionDenied` for a file on a disk, which is always ready; the errors of the system.
    pub fn watch(&self, descriptor: BorrowedFd<'_>, number: usize) -> io::Result<()> {
        let interest = Interest::READABLE | Interest::WRITABLE;
        self.poll.registry().register(&mut SourceFd(&descriptor.as_raw_fd()), Token(number), interest)
    }

    /// Stops watching a descriptor. Call it before the descriptor is closed: if another process has it open, reports go on.
    pub fn forget(&self, descriptor: BorrowedFd<'_>) {
        let _ = self.poll.registry().deregister(&mut SourceFd(&descriptor.as_raw_fd()));
    }

    /// Waits until a descriptor becomes ready, the waker is used, a signal arrives, or the timeout has passed; without a
    /// timeout there is no limit. Returns the descriptors that have become ready.
    ///
    /// # Errors
    /// The errors of the system.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<impl Iterator<Item = ReadyDescriptor>> {
        let waited = self.poll.poll(&mut self.events, timeout);
        // Reset before the caller looks for its new work: work that is added after this wakes it again.
        self.waker.woken.store(false, Ordering::SeqCst);
        if let Err(error) = waited {
            self.events.clear();
            if error.kind() != io::ErrorKind::Interrupted {
                return Err(error);
            }
        }
        let events = self.events.iter().filter(|event| event.token() != WAKER);
        Ok(events.map(|event| ReadyDescriptor {
            number: event.token().0,
            closed: event.is_read_closed() || event.is_error(),
        }))
    }
}

impl PollerWaker {
    /// Ends the wait under way, or the next one.
    pub fn wake(&self) {
        if !self.woken.swap(true, Ordering::SeqCst) {
            // It fails only if the poller was dropped.
            let _ = self.waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::thread;

    use super::*;

    const AT_ONCE: Option<Duration> = Some(Duration::ZERO);

    fn wait(poller: &mut Poller) -> Vec<ReadyDescriptor> {
        poller.wait(AT_ONCE).unwrap().collect()
    }

    #[test]
    fn a_descriptor_is_reported_when_it_becomes_ready_and_not_again() {
        let mut poller = Poller::new().unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        poller.watch(ours.as_fd(), 7).unwrap();
        let ready = ReadyDescriptor { number: 7, closed: false };
        assert_eq!(wait(&mut poller), [ready]); // to write
        assert_eq!(wait(&mut poller), []);
        theirs.write_all(b"x").unwrap();
        assert_eq!(wait(&mut poller), [ready]);
        assert_eq!(wait(&mut poller), []);
        assert_eq!(ours.read(&mut [0; 8]).unwrap(), 1);
        drop(theirs);
        assert_eq!(wait(&mut poller), [ReadyDescriptor { number: 7, closed: true }]);
        poller.forget(ours.as_fd());
        assert_eq!(wait(&mut poller), []);
    }

    #[test]
    fn a_wait_ends_when_it_is_woken_before_or_meanwhile() {
        let mut poller = Poller::new().unwrap();
        let waker = poller.waker();
        for _ in 0..3 {
            waker.wake();
            waker.wake();
            assert_eq!(poller.wait(None).unwrap().count(), 0);
        }
        let late = thread::spawn(move || {
            thread::sleep(Duration::from_millis(20));
            waker.wake();
        });
        assert_eq!(poller.wait(None).unwrap().count(), 0);
        late.join().unwrap();
    }

    #[test]
    fn a_file_on_a_disk_cannot_be_watched() {
        let poller = Poller::new().unwrap();
        let watched = poller.watch(tempfile::tempfile().unwrap().as_fd(), 1);
        // kqueue(2) permits it.
        if let Err(error) = watched {
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
        }
    }
}
