//! Files and block special files.

mod core;
mod data_runs;
mod direct;
mod engine;
mod flush;
mod open;
mod pace;
mod space;
mod sys;

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use self::core::Core;
pub use self::open::{CacheMode, RawFileOptions};
use crate::Buffer;
use crate::device::{check_request, check_request_write};
use crate::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, Operation, Result, WriteFlags, ZeroFlags,
};

/// A file, or a block special file, whose bytes are the disk's bytes.
///
/// * The file is locked for this open file description (`F_OFD_SETLK`), on the descriptor that
///   does the I/O: one writer, or any number of readers. Closing the device releases it.
/// * With [`CacheMode::Writeback`] reads of cached pages and writes finish inline. What may wait
///   for the disk goes to tokio's blocking threads, reads to an io_uring of the current-thread
///   runtime if there is one: polling such an operation outside a tokio runtime, or in a
///   current-thread runtime whose I/O is not enabled, panics.
/// * A write is complete when it is in the page cache (or, with [`CacheMode::None`], with the
///   disk): a flush at [`FlushLevel::Process`] has nothing left to do. One at
///   [`FlushLevel::Durable`] is an `fdatasync`, which concurrent flushes share. After the first
///   failure every flush, and everything with `fua`, fails with
///   [`ErrorKind::Sticky`](crate::ErrorKind::Sticky).
/// * Space that is allocated but was never written counts as a hole in
///   [`block_status`](BlockDevice::block_status), as file systems have it.
#[derive(Debug)]
pub struct RawFile {
    core: Arc<Core>,
}

impl RawFile {
    /// Opens a file. This waits for the file system; it takes no runtime.
    ///
    /// # Errors
    /// Every error names the path and what to do. [`ErrorKind::Locked`] if somebody else has the
    /// file open in a way that conflicts, [`ErrorKind::InvalidInput`] for a directory, something
    /// else that is no disk or a file that exists against `create_new`, [`ErrorKind::ReadOnly`]
    /// on a read-only file system, [`ErrorKind::Unsupported`] where direct I/O or locks are not
    /// to be had, else [`ErrorKind::Io`].
    ///
    /// [`ErrorKind::Locked`]: crate::ErrorKind::Locked
    /// [`ErrorKind::InvalidInput`]: crate::ErrorKind::InvalidInput
    /// [`ErrorKind::ReadOnly`]: crate::ErrorKind::ReadOnly
    /// [`ErrorKind::Unsupported`]: crate::ErrorKind::Unsupported
    /// [`ErrorKind::Io`]: crate::ErrorKind::Io
    pub fn open(path: impl AsRef<Path>, options: RawFileOptions) -> Result<Arc<Self>> {
        open::open(path.as_ref(), options)
    }

    fn new(core: Core) -> Self {
        RawFile { core: Arc::new(core) }
    }

    fn core(&self) -> Arc<Core> {
        Arc::clone(&self.core)
    }

    fn admit(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        let core = &self.core;
        check_request(&core.name, core.size(), &core.limits, operation, offset, len)
    }

    fn admit_write(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        let core = &self.core;
        check_request_write(&core.name, core.size(), &core.limits, operation, offset, len)
    }
}

/// Reads what the page cache did not have, from index `done` of the buffer on.
async fn read_rest(core: Arc<Core>, offset: u64, buffer: Buffer, done: usize) -> Result<Bytes> {
    let len = buffer.len();
    let start = offset + done as u64;
    let (buffer, done) = engine::read_by_ring(&core, start, buffer, done).await?;
    if done == len {
        return Ok(buffer.freeze());
    }
    engine::run(&core, Operation::Read, move |core| core.read_rest(offset, buffer, done)).await
}

/// A longer request through the page cache is carried out by another thread: this one has other
/// requests to see to meanwhile. To hand a shorter one over costs more than it gains: another
/// processor has none of its data at hand.
const INLINE_BYTES_MAX: usize = 1 << 20;

