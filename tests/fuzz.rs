//! Runs the targets of `make fuzz` with their seeds, which include those of `fuzz/found`.

#[path = "../fuzz/src/targets/mod.rs"]
mod targets;

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

/// Threads for each target. Most targets wait most of the time.
const THREADS: usize = 4;

#[test]
fn every_target_runs_over_its_seeds() {
    let failed = AtomicUsize::new(0);
    for (name, run) in targets::TARGETS {
        let begun = Instant::now();
        let seeds = targets::seeds::of(name);
        assert!(!seeds.is_empty(), "no seeds for {name}");
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..THREADS {
                scope.spawn(|| {
                    while let Some(seed) = seeds.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if catch_unwind(AssertUnwindSafe(|| run(seed))).is_err() {
                            println!("{name}: {}", seed.escape_ascii());
                            failed.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                });
            }
        });
        println!("{name}: {} seeds in {:?}", seeds.len(), begun.elapsed());
    }
    assert_eq!(failed.into_inner(), 0);
}
