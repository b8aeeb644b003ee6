//! Fuzzing of odmr by libFuzzer. The work is done in [`targets`].

pub mod targets;
pub mod transcripts;

use std::fs;
use std::path::Path;
use std::sync::Arc;

use signal_hook::consts::SIGPIPE;

/// Writes the seeds of a target into its corpus, which libFuzzer reads after this. Returns the function of the target.
pub fn begin(name: &str) -> fn(&[u8]) {
    // Without a handler for SIGPIPE, a write to a closed connection would end the process. Rust ignores the signal in
    // programs with its own `main`, which libFuzzer replaces.
    signal_hook::flag::register(SIGPIPE, Arc::default()).expect("a handler");
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(name);
    fs::create_dir_all(&corpus).expect("the corpus");
    for (number, seed) in targets::seeds::of(name).iter().enumerate() {
        fs::write(corpus.join(format!("seed-{number}")), seed).expect("a seed");
    }
    let found = targets::TARGETS.iter().find(|(other, _)| *other == name);
    found.unwrap_or_else(|| panic!("there is no target {name}")).1
}

/// The contents of `fuzz_targets/NAME.rs`.
#[macro_export]
macro_rules! fuzz {
    ($name:literal) => {
        static TARGET: std::sync::OnceLock<fn(&[u8])> = std::sync::OnceLock::new();
        libfuzzer_sys::fuzz_target!(
            init: {
                let _ = TARGET.set($crate::begin($name));
            },
            |data: &[u8]| TARGET.get().expect("init has run")(data)
        );
    };
}
