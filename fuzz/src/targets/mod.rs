//! What `make fuzz` runs: one file for each target. Its function `run` gets the octets, and panics if something is wrong.
//!
//! libFuzzer calls these functions from `fuzz_targets/`. The tests of odmr include the same files, and run each target with
//! its seeds (`tests/fuzz.rs`), so that a target that no longer fits the program fails in `cargo test`.
//!
//! To add a target: a file here with `run`, a line in [`TARGETS`], a branch in [`seeds::of`], a file in `fuzz_targets/`, and
//! its lines in `Cargo.toml`.

mod aliases;
mod address;
mod check;
mod client;
mod command;
mod config;
mod content;
mod customer;
mod dns;
mod envelope;
mod directory;
mod maildir;
mod provider;
mod relay;
mod reply;
mod sasl;
pub mod seeds;
mod server;
mod state;
mod peer;

/// A target: its name, and the function that gets the octets.
pub type Target = (&'static str, fn(&[u8]));

/// All targets.
pub const TARGETS: [Target; 16] = [
    ("address", address::run),
    ("aliases", aliases::run),
    ("client", client::run),
    ("command", command::run),
    ("config", config::run),
    ("content", content::run),
    ("customer", customer::run),
    ("dns", dns::run),
    ("envelope", envelope::run),
    ("maildir", maildir::run),
    ("provider", provider::run),
    ("relay", relay::run),
    ("reply", reply::run),
    ("sasl", sasl::run),
    ("server", server::run),
    ("state", state::run),
];
