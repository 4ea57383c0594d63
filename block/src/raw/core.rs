//! What the operations of a file share, and the operations that go through the page cache.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;

use super::data_runs::DataRuns;
use super::direct::Direct;
use super::engine;
use super::flush::Flusher;
use super::pace::Pace;
use super::sys;
use crate::Buffer;
use crate::{Error, ErrorKind, Limits, Operation, Result};

/// A file's state, shared by the device and by the operations that outlive their callers.
#[derive(Debug)]
pub(super) struct Core {
    pub(super) name: String,
    pub(super) file: File,
    pub(super) limits: Limits,
    /// The logical block size in bytes, if this is a block special file.
    pub(super) block_device: Option<u64>,
    /// Set if the page cache is bypassed.
    pub(super) direct: Option<Direct>,
    pub(super) flusher: Flusher,
    size: AtomicU64,
    /// Held while the file's length and `size` change together.
    resize: Mutex<()>,
    /// The file can tell what a read would have to wait for.
    can_nowait: AtomicBool,
    /// The file system keeps the file in memory: nothing that is read is waited for.
    in_memory: bool,
    pub(super) can_zero_range: AtomicBool,
    pub(super) data_runs: DataRuns,
    /// Of writes into the page cache.
    pub(super) pace: Pace,
}

impl Core {
    pub(super) fn new(
        name: String,
        file: File,
        limits: Limits,
        size: u64,
        block_device: Option<u64>,
        direct: Option<Direct>,
    ) -> Self {
        let in_memory = sys::is_in_memory(&file);
        Core {
            name,
            file,
            limits,
            block_device,
            direct,
            flusher: Flusher::default(),
            size: AtomicU64::new(size),
            resize: Mutex::new(()),
            can_nowait: AtomicBool::new(true),
            in_memory,
            can_zero_range: AtomicBool::new(true),
            data_runs: DataRuns::default(),
            pace: Pace::new(Instant::now()),
        }
    }

    pub(super) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(super) fn error(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        error: &io::Error,
    ) -> Error {
        Error::from_os(operation, &self.name, error).at(offset, len)
    }

    /// Does what makes the file longer; its new length is at least `end` if it succeeds, and the
    /// old one if it fails.
    pub(super) fn grow(&self, end: u64, work: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let _guard = self.resize.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = work() {
            self.undo_growth();
            return Err(error);
        }
        self.size.fetch_max(end, Ordering::AcqRel);
        Ok(())
    }

    /// Carries out a write that ends at `end`. The file is longer afterwards only if it may grow.
    pub(super) fn write_to(
        &self,
        end: u64,
        work: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if end > self.size() && self.limits.growable {
            return self.grow(end, work);
        }
        let result = work();
        self.undo_overrun(end);
        result
    }

    /// A write that was within the file when it was admitted may have been overtaken by a
    /// truncation: then it is as if it had come first.
    fn undo_overrun(&self, end: u64) {
        if end > self.size() {
            let _guard = self.resize.lock().unwrap_or_else(PoisonError::into_inner);
            self.undo_growth();
        }
    }

    /// What a write has left beyond the end would turn up as content once the file grows over it.
    fn undo_growth(&self) {
        let size = self.size();
        self.data_runs.forget(size, u64::MAX);
        let longer = self.file.metadata().is_ok_and(|metadata| metadata.len() > size);
        if longer && let Err(error) = rustix::fs::ftruncate(&self.file, size) {
            tracing::error!(
                disk = self.name, %error,
                "the file stays longer than the disk: what was written beyond its end cannot be cut off"
            );
        }
    }

    /// Changes the length of the file.
    pub(super) fn truncate(&self, size: u64) -> Result<()> {
        let _guard = self.resize.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.size();
        // Whoever writes looks at the size afterwards: a write that this does not cut off has to
        // see the new one.
        self.size.fetch_min(size, Ordering::AcqRel);
        if let Err(error) = rustix::fs::ftruncate(&self.file, size) {
            self.size.store(before, Ordering::Release);
            return Err(self.error(Operation::Truncate, size, 0, &error.into()));
        }
        self.data_runs.forget(size, u64::MAX);
        self.size.store(size, Ordering::Release);
        Ok(())
    }

    /// Extends the file to `end`, if it is shorter, without allocating space.
    pub(super) fn extend(&self, end: u64) -> io::Result<()> {
        if end <= self.size() || !self.limits.growable {
            return Ok(());
        }
        self.grow(end, || {
            // Another write may have made it longer since.
            if end > self.size() {
                rustix::fs::ftruncate(&self.file, end)?;
            }
            Ok(())
        })
    }

