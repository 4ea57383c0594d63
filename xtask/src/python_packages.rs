//! The Python packages of the end-to-end tests, in a folder of their own: no system's Python is
//! changed, and none has to allow it.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

/// The folder, in cargo's target directory.
pub(crate) const FOLDER: &str = "python";
/// What pip installs.
const PACKAGES: [&str; 1] = ["qemu.qmp"];

/// Where the packages are, if they are.
pub(crate) fn find(workspace: &Workspace) -> Option<PathBuf> {
    Some(workspace.python_packages()).filter(|folder| folder.join("qemu/qmp").is_dir())
}

/// Fetches the packages.
pub(crate) fn install(workspace: &Workspace) -> Result<()> {
    let folder = workspace.python_packages();
    println!("pip install {}", PACKAGES.join(" "));
    let status = Command::new("python3")
        .args(["-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"])
        .arg(&folder)
        .args(PACKAGES)
        .status()
        .context("cannot run python3")?;
    ensure!(status.success(), "pip failed: {status} (is it there? Debian: python3-pip)");
    Ok(())
}
