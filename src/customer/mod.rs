//! The customer: it calls the provider, hands over its outgoing mail, is handed its own, and delivers that by its
//! rules: into Maildirs, or to the mail server that is there already.

pub mod counters;
pub mod daemon;
pub mod mailboxes;
pub mod network;
pub mod next_hop;
pub mod outbox;
pub mod pull;
pub mod receiver;
pub mod sendmail;
pub mod submission;

pub use counters::Summary;
pub use pull::{CallError, pull};
