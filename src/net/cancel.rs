//! The cancellation token, and the one function that waits for descriptors.
//!
//! Every thread that waits also polls the token's descriptor: one call of [`CancelToken::cancel`] wakes all.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;

use crate::platform;

/// A request to stop, for all threads that hold a clone. It cannot be undone.
#[derive(Clone, Debug)]
pub struct CancelToken(Arc<State>);

#[derive(Debug)]
struct State {
    cancelled: AtomicBool,
    /// The reading end of a pipe, for poll(2).
    reader: OwnedFd,
    writer: OwnedFd,
}

impl CancelToken {
    /// Returns a token that is not cancelled.
    ///
    /// # Errors
    ///
    /// The system has no descriptors left.
    pub fn new() -> io::Result<CancelToken> {
        let (reader, writer) = platform::pipe()?;
        Ok(CancelToken(Arc::new(State { cancelled: AtomicBool::new(false), reader, writer })))
    }

    /// Cancels the token and its clones. A second call does nothing.
    pub fn cancel(&self) {
        if !self.0.cancelled.swap(true, Ordering::SeqCst) {
            // One octet that is never read: the pipe is readable from now on. It was empty, so this cannot fail.
            let _ = rustix::io::retry_on_intr(|| rustix::io::write(&self.0.writer, &[0]));
        }
    }

    /// Returns whether `cancel` was called on this token or a clone.
    pub fn is_cancelled(&self) -> bool {
        self.0.cancelled.load(Ordering::SeqCst)
    }

    /// Checks that the token is not cancelled.
    ///
    /// # Errors
    ///
    /// `Interrupted` if it is cancelled.
    pub fn check(&self) -> io::Result<()> {
        if self.is_cancelled() { Err(io::Error::new(io::ErrorKind::Interrupted, "cancelled")) } else { Ok(()) }
    }

    /// Waits until the token is cancelled, or until the deadline if there is one. Returns whether it is cancelled.
    pub fn wait_until(&self, deadline: Option<Instant>) -> bool {
        while !self.is_cancelled() && deadline.is_none_or(|deadline| Instant::now() < deadline) {
            let _ = poll(&mut [PollFd::from_borrowed_fd(self.fd(), PollFlags::IN)], deadline);
        }
        self.is_cancelled()
    }

    /// Returns a descriptor to poll for `IN`: it is readable for ever after `cancel`. Never read from it.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.0.reader.as_fd()
    }
}

/// Calls poll(2): waits until a descriptor is ready or the deadline has passed; without a deadline there is no limit. If
/// a signal interrupts the wait, no descriptor is ready: the caller must check its deadline and wait again.
///
/// # Errors
///
/// The errors of the system.
pub fn poll(descriptors: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<()> {
    let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
    // A time that is too long for the system becomes no limit.
    let left = left.and_then(|left| Timespec::try_from(left).ok());
    match rustix::event::poll(descriptors, left.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
