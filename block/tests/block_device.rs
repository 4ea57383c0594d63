//! Block special files, by loop devices. Skipped where those are not to be had.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use brep_block::conformance::{self, Options};
use brep_block::{
    BlockDevice, CacheMode, ErrorKind, RawFile, RawFileOptions, WriteFlags, ZeroFlags,
};
use tempfile::TempDir;

struct Loops {
    dir: TempDir,
    made: Cell<u32>,
    cache: CacheMode,
}

/// A loop device; it goes away when the last one that has it open closes it.
struct Loop(PathBuf);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

fn losetup(file: &Path) -> Result<Loop, String> {
    let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
    let output = output.map_err(|error| format!("losetup: {error}"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    Ok(Loop(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim())))
}

impl Loops {
    fn new(cache: CacheMode) -> Self {
        Loops { dir: tempfile::tempdir().unwrap(), made: Cell::new(0), cache }
    }

    fn backing(&self, size: u64) -> PathBuf {
        self.made.set(self.made.get() + 1);
        let path = self.dir.path().join(format!("backing{}", self.made.get()));
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        path
    }

    fn open(&self, device: &Loop) -> brep_block::Result<Arc<RawFile>> {
        let options = RawFileOptions { cache: self.cache, ..RawFileOptions::default() };
        RawFile::open(&device.0, options)
    }

    fn make(&self, size: u64) -> Arc<RawFile> {
        let device = losetup(&self.backing(size)).unwrap();
        self.open(&device).unwrap()
    }
}

fn loops_are_missing(test: &str) -> bool {
    let loops = Loops::new(CacheMode::Writeback);
    let missing = losetup(&loops.backing(4096))
        .and_then(|device| loops.open(&device).map_err(|error| error.to_string()).map(drop));
    missing.is_err_and(|why| {
        eprintln!("SKIP: {test}: no loop devices: {why}");
        true
    })
}

#[tokio::test]
async fn a_block_device_obeys_the_rules() {
    if loops_are_missing("a_block_device_obeys_the_rules") {
        return;
    }
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let loops = Loops::new(cache);
        let make = async |size| loops.make(size);
        let options = Options::default().size_unit(512).operations(200);
        conformance::run(make, options).await.unwrap();
    }
}

#[tokio::test]
async fn a_block_device_in_use_is_refused() {
    if loops_are_missing("a_block_device_in_use_is_refused") {
        return;
    }
    let loops = Loops::new(CacheMode::Writeback);
    let device = losetup(&loops.backing(1 << 20)).unwrap();
    let _first = loops.open(&device).unwrap();
    let error = loops.open(&device).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Locked);
    assert!(error.to_string().contains(device.0.to_str().unwrap()), "{error}");
}

#[tokio::test]
async fn a_block_device_can_give_space_back_but_not_change_its_size() {
    use std::os::unix::fs::MetadataExt;
    if loops_are_missing("a_block_device_can_give_space_back_but_not_change_its_size") {
        return;
    }
    let loops = Loops::new(CacheMode::Writeback);
    let path = loops.backing(4 << 20);
    let device = loops.open(&losetup(&path).unwrap()).unwrap();
    assert_eq!(device.truncate(1 << 20).await.unwrap_err().kind(), ErrorKind::Unsupported);
    if !device.limits().can_discard {
        eprintln!("SKIP: a_block_device_can_give_space_back_but_not_change_its_size: no discard");
        return;
    }
    let data = bytes::Bytes::from(vec![3; 4 << 20]);
    device.write(0, data, WriteFlags { fua: true }).await.unwrap();
    let full = std::fs::metadata(&path).unwrap().blocks();
    device.discard(100, 2 << 20).await.unwrap();
    let unmap = ZeroFlags { may_unmap: true, fua: true, fast: true };
    device.write_zeroes(2 << 20, 1 << 20, unmap).await.unwrap();
    let left = std::fs::metadata(&path).unwrap().blocks();
    assert!(left <= full / 4 + 64, "{left} of {full} sectors are left");
    assert_eq!(device.read(0, 100).await.unwrap(), [3; 100][..], "it discarded too much");
    assert_eq!(device.read((2 << 20) + 100, 1).await.unwrap(), [0][..]);
}
