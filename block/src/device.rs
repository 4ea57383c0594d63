use std::fmt;

use bytes::Bytes;

use crate::{Error, ErrorKind, Io, Operation, Result};

/// A disk: an array of bytes that is read, written and made durable.
///
/// # Rules for implementations
///
/// * Offsets and lengths are in bytes. A range beyond [`size`](Self::size) fails with
///   [`ErrorKind::InvalidInput`] on reads and with [`ErrorKind::NoSpace`] on writes, zeroes and
///   discards, unless [`Limits::growable`]. A zero length succeeds and does nothing. Sums are
///   checked for overflow.
/// * Operations may run concurrently. Two that overlap and of which one writes have no defined
///   order; whoever needs one takes a [`RangeLock`](crate::RangeLock).
/// * Everything that [`limits`](Self::limits) demands is the caller's duty; an operation that
///   does not obey it fails with [`ErrorKind::InvalidInput`] and changes nothing.
/// * An operation that has started may finish although its [`Io`] was dropped; buffers are owned
///   by the operation until then.
/// * Durability: a completed write is visible to every later read. It has to survive the end of
///   the *process* only after a flush at [`FlushLevel::Process`], and the end of the *machine*
///   only after one at [`FlushLevel::Durable`] or if it carried `fua`. A failed durable flush is
///   sticky: every later flush fails with [`ErrorKind::Sticky`] until the device is reopened.
pub trait BlockDevice: Send + Sync + fmt::Debug {
    /// The name under which errors and events speak of this device.
    fn name(&self) -> &str;

    /// Size in bytes. 0 as long as it is not known (a client that has not connected yet). Need
    /// not be a multiple of any block size.
    fn size(&self) -> u64;

    /// What callers have to obey and may expect. Constant while the device is open, except for
    /// devices that connect later.
    fn limits(&self) -> Limits;

    /// Reads exactly `len` bytes.
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes>;

    /// Writes all of `data`.
    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()>;

    /// Makes the range read as zeroes.
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()>;

    /// Says that the contents of the range are no longer needed. What it reads as afterwards is
    /// either the old content or zeroes.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()>;

    /// The state of the first bytes of the range: at least 1 and at most `len` bytes share it.
    /// Neighbouring extents need not differ.
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus>;

    /// The states of the first bytes of the range, one extent after the other: at least one, none of
    /// them empty, and together at most `len` bytes. For callers that go through many: a device that
    /// is far away answers once for all of them.
    fn extents(&self, offset: u64, len: u64) -> Io<'_, Vec<BlockStatus>> {
        let first = self.block_status(offset, len);
        Io::future(async move { Ok(vec![first.await?]) })
    }

    /// Makes everything that completed before this call safe against what `level` names.
    fn flush(&self, level: FlushLevel) -> Io<'_, ()>;

    /// Changes the size; new bytes read as zeroes.
    fn truncate(&self, size: u64) -> Io<'_, ()> {
        let error = Error::new(
            Operation::Truncate,
            ErrorKind::Unsupported,
            self.name(),
            "this device cannot change its size",
        );
        Io::err(error.at(size, 0))
    }

    /// The replication calls, if this device takes part in replication.
    fn replication(&self) -> Option<&dyn Replication> {
        None
    }

    /// Writes of which data and mapping can be flushed one after the other, if this device has a
    /// mapping and can do that.
    fn staging(&self) -> Option<&dyn Staging> {
        None
    }
}

/// How far a flush goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum FlushLevel {
    /// Everything that was acknowledged is in the file, metadata included: a `kill -9` of this
    /// process loses nothing.
    Process,
    /// And it is on stable storage: a power loss loses nothing.
    Durable,
}

/// What callers of a device have to obey and may expect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Offsets and lengths of reads and writes must be multiples of this many bytes (a power of
    /// two, at least 1); only the end of a device whose size is no multiple is exempt.
    pub block_size: u32,
    /// Requests of this size, aligned to it, need no read-modify-write (a power of two).
    pub preferred_size: u32,
    /// Longest read or write, in bytes.
    pub transfer_max: u32,
    /// No operation that changes content is accepted.
    pub read_only: bool,
    /// A write beyond the end extends the device (a file that carries an image format).
    pub growable: bool,
    /// `discard` gives space back.
    pub can_discard: bool,
    /// `write_zeroes` is usually faster than writing.
    pub fast_zero: bool,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            block_size: 1,
            preferred_size: 4096,
            transfer_max: 32 << 20,
            read_only: false,
            growable: false,
            can_discard: false,
            fast_zero: false,
        }
    }
}

