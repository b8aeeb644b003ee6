//! The customer: it calls the provider, hands over its outgoing mail, is handed its own, and delivers that by its
//! rules: into Maildirs, or to the mail server that is there already.

pub mod daemon;
pub mod handover;
pub mod local;
pub mod mailboxes;
pub mod network;
pub mod outbox;
pub mod pull;
pub mod receiver;
pub mod send;
pub mod tally;

pub use pull::{CallError, pull};
pub use tally::Summary;
