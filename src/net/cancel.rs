//! The cancellation token: one call of `cancel` ends every wait for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};

/// Tells all threads that hold a clone to stop. It cannot be undone.
#[derive(Clone, Debug)]
pub struct CancelToken(Arc<State>);

#[derive(Debug)]
struct State {
    cancelled: AtomicBool,
    /// The reading end of a pipe: poll(2) waits for it beside sockets.
    reader: OwnedFd,
    writer: OwnedFd,
}

impl CancelToken {
    /// A token that is not cancelled. Fails if the system has no descriptors left.
    pub fn new() -> io::Result<CancelToken> {
        let (reader, writer) = rustix::pipe::pipe()?;
        for end in [&reader, &writer] {
            rustix::io::fcntl_setfd(end, rustix::io::FdFlags::CLOEXEC)?;
        }
        Ok(CancelToken(Arc::new(State { cancelled: AtomicBool::new(false), reader, writer })))
    }

    /// Cancels. A second call does nothing.
    pub fn cancel(&self) {
        if !self.0.cancelled.swap(true, Ordering::SeqCst) {
            // One octet that is never read: the pipe is readable from now on. It was empty, so this cannot fail.
            let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.0.writer, &[0]));
        }
    }

    /// Whether `cancel` was called on this token or a clone.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Waits until the token is cancelled, or until the deadline if there is one. Returns whether it is cancelled.
    pub fn wait_until(&self, deadline: Option<Instant>) -> bool {
        while !self.is_cancelled() {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                break;
            }
            // Rounded up: poll(2) must not return before the deadline, or this would loop through the last millisecond.
            let timeout = left.map(|left| {
                let millis = i64::try_from(left.as_millis()).unwrap_or(i64::MAX - 1) + 1;
                Timespec { tv_sec: millis / 1000, tv_nsec: millis % 1000 * 1_000_000 }
            });
            let mut polls = [PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)];
            let _ = rustix::event::poll(&mut polls, timeout.as_ref());
        }
        self.is_cancelled()
    }

    /// A descriptor to poll for `IN`: readable for ever after `cancel`. Never read from it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.reader.as_fd()
    }
}
