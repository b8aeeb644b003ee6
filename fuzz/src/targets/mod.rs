//! What `make fuzz` runs: one file for each target, whose `run` gets the octets and panics at what must not be.
//!
//! `fuzz_targets/` gives these functions to libFuzzer. The tests of odmr include the same files, and run each over its seeds
//! (`tests/fuzz.rs`), so that a target that no longer fits the program fails in `cargo test`.
//!
//! To add one: a file here with `run`, a line in [`TARGETS`], a branch in [`seeds::of`], a file in `fuzz_targets/`, and its
//! lines in `Cargo.toml`.

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
mod folder;
mod maildir;
mod provider;
mod relay;
mod reply;
mod sasl;
pub mod seeds;
mod server;
mod state;
mod talk;

/// A target: its name, and what it does with the octets.
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
