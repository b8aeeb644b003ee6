//! Sessions: the drivers of the two SMTP roles over a connection.

pub mod client;
pub mod server;
