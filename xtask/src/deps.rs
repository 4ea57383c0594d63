//! `cargo xtask deps`: what the tests use, and the installing of what is missing.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::programs::{self, PROGRAMS, Source};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install the missing Debian packages with apt-get (as root)
    #[arg(long)]
    install: bool,
}

/// Succeeds if nothing is missing in the end.
pub(crate) fn main(args: &Args) -> Result<bool> {
    if args.install {
        install(&missing_packages())?;
    }
    let mut complete = true;
    for program in PROGRAMS {
        match programs::find(program.name) {
            Some(path) => println!("{:<14} {}", program.name, path.display()),
            None => {
                complete = false;
                println!("{:<14} missing: {}", program.name, program.remedy());
            }
        }
    }
    Ok(complete)
}

fn missing_packages() -> Vec<&'static str> {
    let mut packages: Vec<_> = PROGRAMS
        .iter()
        .filter(|program| programs::find(program.name).is_none())
        .filter_map(|program| match program.source {
            Source::Debian(package) => Some(package),
            Source::Command(_) => None,
        })
        .collect();
    packages.dedup();
    packages
}

fn install(packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    // The list of packages on a new machine is empty or old.
    apt_get(&["update"])?;
    apt_get(&[&["install", "--yes", "--no-install-recommends"], packages].concat())
}

fn apt_get(args: &[&str]) -> Result<()> {
    println!("apt-get {}", args.join(" "));
    let status = Command::new("apt-get")
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .status()
        .context("cannot run apt-get: install the listed programs by hand")?;
    ensure!(status.success(), "apt-get {} failed: {status}", args.join(" "));
    Ok(())
}
