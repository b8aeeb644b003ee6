//! The SMTP protocol without sockets, files, clocks or threads (RFC 5321, RFC 2645).
//!
//! Octets go in, octets and decisions come out. Two machines, [`server`] and [`client`], play the two
//! roles; which of them speaks on a connection is decided outside, and changed by `turn.rs` alone.

pub mod client;
pub mod command;
pub mod content;
pub mod reply;
pub mod server;

#[cfg(test)]
mod tests;