impl BlockDevice for RawFile {
    fn name(&self) -> &str {
        &self.core.name
    }

    fn size(&self) -> u64 {
        self.core.size()
    }

    fn limits(&self) -> Limits {
        self.core.limits
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        if let Err(error) = self.admit(Operation::Read, offset, len as u64) {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(Bytes::new());
        }
        if self.core.direct.is_some() {
            return Io::future(direct::read(self.core(), offset, len));
        }
        let mut buffer = Buffer::new(len);
        let done = match len <= INLINE_BYTES_MAX {
            true => self.core.read_cached(offset, &mut buffer),
            false => 0,
        };
        if done == len {
            return Io::ok(buffer.freeze());
        }
        Io::future(read_rest(self.core(), offset, buffer, done))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        if let Err(error) = self.admit_write(Operation::Write, offset, data.len() as u64) {
            return Io::err(error);
        }
        if data.is_empty() {
            return Io::ok(());
        }
        let core = self.core();
        if core.direct.is_some() {
            return Io::future(direct::write(core, offset, data, flags.fua));
        }
        if !flags.fua {
            let is_quick = data.len() <= INLINE_BYTES_MAX && !core.pace.is_slow(Instant::now);
            if is_quick || offset + data.len() as u64 > core.size() {
                return self.core.write_cached(offset, &data).into();
            }
            return Io::future(async move {
                let work = move |core: &Arc<Core>| core.write_cached(offset, &data);
                engine::run(&core, Operation::Write, work).await
            });
        }
        if offset + data.len() as u64 > core.size() {
            // The lock on the length is never held across a sync: others take it inline.
            if let Err(error) = core.write_cached(offset, &data) {
                return Io::err(error);
            }
            return Io::future(async move { core.flush(Operation::Write).await });
        }
        Io::future(async move {
            let work = move |core: &Arc<Core>| core.write_durable(offset, &data);
            engine::run(&core, Operation::Write, work).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        if let Err(error) = self.admit_write(Operation::WriteZeroes, offset, len) {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(());
        }
        Io::future(space::write_zeroes(self.core(), offset, len, flags))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let admitted = self
            .admit_write(Operation::Discard, offset, len)
            .and_then(|()| self.admit(Operation::Discard, offset, len));
        if let Err(error) = admitted {
            return Io::err(error);
        }
        if len == 0 || !self.core.limits.can_discard {
            return Io::ok(());
        }
        Io::future(space::discard(self.core(), offset, len))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        if let Err(error) = self.admit(Operation::BlockStatus, offset, len) {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(BlockStatus { len: 0, flags: Default::default() });
        }
        if let Some(end) = self.core.data_runs.end(offset) {
            return Io::ok(BlockStatus { len: len.min(end - offset), flags: space::DATA });
        }
        Io::future(space::block_status(self.core(), offset, len))
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        match level {
            FlushLevel::Process => self.core.flusher.check(&self.core, Operation::Flush).into(),
            FlushLevel::Durable if self.core.limits.read_only => Io::ok(()),
            FlushLevel::Durable => {
                let core = self.core();
                Io::future(async move { core.flush(Operation::Flush).await })
            }
        }
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        if let Err(error) = self.admit_truncate(size) {
            return Io::err(error);
        }
        Io::future(space::truncate(self.core(), size))
    }
}

impl RawFile {
    fn admit_truncate(&self, size: u64) -> Result<()> {
        use crate::{Error, ErrorKind};
        let failed = |kind, detail: &str| {
            Err(Error::new(Operation::Truncate, kind, &self.core.name, detail).at(size, 0))
        };
        if self.core.limits.read_only {
            return failed(ErrorKind::ReadOnly, "the device is open for reading only");
        }
        if self.core.block_device.is_some() {
            return failed(ErrorKind::Unsupported, "a block device cannot change its size");
        }
        if i64::try_from(size).is_err() {
            return failed(ErrorKind::NoSpace, "longer than a file can be");
        }
        Ok(())
    }
}
