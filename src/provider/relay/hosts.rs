//! The hosts that the relay has connections to, and those that it does not connect to for a while.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::smtp::reply::Reply;

/// What the relay knows of each host, by its address.
#[derive(Default)]
pub(super) struct HostTable {
    hosts: Mutex<HashMap<String, HostState>>,
}

#[derive(Default)]
struct HostState {
    connections: usize,
    down_until: Option<Instant>,
}

impl HostState {
    fn is_down(&self) -> bool {
        self.down_until.is_some_and(|until| until > Instant::now())
    }
}

/// Why no session has decided on the mail of an attempt.
#[derive(Debug)]
pub(super) enum RouteError {
    /// All mail that is due is deferred with this reply.
    Deferred(Reply),
    /// All mail that is due is rejected with this reply.
    Rejected(Reply),
    /// The relay has all permitted connections to the host in use: the mail is tried again soon.
    Busy,
    /// The relay was cancelled.
    Cancelled,
}

impl HostTable {
    /// Counts one more connection to a host; `limit`: how many the relay may have.
    ///
    /// # Errors
    /// The host is down or busy.
    pub(super) fn acquire(&self, address: &str, limit: usize) -> Result<HostPermit<'_>, RouteError> {
        let mut hosts = self.lock();
        let host = hosts.entry(address.to_owned()).or_default();
        if host.is_down() {
            return Err(RouteError::Deferred(Reply::new(451, "4.4.1", format!("{address} was not reachable lately"))));
        }
        if host.connections >= limit {
            return Err(RouteError::Busy);
        }
        host.connections += 1;
        Ok(HostPermit { table: self, address: address.to_owned() })
    }

    /// Permits no connection to a host for 0.8 of `retry_pause`, so that the next attempt at its mail finds it permitted.
    pub(super) fn mark_down(&self, address: &str, retry_pause: Duration) {
        let mut hosts = self.lock();
        // Otherwise the table would grow with every host that was ever connected to.
        hosts.retain(|_, host| host.connections > 0 || host.is_down());
        hosts.entry(address.to_owned()).or_default().down_until = Some(Instant::now() + retry_pause.mul_f32(0.8));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, HostState>> {
        self.hosts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection to a host, counted until this is dropped.
pub(super) struct HostPermit<'a> {
    table: &'a HostTable,
    address: String,
}

impl Drop for HostPermit<'_> {
    fn drop(&mut self) {
        let mut hosts = self.table.lock();
        if let Some(host) = hosts.get_mut(&self.address) {
            host.connections -= 1;
            if host.connections == 0 && !host.is_down() {
                hosts.remove(&self.address);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_that_is_busy_or_down_gives_no_permit() {
        let hosts = HostTable::default();
        let address = "127.0.0.2:25";
        let permit = hosts.acquire(address, 1).ok().unwrap();
        assert!(matches!(hosts.acquire(address, 1), Err(RouteError::Busy)));
        drop(permit);
        assert!(hosts.acquire(address, 1).is_ok());
        hosts.mark_down(address, Duration::from_secs(60));
        assert!(matches!(hosts.acquire(address, 1), Err(RouteError::Deferred(_))));
    }
}
