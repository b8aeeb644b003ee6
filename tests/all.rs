//! The one integration-test binary.

mod calls;
mod check;
mod command_line;
mod conformance;
mod descriptors;
mod distributed;
mod fuzz;
mod house;
mod litter;
mod log;
mod logging;
mod operator;
mod owner;
mod recipes;
mod relaying;
mod reload;
mod running;
mod sandbox;
mod secret;
mod send;
mod setup;
mod shared_box;
mod signals;
mod supervised;
mod transcripts;
mod trust;