/// Modifiers of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteFlags {
    /// Complete only when this write, and the metadata that finds it, is on stable storage.
    pub fua: bool,
}

/// Modifiers of a write of zeroes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ZeroFlags {
    /// As for a write.
    pub fua: bool,
    /// The space may be given back.
    pub may_unmap: bool,
    /// Fail with [`ErrorKind::Unsupported`], changing nothing, if this is not faster than
    /// writing.
    pub fast: bool,
}

/// What is known of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockStatus {
    /// How many bytes, counted from the start of the query, share the flags. At least 1.
    pub len: u64,
    /// The state itself.
    pub flags: StatusFlags,
}

/// The state of a range. "Not zero" and "data" are always safe answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StatusFlags {
    /// The range occupies space (it is no hole).
    pub data: bool,
    /// The range reads as zeroes.
    pub zero: bool,
    /// The content comes from this layer, not from a backing device below it. True for devices
    /// without layers.
    pub allocated: bool,
}

impl dyn BlockDevice + '_ {
    /// Checks a range against the size; `Ok` if all of it lies inside the device.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] for reads and status, [`ErrorKind::NoSpace`] for the rest.
    pub fn check_range(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        check_range(self.name(), self.size(), operation, offset, len)
    }
}

/// Checks a range against a size, by subtraction, so that no sum can overflow.
pub(crate) fn check_range(
    node: &str,
    size: u64,
    operation: Operation,
    offset: u64,
    len: u64,
) -> Result<()> {
    if offset <= size && len <= size - offset {
        return Ok(());
    }
    let kind = match operation {
        Operation::Read | Operation::BlockStatus => ErrorKind::InvalidInput,
        _ => ErrorKind::NoSpace,
    };
    Err(Error::new(operation, kind, node, format!("beyond the end of the device ({size} bytes)"))
        .at(offset, len))
}

/// Checks a request that any open device takes: its range, and the longest transfer.
pub(crate) fn check_request(
    node: &str,
    size: u64,
    limits: &Limits,
    operation: Operation,
    offset: u64,
    len: u64,
) -> Result<()> {
    if len == 0 {
        return Ok(());
    }
    let transfers = matches!(operation, Operation::Read | Operation::Write);
    if transfers && len > u64::from(limits.transfer_max) {
        let detail =
            format!("longer than the {} bytes that one request may have", limits.transfer_max);
        return Err(Error::new(operation, ErrorKind::InvalidInput, node, detail).at(offset, len));
    }
    check_range(node, size, operation, offset, len)
}

/// Checks a request that changes content. The end of a growable device is `i64::MAX`.
pub(crate) fn check_request_write(
    node: &str,
    size: u64,
    limits: &Limits,
    operation: Operation,
    offset: u64,
    len: u64,
) -> Result<()> {
    if limits.read_only {
        let detail = "the device is open for reading only";
        return Err(Error::new(operation, ErrorKind::ReadOnly, node, detail).at(offset, len));
    }
    let size = if limits.growable { i64::MAX.unsigned_abs() } else { size };
    check_request(node, size, limits, operation, offset, len)
}

/// Writes in two steps, so that no mapping reaches stable storage before its data: stage, flush,
/// publish, flush. One flush of each kind serves any number of writes.
///
/// Data is staged where the device has nothing of its own yet, or again in the same place.
pub trait Staging: Send + Sync {
    /// Writes data that counts for nothing yet: the device reads as before, also after a crash.
    /// The range consists of whole units of [`Limits::preferred_size`], but for the end of the
    /// device.
    fn stage(&self, offset: u64, data: Bytes) -> Io<'_, ()>;

    /// Makes what was staged in this range the content. All of the range was staged, and a
    /// durable flush begun since then has succeeded.
    fn publish(&self, offset: u64, len: u64) -> Io<'_, ()>;
}

/// The role in which a device is asked to replicate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ReplicationMode {
    /// No replication.
    Unprotected,
    /// Forwards its writes to a secondary.
    Primary,
    /// Receives the writes of a primary and keeps what they overwrite.
    Secondary,
}

/// The replication calls of a device, as block replication defines them.
pub trait Replication: Send + Sync {
    /// Starts replication in the given role.
    fn start(&self, mode: ReplicationMode) -> Io<'_, ()>;

    /// Makes the current content the new checkpoint.
    fn checkpoint(&self) -> Io<'_, ()>;

    /// Ends replication; with `failover` the disk becomes the last checkpoint plus the writes of
    /// this side's guest, without it what was kept for a failover is dropped.
    fn stop(&self, failover: bool) -> Io<'_, ()>;

    /// The error that replication has met and that no guest was told of, if any.
    fn error(&self) -> Io<'_, ()>;
}
