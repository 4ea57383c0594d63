//! `cargo xtask bench`: speeds side by side with a pair of QEMUs, qemu-nbd and nbdkit.
//!
//! The measuring is done by `xtask/bench/bench.py`, which shares the end-to-end tests' library.

pub(crate) mod nbd_load;
mod usage;

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use crate::process;
use crate::programs;
use crate::workspace::Workspace;

/// Those that are compared with, and those that load.
const PROGRAMS: [&str; 6] =
    ["qemu-system-x86_64", "qemu-nbd", "nbdkit", "nbdcopy", "fio", "python3"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Only rows whose name holds one of these words; all if none is given
    #[arg(long, value_name = "WORD", value_delimiter = ',')]
    only: Vec<String>,
    /// Only list the rows
    #[arg(long)]
    list: bool,
    /// How often each row is measured: its median counts
    #[arg(long, default_value_t = 5)]
    rounds: u32,
    /// Seconds of each load
    #[arg(long, default_value_t = 2.0)]
    runtime: f64,
    /// Size of the disks, in MiB
    #[arg(long, default_value_t = 1024, value_name = "MIB")]
    size_mib: u32,
    /// Where the disks lie: the file system matters
    #[arg(long, default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,
    /// Write everything that was measured to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Draw throughput and latency over the depth (the rows of sweep/) into this file, an SVG
    #[arg(long, value_name = "FILE")]
    plot: Option<PathBuf>,
    /// Measure this binary and build none
    #[arg(long, value_name = "FILE")]
    binary: Option<PathBuf>,
}

/// Succeeds if every row was measured, whoever is ahead.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let workspace = Workspace::find()?;
    if let Some(missing) = PROGRAMS.iter().find(|program| programs::find(program).is_none()) {
        bail!("{missing} is missing: {}", programs::INSTALL);
    }
    let binary = match &args.binary {
        Some(binary) => binary.clone(),
        // A list needs none.
        None if args.list => process::own_binary(),
        None => build(&workspace)?,
    };
    let binary = binary.canonicalize().with_context(|| format!("no {}", binary.display()))?;
    let absolute = |path: &Option<PathBuf>| path.as_ref().map(std::path::absolute).transpose();
    let (json, plot) = (absolute(&args.json)?, absolute(&args.plot)?);
    let scratch = args.dir.join(format!("brep-bench-{}", std::process::id()));
    fs::create_dir(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let scripts = workspace.root.join("xtask/bench");
    let mut python = Command::new("python3");
    python
        .arg("-B")
        .arg(scripts.join("bench.py"))
        .args(["--rounds", &args.rounds.to_string()])
        .args(["--runtime", &args.runtime.to_string()])
        .args(["--size-mib", &args.size_mib.to_string()])
        .args(args.only.iter().flat_map(|word| ["--only", word]))
        .args(args.list.then_some("--list"))
        .current_dir(&scratch)
        .env("BREP", &binary)
        .env("BREP_XTASK", process::own_binary())
        .env("PYTHONPATH", workspace.iotests().join("lib"))
        .env("XDG_RUNTIME_DIR", &scratch);
    for (option, file) in [("--json", json), ("--plot", plot)] {
        if let Some(file) = file {
            python.arg(option).arg(file);
        }
    }
    let status = python.status().context("cannot run python3")?;
    fs::remove_dir_all(&scratch)?;
    Ok(status.success())
}

/// Builds the binary as it is released.
fn build(workspace: &Workspace) -> Result<PathBuf> {
    let outcome =
        process::run(workspace.cargo().args(["build", "--release", "--package", "brep"]))?;
    ensure!(outcome.success, "brep does not build");
    Ok(workspace.target.join("release/brep"))
}
