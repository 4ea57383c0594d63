//! The programs outside the workspace that the tests use, and where each comes from.

use std::path::PathBuf;

/// A program that tests call.
pub(crate) struct Program {
    pub(crate) name: &'static str,
    pub(crate) source: Source,
    /// Without a needed program a stage cannot run; without any other its tests are skipped.
    pub(crate) needed: bool,
}

/// How a program gets onto a machine.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// This Debian package.
    Debian(&'static str),
    /// This package from the backports of the Debian release.
    DebianBackports(&'static str),
    /// This command, which a person has to run.
    Command(&'static str),
}

/// What brings Debian packages.
pub(crate) const INSTALL: &str = "cargo xtask deps --install";
/// How to get `cargo nextest`, which no Debian package has.
pub(crate) const INSTALL_NEXTEST: &str = "cargo install --locked cargo-nextest";

pub(crate) const PROGRAMS: &[Program] = &[
    Program { name: "cargo-nextest", source: Source::Command(INSTALL_NEXTEST), needed: true },
    Program { name: "python3", source: Source::Debian("python3"), needed: true },
    // Its package manager, for the Python packages of the tests.
    Program { name: "pip3", source: Source::Debian("python3-pip"), needed: false },
    Program { name: "qemu-img", source: Source::Debian("qemu-utils"), needed: true },
    Program { name: "qemu-io", source: Source::Debian("qemu-utils"), needed: true },
    Program { name: "qemu-nbd", source: Source::Debian("qemu-utils"), needed: true },
    Program { name: "nbdcopy", source: Source::Debian("libnbd-bin"), needed: false },
    Program { name: "nbdinfo", source: Source::Debian("libnbd-bin"), needed: false },
    Program { name: "nbdkit", source: Source::Debian("nbdkit"), needed: false },
    Program { name: "fio", source: Source::Debian("fio"), needed: false },
    Program { name: "mkfs.ext4", source: Source::Debian("e2fsprogs"), needed: false },
    Program { name: "debugfs", source: Source::Debian("e2fsprogs"), needed: false },
    Program { name: "e2fsck", source: Source::Debian("e2fsprogs"), needed: false },
    Program {
        name: "qemu-system-x86_64",
        source: Source::DebianBackports("qemu-system-x86"),
        needed: false,
    },
];

/// Where a program lies, if it is in the search path.
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let mut folders: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect())?;
    // File system tools lie where an ordinary user's search path does not reach.
    folders.extend(["/usr/sbin".into(), "/sbin".into()]);
    folders.into_iter().map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// The needed programs among `names` that are missing.
pub(crate) fn missing_needed(names: &[&str]) -> Vec<&'static Program> {
    PROGRAMS
        .iter()
        .filter(|program| program.needed && names.contains(&program.name))
        .filter(|program| find(program.name).is_none())
        .collect()
}

impl Program {
    /// The command that brings the program.
    pub(crate) fn remedy(&self) -> String {
        match self.source {
            Source::Debian(_) | Source::DebianBackports(_) => INSTALL.to_owned(),
            Source::Command(command) => command.to_owned(),
        }
    }
}
