//! The one integration-test binary.

mod floors;
mod send;
mod transcripts;
