//! The SMTP protocol without sockets, files, clocks or threads (RFC 5321, RFC 2645).
//!
//! [`server`] and [`client`] are the two roles: a driver gives them lines and replies, and they return what to do next.
//! [`command`] and [`reply`] parse and write what the roles exchange. Only `turn.rs` changes the role on a connection.

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
