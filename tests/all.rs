//! The one integration-test binary.

mod check;
mod house;
mod send;
mod transcripts;
