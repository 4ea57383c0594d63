//! `cargo xtask iotest`: numbered end-to-end tests against the real `brep` binary.
//!
//! A test is `xtask/iotests/NNN-name.py` with the output that it must print in
//! `NNN-name.out`. Each runs in a scratch folder of its own, with a deadline, and fails as well
//! if it leaves a process or a socket behind.

mod diff;
mod discover;
mod leftovers;
mod one;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::process;
use crate::programs;
use crate::skips::Skip;
use crate::workspace::Workspace;
use discover::Test;
use one::{Harness, Verdict};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Tests by number, or by a word of their name; all if none is given
    #[arg(value_name = "NUMBER|WORD")]
    select: Vec<String>,
    /// Only list the tests, with what each checks
    #[arg(long)]
    list: bool,
    /// Keep the scratch folders, also of tests that pass
    #[arg(long)]
    keep: bool,
    /// Write the output of the selected tests to their .out files
    #[arg(long)]
    bless: bool,
    /// How many tests run at a time: they mostly wait
    #[arg(short, long, default_value_t = Options::default().jobs)]
    jobs: usize,
    /// Test this binary and build none
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// What to run and how.
pub(crate) struct Options {
    pub(crate) select: Vec<String>,
    pub(crate) keep: bool,
    pub(crate) bless: bool,
    pub(crate) jobs: usize,
    pub(crate) binary: Option<PathBuf>,
}

impl Default for Options {
    fn default() -> Self {
        Self { select: Vec::new(), keep: false, bless: false, jobs: 4, binary: None }
    }
}

/// How many tests ended in which way.
#[derive(Debug, Default)]
pub(crate) struct Summary {
    pub(crate) passed: usize,
    pub(crate) failed: usize,
    pub(crate) skips: Vec<Skip>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { passed, failed, skips } = self;
        write!(f, "{passed} passed, {failed} failed, {} skipped", skips.len())
    }
}

/// Succeeds if no selected test failed.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let workspace = Workspace::find()?;
    if args.list {
        list(&workspace, &args.select)?;
        return Ok(true);
    }
    let missing = programs::missing_needed(&["python3", "qemu-img", "qemu-io", "qemu-nbd"]);
    if let Some(program) = missing.first() {
        bail!("{} is missing: {}", program.name, program.remedy());
    }
    if args.binary.is_none() {
        build(&workspace)?;
    }
    let options = Options {
        select: args.select.clone(),
        keep: args.keep,
        bless: args.bless,
        jobs: args.jobs,
        binary: args.binary.clone(),
    };
    let summary = run(&workspace, &options)?;
    println!("{summary}");
    Ok(summary.failed == 0)
}

/// The packages whose example programs are tested as well.
const EXAMPLES_OF: [&str; 2] = ["brep-quorum", "brep-backup"];

/// Builds the binary, and the examples, in the profile of the unit tests.
pub(crate) fn build(workspace: &Workspace) -> Result<()> {
    let mut cargo = workspace.cargo();
    cargo.args(["build", "--bins", "--examples", "--package", "brep"]);
    for package in EXAMPLES_OF {
        cargo.args(["--package", package]);
    }
    let outcome = process::run(&mut cargo)?;
    ensure!(outcome.success, "brep does not build");
    Ok(())
}

fn list(workspace: &Workspace, select: &[String]) -> Result<()> {
    for test in discover::select(discover::all(&workspace.iotests())?, select)? {
        println!("{:<40} {}", test.name, test.purpose);
    }
    Ok(())
}

/// Runs the selected tests of the workspace, and says how each went.
pub(crate) fn run(workspace: &Workspace, options: &Options) -> Result<Summary> {
    let binary = options.binary.clone().unwrap_or_else(|| workspace.brep());
    let binary = binary.canonicalize().with_context(|| format!("no {}", binary.display()))?;
    run_folder(&workspace.iotests(), &binary, &workspace.guest(), options)
}

/// Runs the selected tests of a folder.
fn run_folder(folder: &Path, binary: &Path, guest: &Path, options: &Options) -> Result<Summary> {
    let tests = discover::select(discover::all(folder)?, &options.select)?;
    let harness = Harness::new(folder, binary, guest, options)?;
    let queue = Mutex::new(VecDeque::from(tests));
    let summary = Mutex::new(Summary::default());
    thread::scope(|scope| {
        for _ in 0..options.jobs.max(1) {
            scope.spawn(|| {
                while let Some(test) = next(&queue) {
                    let (verdict, seconds) = harness.run(&test);
                    settle(&summary, &test, verdict, seconds);
                }
            });
        }
    });
    let summary = summary.into_inner().unwrap_or_default();
    harness.close(summary.failed > 0);
    Ok(summary)
}

fn next(queue: &Mutex<VecDeque<Test>>) -> Option<Test> {
    queue.lock().ok()?.pop_front()
}

/// Prints under the lock, so that two tests' output does not mix.
fn settle(summary: &Mutex<Summary>, test: &Test, verdict: Verdict, seconds: f64) {
    let Ok(mut summary) = summary.lock() else { return };
    let name = &test.name;
    match verdict {
        Verdict::Passed => {
            summary.passed += 1;
            println!("ok    {name:<44} {seconds:5.1} s");
        }
        Verdict::Blessed => {
            summary.passed += 1;
            println!("wrote {name:<44} {seconds:5.1} s");
        }
        Verdict::Skipped(reason) => {
            println!("skip  {name:<44} {reason}");
            summary.skips.push(Skip { test: format!("iotest {name}"), reason });
        }
        Verdict::Failed(why) => {
            summary.failed += 1;
            println!("FAIL  {name:<44} {seconds:5.1} s\n{}", why.trim_end());
        }
    }
}
