//! Where the workspace and what cargo builds of it lie.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::python_packages;

/// The workspace's folders.
pub(crate) struct Workspace {
    /// The folder of the workspace's `Cargo.toml`.
    pub(crate) root: PathBuf,
    /// Where cargo puts what it builds.
    pub(crate) target: PathBuf,
}

impl Workspace {
    /// Asks cargo, which knows every way in which a target directory can be set.
    pub(crate) fn find() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
        let output = cargo()
            .args(["metadata", "--no-deps", "--format-version=1", "--manifest-path"])
            .arg(&manifest)
            .output()
            .context("cannot run cargo metadata")?;
        ensure!(
            output.status.success(),
            "cargo metadata failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let folder = |key: &str| {
            metadata[key]
                .as_str()
                .map(PathBuf::from)
                .with_context(|| format!("cargo metadata names no {key}"))
        };
        Ok(Self { root: folder("workspace_root")?, target: folder("target_directory")? })
    }

    /// The `brep` binary of the dev profile.
    pub(crate) fn brep(&self) -> PathBuf {
        self.target.join("debug/brep")
    }

    /// Where nextest's JUnit report lies (see `.config/nextest.toml`): in the workspace, wherever
    /// cargo's target directory is.
    pub(crate) fn junit(&self) -> PathBuf {
        self.root.join("target/nextest").join(nextest_profile()).join("junit.xml")
    }

    /// The numbered end-to-end tests.
    pub(crate) fn iotests(&self) -> PathBuf {
        self.root.join("xtask/iotests")
    }

    /// The Linux guest of the end-to-end tests.
    pub(crate) fn guest(&self) -> PathBuf {
        self.target.join("guest")
    }

    /// The Python packages of the end-to-end tests.
    pub(crate) fn python_packages(&self) -> PathBuf {
        self.guest().with_file_name(python_packages::FOLDER)
    }

    /// A cargo command in the workspace.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = cargo();
        command.current_dir(&self.root);
        command
    }
}

fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// Whether `BREP_LONG=1` asks for the long forms of the tests that have one.
pub(crate) fn is_long() -> bool {
    std::env::var_os("BREP_LONG").is_some_and(|value| value == "1")
}

/// The profile of the unit tests' runner.
pub(crate) fn nextest_profile() -> &'static str {
    if is_long() { "long" } else { "default" }
}
