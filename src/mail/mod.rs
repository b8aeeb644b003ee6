//! Internet messages without sockets, files or clocks (RFC 5322): addresses, header fields, address lists, and the
//! `Received` field, reading and writing.

pub mod address;
pub mod received;
pub mod header;
