//! The customer: it calls the provider, is handed its mail, and keeps it in Maildirs.

pub mod mailboxes;
pub mod pull;

pub use pull::{Error, Summary, pull};
