use std::fmt;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    Result, StatusFlags, WriteFlags, ZeroFlags,
};
use bytes::{Bytes, BytesMut};
use tokio::sync::Notify;

use crate::checks::read_aligned;
use crate::epoch::{Epoch, Side};
use crate::filter::{CopyBeforeWrite, Shared};
use crate::inline::inline;

/// The source of a [`CopyBeforeWrite`] filter as it was at the last checkpoint, read-only.
///
/// For each unit: what has been copied is read from the target, the rest from the source. Look-up
/// and read happen under one shared lock on the range, so a write that comes meanwhile waits with
/// its copy (spec: backup, snapshot access). The target needs no backing device of its own. What
/// a job's mode or bitmap leaves out cannot be read (`EACCES`).
pub struct SnapshotAccess {
    name: String,
    shared: Arc<Shared>,
    readers: AtomicUsize,
    idle: Notify,
}

impl SnapshotAccess {
    /// A view of what is below `filter`.
    #[must_use]
    pub fn new(name: impl Into<String>, filter: &CopyBeforeWrite) -> Arc<Self> {
        Arc::new(SnapshotAccess {
            name: name.into(),
            shared: Arc::clone(filter.shared()),
            readers: AtomicUsize::new(0),
            idle: Notify::new(),
        })
    }

    /// Waits until no read is in flight. After a switch of the filter's target this is the moment
    /// from which the old target is no longer read, provided that the reads that came after the
    /// switch have ended too: hold them back.
    pub async fn drain(&self) {
        loop {
            let idle = self.idle.notified();
            if self.readers.load(Ordering::Acquire) == 0 {
                return;
            }
            idle.await;
        }
    }

    async fn read_at_checkpoint(&self, bytes: Range<u64>) -> Result<Bytes> {
        let _reader = Reader::new(self);
        let _guard = self.shared.locks.lock(bytes.clone(), LockMode::Shared).await;
        let epoch = self.intact_epoch(Operation::Read, &bytes)?;
        let (first, len) = self.read_run(&epoch, &bytes).await?;
        if len == bytes.end - bytes.start {
            return Ok(first);
        }
        let mut data = BytesMut::with_capacity((bytes.end - bytes.start) as usize);
        data.extend_from_slice(&first);
        let mut at = bytes.start + len;
        while at < bytes.end {
            let (run, len) = self.read_run(&epoch, &(at..bytes.end)).await?;
            data.extend_from_slice(&run);
            at += len;
        }
        Ok(data.freeze())
    }

    /// Reads as much from the start of the range as one device has.
    async fn read_run(&self, epoch: &Epoch, bytes: &Range<u64>) -> Result<(Bytes, u64)> {
        let (side, len) = epoch.locate(bytes, self.size()).await?;
        let device = self.device(epoch, side, Operation::Read, bytes)?;
        Ok((read_aligned(device, bytes.start, len).await?, len))
    }

    async fn status_at_checkpoint(&self, bytes: Range<u64>) -> Result<BlockStatus> {
        let _reader = Reader::new(self);
        let _guard = self.shared.locks.lock(bytes.clone(), LockMode::Shared).await;
        let epoch = self.intact_epoch(Operation::BlockStatus, &bytes)?;
        let (side, len) = epoch.locate(&bytes, self.size()).await?;
        let device = self.device(&epoch, side, Operation::BlockStatus, &bytes)?;
        let mut status = device.block_status(bytes.start, len).await?;
        status.len = status.len.min(len);
        // To its readers the view is a device without layers.
        status.flags.allocated = true;
        Ok(status)
    }

    fn device<'a>(
        &'a self,
        epoch: &'a Epoch,
        side: Side,
        operation: Operation,
        bytes: &Range<u64>,
    ) -> Result<&'a dyn BlockDevice> {
        match side {
            Side::Source => Ok(&*self.shared.source),
            Side::Target => Ok(&*epoch.target),
            Side::Excluded => Err(self.denied(operation, bytes, "not part of the snapshot")),
        }
    }

    fn denied(&self, operation: Operation, bytes: &Range<u64>, why: &str) -> Error {
        let denied = std::io::Error::from_raw_os_error(EACCES);
        let error = Error::from_os(operation, format!("{}: {why}", self.name), &denied);
        error.at(bytes.start, bytes.end - bytes.start)
    }

    /// The current epoch. To be called under the lock: a switch that comes later does no harm,
    /// because nothing that this reader finds uncopied can be overwritten before it has ended.
    fn intact_epoch(&self, operation: Operation, bytes: &Range<u64>) -> Result<Arc<Epoch>> {
        let epoch = self.shared.epoch();
        if epoch.is_broken() {
            return Err(self.denied(operation, bytes, "snapshot lost"));
        }
        Ok(epoch)
    }

    fn read_only<T>(&self, operation: Operation, offset: u64, len: u64) -> Io<'_, T> {
        let why = "a snapshot takes no writes";
        Io::err(Error::new(operation, ErrorKind::ReadOnly, &self.name, why).at(offset, len))
    }
}

const EACCES: i32 = 13;

/// A read in flight.
struct Reader<'a>(&'a SnapshotAccess);

impl<'a> Reader<'a> {
    fn new(view: &'a SnapshotAccess) -> Self {
        view.readers.fetch_add(1, Ordering::AcqRel);
        Reader(view)
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        if self.0.readers.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

impl BlockDevice for SnapshotAccess {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.shared.source.size()
    }

    fn limits(&self) -> Limits {
        let limits = self.shared.source.limits();
        Limits {
            transfer_max: limits.transfer_max.min(self.shared.epoch().target.limits().transfer_max),
            read_only: true,
            growable: false,
            can_discard: false,
            fast_zero: false,
            ..limits
        }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let bytes = len as u64;
        if let Err(error) = <dyn BlockDevice>::check_range(self, Operation::Read, offset, bytes) {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(Bytes::new());
        }
        inline(self.read_at_checkpoint(offset..offset + bytes))
    }

    fn write(&self, offset: u64, data: Bytes, _: WriteFlags) -> Io<'_, ()> {
        self.read_only(Operation::Write, offset, data.len() as u64)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> Io<'_, ()> {
        self.read_only(Operation::WriteZeroes, offset, len)
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.read_only(Operation::Discard, offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        if let Err(error) =
            <dyn BlockDevice>::check_range(self, Operation::BlockStatus, offset, len)
        {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(BlockStatus { len: 0, flags: StatusFlags::default() });
        }
        inline(self.status_at_checkpoint(offset..offset + len))
    }

    fn flush(&self, _: FlushLevel) -> Io<'_, ()> {
        Io::ok(())
    }
}

impl fmt::Debug for SnapshotAccess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SnapshotAccess").field("name", &self.name).finish_non_exhaustive()
    }
}
