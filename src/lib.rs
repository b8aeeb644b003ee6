//! On-Demand Mail Relay (RFC 2645): both ends, in one small synchronous program.
//!
//! A provider holds mail for domains whose server has no fixed address; when that server, the customer,
//! connects to port 366, authenticates and says ATRN, the connection turns: the provider becomes the SMTP
//! client and delivers.
//!
//! The modules lie on floors; each uses lower floors only (`tests/floors.rs` checks it). Read them from
//! below, or begin with [`turn`], which is what it is all about.
#![forbid(unsafe_code)]

// What comes from outside: time, randomness, the user.
pub mod clock;
pub mod ids;
pub mod privileges;

// The protocol, pure.
pub mod sasl;
pub mod mail;
pub mod smtp;

// Sockets and files.
pub mod net;
pub mod maildir;
pub mod queue;

// Sessions of both roles, the turn between them, and what follows an attempt.
pub mod session;
pub mod turn;
pub mod report;

// What a configuration decides.
pub mod schedule;
pub mod recipients;
pub mod config;

// The parties, and the program.
pub mod provider;
pub mod customer;
pub mod cli;
