//! The customer: it calls its provider, sends outgoing mail, receives the mail of its domains, and delivers it by its rules
//! into Maildirs or to other mail servers, its next hops.

pub mod counters;
pub mod store;
pub mod mailboxes;
pub mod success_dsn;
pub mod next_hop;
pub mod retry_queue;
pub mod receiver;
pub mod outbox;
pub mod submission;
pub mod submitter;
pub mod sendmail;
pub mod pull;
pub mod probe;
pub mod network;
pub mod daemon;
pub mod status;

pub use counters::Summary;
pub use pull::{CallError, pull};
