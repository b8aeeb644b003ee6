//! Starting threads with one compiled function for all work (that of the standard library is compiled for each), and
//! values that threads share.

use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle, Scope};

/// A value that one thread at a time uses. If a thread panics while it uses the value, the others go on with it: each user
/// leaves it valid at each step.
#[derive(Default, Debug)]
pub struct Guarded<T>(Mutex<T>);

impl<T> Guarded<T> {
    pub const fn new(value: T) -> Guarded<T> {
        Guarded(Mutex::new(value))
    }

    /// Waits until no other thread uses the value.
    pub fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn into_inner(self) -> T {
        self.0.into_inner().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Starts a thread. If the handle is dropped, the thread runs on.
///
/// # Errors
/// The system has no thread left.
pub fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    let work: Box<dyn FnOnce() + Send> = Box::new(work);
    Builder::new().name(name.to_owned()).spawn(work)
}

/// Starts a thread of a scope, which waits for its end.
///
/// # Errors
/// The system has no thread left.
pub fn spawn_scoped<'s>(scope: &'s Scope<'s, '_>, name: &str, work: impl FnOnce() + Send + 's) -> io::Result<()> {
    let work: Box<dyn FnOnce() + Send + 's> = Box::new(work);
    Builder::new().name(name.to_owned()).spawn_scoped(scope, work).map(drop)
}
