//! On-Demand Mail Relay (RFC 2645): both ends, in one small synchronous program.
//!
//! A provider holds mail for domains whose server has no fixed address; when that server, the customer,
//! connects to port 366, authenticates and says ATRN, the connection turns: the provider becomes the SMTP
//! client and delivers.
//!
//! The modules lie on floors; each uses lower floors only (`tests/floors.rs` checks it). Read them from
//! below, or begin with [`turn`], which is what it is all about.
#![forbid(unsafe_code)]

// floor 0: tools
pub mod sasl;
pub mod stamp;

// floor 1: the protocol, pure
pub mod smtp;

// floor 2: the ground
pub mod config;
pub mod dns;
pub mod dsn;
pub mod maildir;
pub mod rules;
pub mod schedule;
pub mod tls;
pub mod user;
pub mod wire;

// floor 3: mail that waits
pub mod queue;

// floor 4: sessions of both roles, their turn, and what becomes of mail after an attempt
pub mod dialogue;
pub mod listen;
pub mod outgoing;
pub mod session;
pub mod turn;

// floor 5: the parties
pub mod customer;
pub mod provider;

// floor 6: the door
pub mod cli;
pub mod demo;
