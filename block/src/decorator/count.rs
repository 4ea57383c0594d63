use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use crate::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, Operation, Replication, WriteFlags, ZeroFlags,
};

/// Counts requests and their bytes, per kind, as they come in.
#[derive(Debug)]
pub struct Count {
    inner: Arc<dyn BlockDevice>,
    counters: [Counter; KINDS.len()],
}

#[derive(Debug, Default)]
struct Counter {
    operations: AtomicU64,
    bytes: AtomicU64,
}

/// How much of one kind there was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Requests, whatever became of them.
    pub operations: u64,
    /// The sum of their lengths.
    pub bytes: u64,
}

const KINDS: [Operation; 7] = [
    Operation::Read,
    Operation::Write,
    Operation::WriteZeroes,
    Operation::Discard,
    Operation::BlockStatus,
    Operation::Flush,
    Operation::Truncate,
];

impl Count {
    /// Counts what goes to `inner`; under the same name.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Count { inner, counters: Default::default() })
    }

    /// What there was since the start or the last [`reset`](Self::reset). Zero for operations
    /// that are not requests to a device. Flushes of both levels count together, without bytes.
    #[must_use]
    pub fn of(&self, operation: Operation) -> Counts {
        let counter = KINDS.iter().zip(&self.counters).find(|(kind, _)| **kind == operation);
        counter.map_or(Counts::default(), |(_, counter)| Counts {
            operations: counter.operations.load(Ordering::Relaxed),
            bytes: counter.bytes.load(Ordering::Relaxed),
        })
    }

    /// Starts again from zero.
    pub fn reset(&self) {
        for counter in &self.counters {
            counter.operations.store(0, Ordering::Relaxed);
            counter.bytes.store(0, Ordering::Relaxed);
        }
    }

    fn count(&self, operation: Operation, len: u64) -> &dyn BlockDevice {
        for (_, counter) in KINDS.iter().zip(&self.counters).filter(|(kind, _)| **kind == operation)
        {
            counter.operations.fetch_add(1, Ordering::Relaxed);
            counter.bytes.fetch_add(len, Ordering::Relaxed);
        }
        &*self.inner
    }
}

impl BlockDevice for Count {
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
        self.count(Operation::Read, len as u64).read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.count(Operation::Write, data.len() as u64).write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.count(Operation::WriteZeroes, len).write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.count(Operation::Discard, len).discard(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.count(Operation::BlockStatus, len).block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.count(Operation::Flush, 0).flush(level)
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        self.count(Operation::Truncate, 0).truncate(size)
    }

    fn replication(&self) -> Option<&dyn Replication> {
        self.inner.replication()
    }
}
