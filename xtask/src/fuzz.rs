//! `cargo xtask fuzz`: a fuzzer looks for bytes that break what strangers talk to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::process;
use crate::programs;
use crate::simulate;
use crate::workspace::Workspace;

/// The targets, with doors that the product does not have.
pub(crate) const PACKAGE: &str = "brep-fuzz";
const PROGRAM: &str = "cargo-fuzz";
/// How to get the fuzzer, which no Debian package has.
const INSTALL: &str = "cargo install --locked cargo-fuzz";
/// An input that takes longer has found something.
const INPUT_SECONDS_MAX: u32 = 20;
/// Longer inputs find little more.
const INPUT_LEN_MAX: u32 = 16 << 10;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// One of the folders of fuzz/corpus; without it, one target after the other
    target: Option<String>,
    /// Run this input instead of looking for new ones
    #[arg(requires = "target", conflicts_with_all = ["seconds", "minimize"])]
    input: Option<PathBuf>,
    /// How long to look, for each target
    #[arg(long, default_value_t = 60, value_name = "SECONDS")]
    seconds: u32,
    /// How many processes look at a time
    #[arg(long, default_value_t = 1, value_name = "NUMBER")]
    jobs: u32,
    /// Keep of the corpus only what reaches code that nothing else reaches
    #[arg(long, conflicts_with = "seconds")]
    minimize: bool,
}

/// Succeeds if nothing was broken.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let workspace = Workspace::find()?;
    ensure!(programs::find(PROGRAM).is_some(), "{PROGRAM} is missing: {INSTALL}");
    let known = targets(&workspace.root.join("fuzz/corpus"))?;
    let chosen: Vec<&String> = match &args.target {
        None => known.iter().collect(),
        Some(target) => {
            ensure!(known.contains(target), "no target {target}; there are {}", known.join(", "));
            vec![target]
        }
    };
    let mut sound = true;
    for target in chosen {
        println!("==> {target}");
        sound &= fuzz(&workspace, target, args)?;
    }
    Ok(sound)
}

fn targets(corpus: &Path) -> Result<Vec<String>> {
    let folders = std::fs::read_dir(corpus).with_context(|| corpus.display().to_string())?;
    let mut names = Vec::new();
    for folder in folders {
        names.push(folder?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn fuzz(workspace: &Workspace, target: &str, args: &Args) -> Result<bool> {
    let mut cargo = simulate::repeatable(workspace);
    // The fuzzer's instrumentation is not part of the stable compiler's promises.
    cargo.env("RUSTC_BOOTSTRAP", "1");
    // Minutes of building for nothing that is looked for.
    cargo.env("CARGO_PROFILE_RELEASE_LTO", "off");
    cargo.args(["fuzz", if args.minimize { "cmin" } else { "run" }]);
    cargo.args(["--fuzz-dir", "fuzz", "--features", "libfuzzer"]);
    if args.jobs > 1 {
        cargo.arg("--jobs").arg(args.jobs.to_string());
    }
    cargo.arg(target).args(&args.input);
    cargo.arg("--").arg(format!("-max_len={INPUT_LEN_MAX}"));
    cargo.arg(format!("-timeout={INPUT_SECONDS_MAX}"));
    if args.input.is_none() && !args.minimize {
        cargo.arg(format!("-max_total_time={}", args.seconds));
    }
    Ok(process::run(&mut cargo)?.success)
}
