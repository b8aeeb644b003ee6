//! The customer: it calls the provider, hands over its outgoing mail, is handed its own, and keeps it in
//! Maildirs.

pub mod daemon;
pub mod local;
pub mod mailboxes;
pub mod outbox;
pub mod pull;
pub mod send;

pub use pull::{Error, Summary, pull};
