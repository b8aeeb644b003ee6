//! The one integration-test binary.

mod check;
mod command_line;
mod conformance;
mod house;
mod send;
mod transcripts;
