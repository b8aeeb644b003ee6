//! The hosts that the relay has connections to, and those that it leaves alone for a while.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// What is known of each host, by its address.
#[derive(Default)]
pub(super) struct HostTable {
    state: Mutex<HashMap<String, HostState>>,
}

#[derive(Default)]
struct HostState {
    connections: usize,
    down_until: Option<Instant>,
}

/// Why no connection to a host may be made now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum HostUnavailable {
    /// It was not reachable a moment ago.
    Down,
    /// The relay has as many connections to it as it may have.
    Busy,
}

impl HostTable {
    /// Counts one more connection to a host; `limit`: how many it may have.
    pub(super) fn acquire(&self, address: &str, limit: usize) -> Result<HostPermit<'_>, HostUnavailable> {
        let mut state = self.lock();
        let host = state.entry(address.to_owned()).or_default();
        if host.down_until.is_some_and(|until| until > Instant::now()) {
            return Err(HostUnavailable::Down);
        }
        if host.connections >= limit {
            return Err(HostUnavailable::Busy);
        }
        host.connections += 1;
        Ok(HostPermit { hosts: self, address: address.to_owned() })
    }

    /// Leaves a host alone for most of `pause`, so that it is tried again at the next attempt.
    pub(super) fn mark_down(&self, address: &str, pause: Duration) {
        let mut state = self.lock();
        // The table must not grow with every host that was ever down.
        state.retain(|_, host| host.connections > 0 || host.down_until.is_some_and(|until| until > Instant::now()));
        state.entry(address.to_owned()).or_default().down_until = Some(Instant::now() + pause.mul_f32(0.8));
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, HostState>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection to a host; `Drop` releases it.
pub(super) struct HostPermit<'a> {
    hosts: &'a HostTable,
    address: String,
}

impl Drop for HostPermit<'_> {
    fn drop(&mut self) {
        if let Some(host) = self.hosts.lock().get_mut(&self.address) {
            host.connections = host.connections.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_have_limits_and_are_left_alone_when_down() {
        let hosts = HostTable::default();
        let address = "127.0.0.2:25";
        let permit = hosts.acquire(address, 1).ok().unwrap();
        assert!(matches!(hosts.acquire(address, 1), Err(HostUnavailable::Busy)));
        drop(permit);
        assert!(hosts.acquire(address, 1).is_ok());
        hosts.mark_down(address, Duration::from_secs(60));
        assert!(matches!(hosts.acquire(address, 1), Err(HostUnavailable::Down)));
    }
}
