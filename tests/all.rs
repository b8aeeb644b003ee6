//! The one integration-test binary.

mod check;
mod floors;
mod send;
mod transcripts;
