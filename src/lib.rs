//! On-Demand Mail Relay (RFC 2645): both ends, in one small synchronous program.
//!
//! A provider holds mail for domains whose server has no fixed address; when that server, the customer,
//! connects to port 366, authenticates and says ATRN, the connection turns: the provider becomes the SMTP
//! client and delivers.
//!
//! The modules lie on floors; each uses lower floors only (`tests/floors.rs` checks it). Read them from
//! below, or begin with [`turn`], which is what it is all about.
#![forbid(unsafe_code)]

pub mod clock;
pub mod ids;
pub mod privileges;

pub mod mail;
pub mod sasl;
pub mod smtp;

pub mod maildir;
pub mod net;
pub mod queue;
pub mod report;
pub mod session;
pub mod turn;

pub mod config;
pub mod recipients;
pub mod schedule;

pub mod cli;
pub mod customer;
pub mod provider;
