//! A long campaign, in parts that are processes of their own.
//!
//! What a process of the pair leaves behind when it is killed is memory here: the end of a real
//! process would have given it back.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::campaign::{self, Plan};

/// Histories of one process.
pub(crate) const PART_RUNS: u64 = 50;

/// glibc's: files in memory grow and go all the time, and what they had is needed again at once.
const ALLOCATOR: [(&str, &str); 2] =
    [("MALLOC_TRIM_THRESHOLD_", "1073741824"), ("MALLOC_MMAP_THRESHOLD_", "1073741824")];

/// Runs all; tells whether every one has passed. Their counts are added up.
pub(crate) fn run(plan: &Plan) -> bool {
    let started = Instant::now();
    let end = plan.first + plan.runs;
    let next = AtomicU64::new(plan.first);
    let counts = Mutex::new(BTreeMap::<String, u64>::new());
    let failed_parts = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for _ in 0..plan.jobs {
            scope.spawn(|| {
                loop {
                    let first = next.fetch_add(PART_RUNS, Ordering::Relaxed);
                    if first >= end {
                        return;
                    }
                    match part(first, PART_RUNS.min(end - first), &counts) {
                        Ok(true) => {}
                        Ok(false) => drop(failed_parts.fetch_add(1, Ordering::Relaxed)),
                        Err(error) => {
                            println!("FAILED: the histories from {first} on: {error}");
                            failed_parts.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                }
            });
        }
    });
    let counts = counts.into_inner().expect("no panic under this lock");
    let complete = campaign::summary(&counts, plan.runs);
    let failed = failed_parts.into_inner();
    let seconds = started.elapsed().as_secs_f64();
    match failed {
        0 => println!("all of {} histories passed, {seconds:.1} s", plan.runs),
        _ => println!("FAILED: {failed} parts of {PART_RUNS} histories each, {seconds:.1} s"),
    }
    failed == 0 && complete
}

/// Runs some in a process; its counts are taken, the rest of what it says is passed on if one failed.
fn part(first: u64, runs: u64, counts: &Mutex<BTreeMap<String, u64>>) -> std::io::Result<bool> {
    let output = Command::new(std::env::current_exe()?)
        .args(["--seed", &first.to_string(), "--runs", &runs.to_string(), "--jobs", "1"])
        .envs(ALLOCATOR)
        .stderr(Stdio::inherit())
        .output()?;
    let passed = output.status.success();
    for line in String::from_utf8_lossy(&output.stdout).lines() {
        let counted = line.trim_start().split_once("  ");
        let counted = counted.and_then(|(n, what)| Some((n.parse::<u64>().ok()?, what)));
        match counted {
            Some((count, what)) => {
                let mut counts = counts.lock().expect("no panic under this lock");
                *counts.entry(what.to_owned()).or_default() += count;
            }
            None if !passed => println!("{line}"),
            None => {}
        }
    }
    Ok(passed)
}
