//! The disk of the demo: a FAT file system with real files, and an area for a random load.
use std::collections::BTreeMap;
use std::io::{Cursor, Read, Write};

use anyhow::Context;
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use sha2::{Digest, Sha256};

/// Size of the disk, and of the file system at its start, in bytes.
pub(super) const DISK_LEN: usize = 64 << 20;
pub(super) const FILES_LEN: usize = 32 << 20;

const FILES: usize = 24;

/// Repeatable numbers, as good as random for filling disks.
#[derive(Debug, Clone)]
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Random(seed | 1)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub(super) fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len.next_multiple_of(8)];
        for word in bytes.chunks_exact_mut(8) {
            word.copy_from_slice(&self.next().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }
}

/// A new disk with files in it.
pub(super) fn make() -> anyhow::Result<Vec<u8>> {
    let mut disk = vec![0; DISK_LEN];
    let mut random = Random::new(1);
    let files = files_area(&mut disk)?;
    fatfs::format_volume(
        Cursor::new(&mut *files),
        FormatVolumeOptions::new().volume_label(*b"BREP DEMO  "),
    )
    .context("cannot make a file system")?;
    edit(files, |root| {
        root.write("readme.txt", b"The files of the brep demo.\r\n")?;
        root.create_dir("photos")?;
        for number in 0..FILES {
            let len = 50_000 + random.next() as usize % 300_000;
            root.write(&format!("photos/{number:02}.jpg"), &random.bytes(len))?;
        }
        Ok(())
    })?;
    let load = disk.get_mut(FILES_LEN..).context("the disk is too short")?;
    load.copy_from_slice(&random.bytes(DISK_LEN - FILES_LEN));
    Ok(disk)
}

/// The part of the disk that holds the file system.
pub(super) fn files_area(disk: &mut [u8]) -> anyhow::Result<&mut [u8]> {
    disk.get_mut(..FILES_LEN).context("the disk is too short for its files")
}

/// The root directory of the file system.
pub(super) struct Root<'a, 'd>(fatfs::Dir<'a, Cursor<&'d mut [u8]>>);

impl Root<'_, '_> {
    /// Makes a file, or replaces its contents.
    pub(super) fn write(&self, path: &str, contents: &[u8]) -> anyhow::Result<()> {
        let mut file = self.0.create_file(path).with_context(|| format!("file {path}"))?;
        file.truncate()?;
        file.write_all(contents)?;
        Ok(file.flush()?)
    }

    fn create_dir(&self, path: &str) -> anyhow::Result<()> {
        self.0.create_dir(path).map(drop).with_context(|| format!("directory {path}"))
    }

    pub(super) fn remove(&self, path: &str) -> anyhow::Result<()> {
        self.0.remove(path).with_context(|| format!("file {path}"))
    }
}

/// Changes files, as a guest would.
pub(super) fn edit(
    files: &mut [u8],
    change: impl FnOnce(&Root<'_, '_>) -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let system = FileSystem::new(Cursor::new(files), FsOptions::new())
        .context("cannot open the file system")?;
    change(&Root(system.root_dir()))?;
    system.unmount().context("cannot write the file system")
}

/// Path, length and SHA-256 of every file, in the order of their paths.
pub(super) fn list(disk: &[u8]) -> anyhow::Result<BTreeMap<String, (u64, [u8; 32])>> {
    // The file system wants to be able to write, if only access times.
    let mut files = disk.get(..FILES_LEN).context("the disk is too short for its files")?.to_vec();
    let system = FileSystem::new(Cursor::new(&mut files[..]), FsOptions::new())
        .context("cannot open the file system")?;
    let mut found = BTreeMap::new();
    let mut directories = vec![(String::new(), system.root_dir())];
    while let Some((path, directory)) = directories.pop() {
        for entry in directory.iter() {
            let entry = entry.context("cannot read a directory")?;
            let name = entry.file_name();
            if entry.is_dir() && name != "." && name != ".." {
                directories.push((format!("{path}{name}/"), entry.to_dir()));
            } else if entry.is_file() {
                let mut contents = Vec::new();
                entry.to_file().read_to_end(&mut contents)?;
                let hash = Sha256::digest(&contents).into();
                found.insert(format!("{path}{name}"), (entry.len(), hash));
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_were_written_are_listed_with_their_contents() {
        let mut disk = make().unwrap();
        let before = list(&disk).unwrap();
        assert_eq!(before.len(), FILES + 1);
        edit(files_area(&mut disk).unwrap(), |root| {
            root.write("new.txt", b"abc")?;
            root.write("photos/03.jpg", b"overwritten")?;
            root.remove("photos/04.jpg")
        })
        .unwrap();
        let after = list(&disk).unwrap();
        assert_eq!(after["new.txt"], (3, Sha256::digest(b"abc").into()));
        assert_ne!(after["photos/03.jpg"], before["photos/03.jpg"]);
        assert_eq!(after["photos/05.jpg"], before["photos/05.jpg"]);
        assert_eq!(after.len(), before.len());
    }
}
