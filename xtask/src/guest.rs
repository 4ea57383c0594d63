//! The Linux guest of the end-to-end tests: a Debian kernel, its disk driver, and busybox.
//!
//! The packages are downloaded and unpacked, not installed. The guest's folder holds `vmlinuz`,
//! `busybox`, and in `modules` what has to be loaded, in the order of the names. A test makes its
//! own initramfs of these.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::workspace::Workspace;

const KERNEL: &str = "linux-image-cloud-amd64";
const SHELL: &str = "busybox-static";
/// What a disk on virtio with ext4 on it needs, where the kernel does not have it built in.
const MODULES: [&str; 3] = ["virtio_pci", "virtio_blk", "ext4"];

/// Whether the guest was prepared.
pub(crate) fn is_there(workspace: &Workspace) -> bool {
    workspace.guest().is_dir()
}

/// Downloads and unpacks the guest; the lists of packages have to be up to date.
pub(crate) fn prepare(workspace: &Workspace) -> Result<()> {
    let guest = workspace.guest();
    let work = guest.with_extension("new");
    if work.exists() {
        fs::remove_dir_all(&work)?;
    }
    let unpacked = work.join("unpacked");
    fs::create_dir_all(&unpacked)?;
    for package in [kernel_package()?, SHELL.to_owned()] {
        println!("unpacking {package}");
        unpack(&package, &work, &unpacked)?;
    }
    fs::copy(unpacked.join("bin/busybox"), work.join("busybox"))?;
    fs::copy(find(&unpacked.join("boot"), "vmlinuz-")?, work.join("vmlinuz"))?;
    take_modules(&unpacked, &work.join("modules"))?;
    fs::remove_dir_all(&unpacked)?;
    // It has its name only once it is complete.
    fs::rename(&work, &guest).with_context(|| format!("cannot make {}", guest.display()))
}

/// The package that the kernel's name without a version stands for.
fn kernel_package() -> Result<String> {
    let said = output(Command::new("apt-cache").args(["depends", "--important", KERNEL]))?;
    said.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: linux-image-"))
        .map(|version| format!("linux-image-{version}"))
        .with_context(|| format!("apt-cache names no package for {KERNEL}"))
}

fn unpack(package: &str, work: &Path, into: &Path) -> Result<()> {
    output(Command::new("apt-get").args(["download", package]).current_dir(work))?;
    let archive = find(work, &format!("{package}_"))?;
    output(Command::new("dpkg-deb").arg("--extract").args([&archive, into]))?;
    fs::remove_file(&archive)?;
    Ok(())
}

fn find(folder: &Path, start: &str) -> Result<PathBuf> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot read {}", folder.display()))?;
    entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(start))
        .map(|entry| entry.path())
        .with_context(|| format!("{} holds no {start}*", folder.display()))
}

fn take_modules(unpacked: &Path, to: &Path) -> Result<()> {
    // The folder has moved below /usr in newer packages.
    let modules = ["lib/modules", "usr/lib/modules"]
        .iter()
        .map(|folder| unpacked.join(folder))
        .find(|folder| folder.is_dir())
        .context("the kernel's package holds no modules")?;
    let mut files = Vec::new();
    walk(&modules, &mut files)?;
    let mut order = Vec::new();
    for name in MODULES {
        load_after_its_needs(name, &files, &mut order)?;
    }
    fs::create_dir(to)?;
    for (number, (name, data)) in order.iter().enumerate() {
        fs::write(to.join(format!("{number:02}-{name}.ko")), data)?;
    }
    Ok(())
}

fn walk(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            walk(&entry.path(), files)?;
        } else {
            files.push(entry.path());
        }
    }
    Ok(())
}

/// Appends a module behind those that it names as its needs. What has no file is built in.
fn load_after_its_needs(
    name: &str,
    files: &[PathBuf],
    order: &mut Vec<(String, Vec<u8>)>,
) -> Result<()> {
    let is_it = |file: &&PathBuf| {
        let own = file.file_name().and_then(|own| own.to_str()).unwrap_or_default();
        own.replace('-', "_").strip_prefix(name).is_some_and(|rest| rest.starts_with(".ko"))
    };
    let Some(file) = files.iter().find(is_it) else { return Ok(()) };
    if order.iter().any(|(loaded, _)| loaded == name) {
        return Ok(());
    }
    let data = plain(file)?;
    for need in needs(&data) {
        load_after_its_needs(&need, files, order)?;
    }
    order.push((name.to_owned(), data));
    Ok(())
}

/// A module's bytes, decompressed.
fn plain(file: &Path) -> Result<Vec<u8>> {
    if file.extension().is_some_and(|extension| extension == "xz") {
        let done = Command::new("xz").args(["--decompress", "--stdout"]).arg(file).output();
        let done = done.context("cannot run xz")?;
        ensure!(done.status.success(), "xz cannot unpack {}", file.display());
        return Ok(done.stdout);
    }
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

/// What a module says of itself: a string `depends=a,b`.
fn needs(module: &[u8]) -> Vec<String> {
    let text = module.split(|byte| *byte == 0).find_map(|text| text.strip_prefix(b"depends="));
    let names = String::from_utf8_lossy(text.unwrap_or_default()).replace('-', "_");
    names.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let done = command.output().with_context(|| format!("cannot run {name}"))?;
    let errors = String::from_utf8_lossy(&done.stderr);
    ensure!(done.status.success(), "{name} failed: {}", errors.trim());
    Ok(String::from_utf8_lossy(&done.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        let module = b"\x7fELF\0license=GPL\0depends=virtio_ring,virtio-pci\0name=x\0";
        assert_eq!(needs(module), ["virtio_ring", "virtio_pci"]);
        assert!(needs(b"license=GPL\0depends=\0").is_empty());
    }

    #[test]
    fn modules_are_loaded_behind_their_needs_and_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut files = Vec::new();
        for (file, depends) in
            [("virtio_blk.ko", "virtio-ring"), ("virtio-ring.ko", ""), ("ext4.ko", "virtio-ring")]
        {
            let path = folder.path().join(file);
            fs::write(&path, format!("x\0depends={depends}\0")).expect("a file");
            files.push(path);
        }
        let mut order = Vec::new();
        for name in ["virtio_blk", "built_in", "ext4"] {
            load_after_its_needs(name, &files, &mut order).expect("files that can be read");
        }
        let names: Vec<_> = order.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["virtio_ring", "virtio_blk", "ext4"]);
    }
}
