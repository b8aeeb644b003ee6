//! The network: the cancellation token, the trace, TLS, descriptors, connections, listeners within limits, and name servers.

pub mod cancel;
pub mod trace;
mod x509;
pub mod tls;
pub mod descriptor;
pub mod connection;
pub mod listener;
pub mod resolver;
