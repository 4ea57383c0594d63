//! `cargo xtask deps`: what the tests use, and the installing of what is missing.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::backports;
use crate::guest;
use crate::programs::{self, PROGRAMS, Source};
use crate::python_packages;
use crate::workspace::Workspace;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Install the missing Debian packages with apt-get (as root)
    #[arg(long)]
    install: bool,
}

/// Succeeds if nothing is missing in the end.
pub(crate) fn main(args: &Args) -> Result<bool> {
    let workspace = Workspace::find()?;
    if args.install {
        install(&workspace)?;
    }
    let mut complete = true;
    let mut tell = |name: &str, path: Option<PathBuf>, remedy: &str| {
        complete &= path.is_some();
        match path {
            Some(path) => println!("{name:<18} {}", path.display()),
            None => println!("{name:<18} missing: {remedy}"),
        }
    };
    for program in PROGRAMS {
        tell(program.name, programs::find(program.name), &program.remedy());
    }
    let guest = guest::is_there(&workspace).then(|| workspace.guest());
    tell("a Linux guest", guest, programs::INSTALL);
    tell("qemu.qmp (Python)", python_packages::find(&workspace), programs::INSTALL);
    Ok(complete)
}

fn install(workspace: &Workspace) -> Result<()> {
    install_programs(workspace)?;
    match python_packages::find(workspace) {
        Some(_) => Ok(()),
        None => python_packages::install(workspace),
    }
}

fn install_programs(workspace: &Workspace) -> Result<()> {
    let missing: Vec<Source> = PROGRAMS
        .iter()
        .filter(|program| programs::find(program.name).is_none())
        .map(|program| program.source)
        .collect();
    let plain = packages(&missing, |source| match source {
        Source::Debian(package) => Some(package),
        _ => None,
    });
    let newer = packages(&missing, |source| match source {
        Source::DebianBackports(package) => Some(package),
        _ => None,
    });
    let wants_guest = !guest::is_there(workspace);
    if plain.is_empty() && newer.is_empty() && !wants_guest {
        return Ok(());
    }
    let suite = if newer.is_empty() { None } else { Some(backports::enable()?) };
    // The list of packages on a new machine is empty or old.
    apt_get(&["update"])?;
    apt_install(&[], &plain)?;
    if let Some(suite) = suite {
        apt_install(&["--target-release", &suite], &newer)?;
    }
    if wants_guest {
        guest::prepare(workspace)?;
    }
    Ok(())
}

fn packages(
    sources: &[Source],
    package: impl Fn(Source) -> Option<&'static str>,
) -> Vec<&'static str> {
    let mut packages: Vec<_> = sources.iter().filter_map(|source| package(*source)).collect();
    packages.dedup();
    packages
}

fn apt_install(options: &[&str], packages: &[&str]) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    apt_get(&[&["install", "--yes", "--no-install-recommends"], options, packages].concat())
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