    /// The part of a read that the page cache holds.
    pub(super) fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> usize {
        if self.in_memory {
            // An error is met again by the read that follows.
            return engine::read_full(&self.file, offset, buffer, 1).unwrap_or(0);
        }
        if !self.can_nowait.load(Ordering::Relaxed) {
            return 0;
        }
        engine::read_cached(&self.file, offset, buffer).unwrap_or_else(|| {
            self.can_nowait.store(false, Ordering::Relaxed);
            0
        })
    }

    /// The rest of a read of which `done` bytes are in the buffer already.
    pub(super) fn read_rest(&self, offset: u64, mut buffer: Buffer, done: usize) -> Result<Bytes> {
        let len = buffer.len();
        let read = engine::read_full(&self.file, offset + done as u64, &mut buffer[done..], 1)
            .map_err(|error| self.error(Operation::Read, offset, len as u64, &error))?;
        if done + read < len {
            return Err(self.ended_early(offset, len as u64, offset + (done + read) as u64));
        }
        Ok(buffer.freeze())
    }

    pub(super) fn ended_early(&self, offset: u64, len: u64, end: u64) -> Error {
        let detail = format!("the file ends at {end}: something else has truncated it");
        Error::new(Operation::Read, ErrorKind::Io, &self.name, detail).at(offset, len)
    }

    /// A write into the page cache.
    pub(super) fn write_cached(&self, offset: u64, data: &[u8]) -> Result<()> {
        let end = offset + data.len() as u64;
        let started = Instant::now();
        let write = || engine::write_full(&self.file, offset, data, 1, false);
        let result = self.write_to(end, write);
        self.pace.note(started, Instant::now());
        result.map_err(|e| self.error(Operation::Write, offset, data.len() as u64, &e))
    }

    /// A write through the page cache onto stable storage.
    pub(super) fn write_durable(&self, offset: u64, data: &[u8]) -> Result<()> {
        self.flusher.check(self, Operation::Write)?;
        let len = data.len() as u64;
        let write = |durable| {
            let result = engine::write_full(&self.file, offset, data, 1, durable);
            self.undo_overrun(offset + len);
            result
        };
        let Err(error) = write(true) else { return Ok(()) };
        // Either the write was refused, which is this request's affair alone; or writing back
        // failed, which the kernel reports once, for whatever was dirty: then no later flush may
        // succeed. A plain write tells them apart.
        if write(false).is_ok() {
            self.flusher.fail(&self.name, &error);
        }
        Err(self.error(Operation::Write, offset, len, &error))
    }

    /// Everything that completed before this call is on stable storage afterwards.
    pub(super) async fn flush(self: &Arc<Self>, operation: Operation) -> Result<()> {
        Flusher::flush(self, operation).await
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_a_failed_growth_has_written_is_taken_back() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 1000], 0).unwrap();
        let limits = Limits { growable: true, ..Limits::default() };
        let core = Core::new("disk".into(), file, limits, 1000, None, None);
        let error = core.grow(9000, || {
            core.file.write_all_at(&[2; 500], 1000)?;
            Err(io::ErrorKind::StorageFull.into())
        });
        assert!(error.is_err());
        assert_eq!((core.size(), core.file.metadata().unwrap().len()), (1000, 1000));
        core.extend(2000).unwrap();
        let found = core.read_rest(0, Buffer::new(2000), 0).unwrap();
        assert_eq!((&found[..1000], &found[1000..]), (&[1; 1000][..], &[0; 1000][..]));
    }
    #[test]
    fn a_write_that_a_truncation_overtakes_makes_the_file_no_longer() {
        for growable in [false, true] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(2000).unwrap();
            let limits = Limits { growable, ..Limits::default() };
            let core = Core::new("disk".into(), file, limits, 2000, None, None);
            core.write_to(2000, || {
                core.truncate(1000).unwrap();
                core.file.write_all_at(&[1; 1000], 1000)
            })
            .unwrap();
            assert_eq!((core.size(), core.file.metadata().unwrap().len()), (1000, 1000));
            core.truncate(2000).unwrap();
            assert_eq!(core.read_rest(0, Buffer::new(2000), 0).unwrap(), vec![0; 2000]);
        }
    }

    #[test]
    fn truncations_and_writes_of_several_threads_leave_a_file_of_the_right_length() {
        let file = tempfile::tempfile().unwrap();
        let core = Core::new("disk".into(), file, Limits::default(), 0, None, None);
        for round in 0..200 {
            core.truncate(2000).unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| (0..10).for_each(|_| core.write_cached(1000, &[1; 1000]).unwrap()));
                scope.spawn(|| core.write_durable(1500, &[2; 500]).unwrap());
                core.truncate(1000).unwrap();
            });
            let len = core.file.metadata().unwrap().len();
            assert_eq!((core.size(), len), (1000, 1000), "round {round}");
        }
    }
}
