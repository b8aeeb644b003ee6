//! The network: connections with and without TLS, listeners within limits, name servers, cancellation.

pub mod connection;
pub mod listener;
pub mod resolver;
pub mod tls;
