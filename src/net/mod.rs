//! The network: the cancellation token, the trace, TLS, descriptors, connections, the poller, listeners within
//! limits, what a supervisor passes and is told, the socket that wakes a daemon, name servers, and the addresses that no host in the world has.

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
