//! The one integration-test binary.

mod floors;
mod rules;
mod send;
mod transcripts;
