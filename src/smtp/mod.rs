//! The SMTP protocol without sockets, files, clocks or threads (RFC 5321, RFC 2645).
//!
//! Octets go in, octets and decisions come out. Two machines, [`server`] and [`client`], play the two roles. `turn.rs`
//! alone changes the role on a connection.

pub mod limits;
pub mod reply;
pub mod extensions;
pub mod status;
pub mod command;
pub mod content;
pub mod server;
pub mod client;

#[cfg(test)]
mod tests;
