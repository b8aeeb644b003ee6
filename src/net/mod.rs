//! The network: the cancellation token, the trace of dialogues, TLS, descriptors, connections, the poller, listeners
//! and their limits, the sockets of a supervisor and the reports to it, the socket that wakes a daemon, the resolver,
//! and addresses that no public host has.

pub mod cancel;
pub mod trace;
mod x509;
pub mod pin;
pub mod tls;
pub mod descriptor;
pub mod connection;
pub mod poller;
pub mod limiter;
pub mod listener;
pub mod inherited;
pub mod readiness;
pub mod wake;
pub mod resolver;
pub mod reserved;
