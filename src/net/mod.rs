//! The network: connections with and without TLS, listeners within limits, name servers, cancellation.

pub mod cancel;
pub mod trace;
pub mod tls;
pub mod connection;
pub mod listener;
pub mod resolver;
