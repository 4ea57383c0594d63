use std::ffi::OsString;
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::fs::FlockOperation;

use super::{PlainFile, Storage};
use crate::{BlockDevice, RawFile, RawFileOptions, Result};

/// What `statfs` calls file systems that lie on other machines, or may: NFS, SMB (three numbers),
/// Ceph, 9P, AFS (two), Lustre, FUSE, VirtualBox.
const REMOTE: [u64; 11] = [
    0x6969,
    0x517b,
    0xff53_4d42,
    0xfe53_4d42,
    0x00c3_6400,
    0x0102_1997,
    0x5346_414f,
    0x6b41_4653,
    0x0bd0_0bd0,
    0x6573_5546,
    0x786f_4256,
];

/// The file system of this machine.
#[derive(Debug, Clone, Copy)]
pub struct FileSystem;

impl Storage for FileSystem {
    fn open_disk(&self, path: &Path, options: RawFileOptions) -> Result<Arc<dyn BlockDevice>> {
        Ok(RawFile::open(path, options)?)
    }

    fn open_file(&self, path: &Path) -> io::Result<Arc<dyn PlainFile>> {
        let is_new = !path.exists();
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path)?;
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        if is_new {
            sync_parent(path)?;
        }
        Ok(Arc::new(file))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let missing: Vec<_> = path.ancestors().take_while(|dir| !dir.exists()).collect();
        DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        fs::set_permissions(path, Permissions::from_mode(0o700))?;
        missing.iter().try_for_each(|dir| sync_parent(dir))
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        let names: io::Result<Vec<_>> =
            fs::read_dir(directory)?.map(|entry| Ok(entry?.file_name())).collect();
        let mut names = names?;
        names.sort_unstable();
        Ok(names)
    }

    fn exists(&self, path: &Path) -> bool {
        path.exists()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn boot_id(&self, path: &Path) -> Option<String> {
        let is_remote = |f: rustix::fs::StatFs| REMOTE.contains(&(f.f_type as u64));
        if rustix::fs::statfs(path).is_ok_and(is_remote) {
            return None;
        }
        let id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        Some(id.trim().to_owned())
    }
}

/// Puts the name of a file or directory on stable storage.
fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = path.parent().filter(|parent| *parent != Path::new(""));
    File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
}

impl PlainFile for File {
    fn len(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        FileExt::read_exact_at(self, buffer, offset)
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        FileExt::write_all_at(self, data, offset)
    }

    fn sync_data(&self) -> io::Result<()> {
        File::sync_data(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_open_is_not_opened_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let file = FileSystem.open_file(&path).unwrap();
        file.write_all_at(b"here", 2).unwrap();
        let again = FileSystem.open_file(&path).unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::WouldBlock);
        drop(file);
        let file = FileSystem.open_file(&path).unwrap();
        assert_eq!(file.len().unwrap(), 6);
    }

    #[test]
    fn a_directory_of_this_machine_tells_its_boot() {
        let dir = tempfile::tempdir().unwrap();
        let id = FileSystem.boot_id(dir.path()).unwrap();
        assert_eq!(id.len(), 36, "{id}");
        assert_eq!(FileSystem.boot_id(&dir.path().join("missing")), Some(id));
    }

    #[test]
    fn a_directory_is_made_with_those_above_it_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b/c");
        for _ in 0..2 {
            FileSystem.create_dir(&inner).unwrap();
            let mode = fs::metadata(&inner).unwrap().permissions().mode();
            assert_eq!(mode & 0o777, 0o700);
        }
        fs::write(dir.path().join("file"), b"").unwrap();
        let error = FileSystem.create_dir(&dir.path().join("file/d")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NotADirectory);
        sync_parent(Path::new("relative")).unwrap();
    }

    #[test]
    fn what_lies_in_a_directory_is_listed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        FileSystem.create_dir(&inner).unwrap();
        for name in ["z", "m", "a"] {
            FileSystem.open_file(&inner.join(name)).unwrap();
        }
        FileSystem.rename(&inner.join("z"), &inner.join("b")).unwrap();
        FileSystem.remove(&inner.join("m")).unwrap();
        assert_eq!(FileSystem.list(&inner).unwrap(), ["a", "b"]);
    }
}
