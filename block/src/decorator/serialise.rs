use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use crate::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, LockMode, RangeLock, Replication, WriteFlags,
    ZeroFlags, start,
};

/// Carries out requests that overlap in the order in which they came.
///
/// Reads share a range; everything that changes content has it alone. A request holds its range
/// until the device has finished with it, whether or not anybody still waits for the answer. Such
/// a request runs as a task of the current tokio runtime, unless it ends at once.
#[derive(Debug)]
pub struct Serialise {
    inner: Arc<dyn BlockDevice>,
    lock: RangeLock,
}

impl Serialise {
    /// `inner`, under the same name. It only helps if nobody goes past it.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Serialise { inner, lock: RangeLock::new() })
    }

    /// The lock, for those who have to keep requests away from a range for a while.
    #[must_use]
    pub fn lock(&self) -> &RangeLock {
        &self.lock
    }

    fn run<T, F>(&self, range: Range<u64>, mode: LockMode, operation: F) -> Io<'_, T>
    where
        T: Send + 'static,
        F: FnOnce(&dyn BlockDevice) -> Io<'_, T> + Send + 'static,
    {
        let turn = self.lock.lock(range, mode);
        let inner = Arc::clone(&self.inner);
        start(async move {
            let guard = turn.await;
            let result = operation(&*inner).await;
            drop(guard);
            result
        })
    }
}

/// The device checks ranges; one that overflows gets its error from there.
fn range(offset: u64, len: u64) -> Range<u64> {
    offset..offset.saturating_add(len)
}

impl BlockDevice for Serialise {
    fn name(&self) -> &str {
        self.inner.name()
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let range = range(offset, len as u64);
        self.run(range, LockMode::Shared, move |d| d.read(offset, len))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let range = range(offset, data.len() as u64);
        self.run(range, LockMode::Exclusive, move |d| d.write(offset, data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.run(range(offset, len), LockMode::Exclusive, move |d| {
            d.write_zeroes(offset, len, flags)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.run(range(offset, len), LockMode::Exclusive, move |d| d.discard(offset, len))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.run(range(offset, len), LockMode::Shared, move |d| d.block_status(offset, len))
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.inner.flush(level)
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        let from = size.min(self.inner.size());
        self.run(from..u64::MAX, LockMode::Exclusive, move |d| d.truncate(size))
    }

    fn replication(&self) -> Option<&dyn Replication> {
        self.inner.replication()
    }
}
