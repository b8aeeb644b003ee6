//! Starting threads with one compiled function for all work: that of the standard library is compiled for each.

use std::io;
use std::thread::{Builder, JoinHandle, Scope};

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
