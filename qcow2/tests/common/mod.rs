//! What the tests share: files, qemu-img as the oracle, a model of the disk.
#![allow(dead_code, missing_docs, unreachable_pub)]

pub mod recorder;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use brep_block::{BlockDevice, Memory, RawFile, RawFileOptions, WriteFlags, ZeroFlags};
use brep_qcow2::{CreateOptions, OpenOptions, Qcow2};
use bytes::Bytes;

pub struct Dir(pub tempfile::TempDir);

impl Dir {
    pub fn new() -> Self {
        Dir(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// The file, made if it does not exist, as what carries an image.
    pub fn file(&self, name: &str) -> Arc<dyn BlockDevice> {
        open_file(&self.path(name), false)
    }

    /// A raw disk with contents, as a backing device.
    pub fn raw(&self, name: &str, content: &[u8]) -> Arc<dyn BlockDevice> {
        std::fs::write(self.path(name), content).unwrap();
        RawFile::open(self.path(name), RawFileOptions::default()).unwrap()
    }

    /// Runs a program in this directory.
    pub fn run(&self, program: &str, args: &[&str]) -> (i32, String) {
        let output = Command::new(program).args(args).current_dir(self.0.path()).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        (output.status.code().unwrap_or(-1), String::from_utf8_lossy(&text).into_owned())
    }

    /// The same for one that must succeed; words are separated by blanks.
    pub fn qemu_img(&self, line: &str) -> String {
        let args: Vec<&str> = line.split(' ').collect();
        let (code, text) = self.run("qemu-img", &args);
        assert_eq!(code, 0, "qemu-img {line}: {text}");
        text
    }

    pub fn assert_clean(&self, name: &str) {
        let (code, text) = self.run("qemu-img", &["check", "-f", "qcow2", name]);
        assert_eq!(code, 0, "qemu-img check {name}: {text}");
    }

    /// qemu-img sees exactly these contents in the image.
    pub fn assert_content(&self, name: &str, content: &[u8]) {
        std::fs::write(self.path("expected.raw"), content).unwrap();
        let args = ["compare", "-f", "qcow2", "-F", "raw", name, "expected.raw"];
        let (code, text) = self.run("qemu-img", &args);
        assert_eq!(code, 0, "qemu-img compare {name}: {text}");
    }
}

pub fn open_file(path: &Path, read_only: bool) -> Arc<dyn BlockDevice> {
    let options = RawFileOptions {
        create: (!read_only).then_some(0),
        growable: true,
        read_only,
        ..RawFileOptions::default()
    };
    RawFile::open(path, options).unwrap()
}

/// A file in memory.
pub fn memory() -> Arc<dyn BlockDevice> {
    Memory::new_growable("file", 0)
}

pub async fn create(file: &Arc<dyn BlockDevice>, options: &CreateOptions) {
    Qcow2::create(file, options).await.unwrap();
}

pub async fn open(file: &Arc<dyn BlockDevice>) -> Arc<Qcow2> {
    open_with(file, OpenOptions::default()).await
}

pub async fn open_with(file: &Arc<dyn BlockDevice>, options: OpenOptions) -> Arc<Qcow2> {
    Qcow2::open(Arc::clone(file), options).await.unwrap()
}

pub fn over(backing: &Arc<dyn BlockDevice>) -> OpenOptions {
    OpenOptions { backing: Some(Arc::clone(backing)), ..OpenOptions::default() }
}

pub fn buffer_over(backing: &Arc<dyn BlockDevice>) -> OpenOptions {
    OpenOptions { ordered: false, ..over(backing) }
}

pub async fn read_all(disk: &dyn BlockDevice) -> Vec<u8> {
    let mut out = Vec::new();
    while (out.len() as u64) < disk.size() {
        let len = (disk.size() - out.len() as u64).min(1 << 20) as usize;
        out.extend_from_slice(&disk.read(out.len() as u64, len).await.unwrap());
    }
    out
}

/// Contents in which every 512 bytes differ.
pub fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    let mut out = Vec::with_capacity(len + 8);
    while out.len() < len {
        out.extend_from_slice(&rng.next().to_le_bytes());
    }
    out.truncate(len);
    out
}

/// A small generator of random numbers, so that a seed names a run for ever.
#[derive(Debug)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Rng(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 11) % n
    }
}

/// One random request.
#[derive(Debug, Clone)]
pub enum Op {
    Write { offset: u64, data: Bytes },
    Zero { offset: u64, len: u64, unmap: bool },
    Discard { offset: u64, len: u64 },
    Flush,
}

impl Op {
    /// Mostly small requests, some that span many clusters.
    pub fn random(rng: &mut Rng, size: u64) -> Op {
        let limit = match rng.below(10) {
            0..5 => 8 << 10,
            5..9 => 200 << 10,
            _ => 1 << 20,
        };
        let mut offset = rng.below(size);
        let mut len = 1 + rng.below(limit).min(size - offset - 1);
        if rng.below(2) == 0 {
            offset = offset / 4096 * 4096;
            len = len.next_multiple_of(4096).min(size - offset);
        }
        match rng.below(12) {
            0..8 => Op::Write { offset, data: pattern(rng.next(), len as usize).into() },
            8..10 => Op::Zero { offset, len, unmap: rng.below(2) == 0 },
            10 => Op::Discard { offset, len },
            _ => Op::Flush,
        }
    }

    pub fn range(&self) -> std::ops::Range<u64> {
        match self {
            Op::Write { offset, data } => *offset..offset + data.len() as u64,
            Op::Zero { offset, len, .. } | Op::Discard { offset, len } => *offset..offset + len,
            Op::Flush => 0..0,
        }
    }

    pub async fn apply(&self, disk: &dyn BlockDevice) -> brep_block::Result<()> {
        match self {
            Op::Write { offset, data } => {
                disk.write(*offset, data.clone(), WriteFlags::default()).await
            }
            Op::Zero { offset, len, unmap } => {
                let flags = ZeroFlags { may_unmap: *unmap, ..ZeroFlags::default() };
                disk.write_zeroes(*offset, *len, flags).await
            }
            Op::Discard { offset, len } => disk.discard(*offset, *len).await,
            Op::Flush => disk.flush(brep_block::FlushLevel::Durable).await,
        }
    }

    /// The same on a model. What is discarded reads as before or as zeroes: the model takes from
    /// the device which of the two it is, and fails if it is neither.
    pub async fn model(&self, model: &mut [u8], disk: &dyn BlockDevice) {
        match self {
            Op::Write { offset, data } => {
                model[*offset as usize..*offset as usize + data.len()].copy_from_slice(data);
            }
            Op::Zero { offset, len, .. } => {
                model[*offset as usize..(*offset + *len) as usize].fill(0);
            }
            Op::Discard { offset, len } => {
                let now = disk.read(*offset, *len as usize).await.unwrap();
                for (i, (old, new)) in
                    model[*offset as usize..].iter_mut().zip(now.iter()).enumerate()
                {
                    assert!(*new == *old || *new == 0, "discard: byte {i} is new");
                    *old = *new;
                }
            }
            Op::Flush => {}
        }
    }
}
