//! Zeroes, discards and the block status: what a file system knows about space.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::core::Core;
use super::{direct, engine, sys};
use crate::{
    BlockStatus, Error, ErrorKind, LockMode, Operation, RangeGuard, Result, StatusFlags, ZeroFlags,
    zeroes,
};

/// Zeroes that have to be written are written in pieces of at most this many bytes.
const ZERO_PIECE_LEN: u64 = 1 << 20;

const PUNCH_HOLE: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);
const ZERO_RANGE: FallocateFlags = FallocateFlags::ZERO_RANGE.union(FallocateFlags::KEEP_SIZE);

pub(super) const DATA: StatusFlags = StatusFlags { data: true, zero: false, allocated: true };
const HOLE: StatusFlags = StatusFlags { data: false, zero: true, allocated: true };

/// Keeps direct writes of neighbouring bytes away: the kernel zeroes parts of blocks through the
/// page cache.
async fn lock(core: &Core, offset: u64, len: u64) -> Option<RangeGuard> {
    let direct = core.direct.as_ref()?;
    Some(direct.lock.lock(direct.pages(offset, len), LockMode::Exclusive).await)
}

pub(super) async fn write_zeroes(
    core: Arc<Core>,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<()> {
    if flags.fua {
        core.flusher.check(&core, Operation::WriteZeroes)?;
    }
    let guard = lock(&core, offset, len).await;
    let work = move |core: &Arc<Core>| {
        let result = zero_range(core, offset, len, flags);
        drop(guard);
        result
    };
    engine::run(&core, Operation::WriteZeroes, work).await?;
    if flags.fua { core.flush(Operation::WriteZeroes).await } else { Ok(()) }
}

fn zero_range(core: &Core, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
    let failed = |error: io::Error| core.error(Operation::WriteZeroes, offset, len, &error);
    // For a block device the kernel may carry out a ZERO_RANGE by writing.
    let can_zero_range =
        core.can_zero_range.load(Ordering::Relaxed) && !(flags.fast && core.block_device.is_some());
    let modes: &[FallocateFlags] = match (flags.may_unmap, can_zero_range) {
        (true, true) => &[PUNCH_HOLE, ZERO_RANGE],
        (true, false) => &[PUNCH_HOLE],
        (false, true) => &[ZERO_RANGE],
        (false, false) => &[],
    };
    let modes = if core.limits.fast_zero { modes } else { &[] };
    if modes.is_empty() && flags.fast {
        return Err(not_fast(core, offset, len));
    }
    core.extend(offset + len).map_err(failed)?;
    // A block device zeroes whole blocks only; the rest is written.
    let (start, end) = whole_blocks(core, offset, offset + len);
    for &mode in modes {
        match fallocate(core, mode, start, end - start) {
            Ok(()) => {
                write_zero_pieces(core, offset, start)?;
                return write_zero_pieces(core, end, offset + len);
            }
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                if mode == ZERO_RANGE {
                    core.can_zero_range.store(false, Ordering::Relaxed);
                }
            }
            Err(error) => return Err(failed(error.into())),
        }
    }
    if flags.fast {
        return Err(not_fast(core, offset, len));
    }
    write_zero_pieces(core, offset, offset + len)
}

fn not_fast(core: &Core, offset: u64, len: u64) -> Error {
    let detail = "zeroing is not faster than writing here";
    Error::new(Operation::WriteZeroes, ErrorKind::Unsupported, &core.name, detail).at(offset, len)
}

/// The whole blocks inside a range: all of it in a file; perhaps nothing, at its start.
fn whole_blocks(core: &Core, start: u64, end: u64) -> (u64, u64) {
    let Some(block_len) = core.block_device else { return (start, end) };
    let first = start.next_multiple_of(block_len);
    let last = end - end % block_len;
    if first < last { (first, last) } else { (start, start) }
}

fn fallocate(core: &Core, mode: FallocateFlags, offset: u64, len: u64) -> rustix::io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let result = loop {
        match rustix::fs::fallocate(&core.file, mode, offset, len) {
            Err(Errno::INTR) => {}
            result => break result,
        }
    };
    core.data_runs.forget(offset, offset + len);
    result
}

fn write_zero_pieces(core: &Core, start: u64, end: u64) -> Result<()> {
    let mut at = start;
    while at < end {
        let len = (end - at).min(ZERO_PIECE_LEN);
        direct::write_locked(core, at, &zeroes(len as usize), false)?;
        at += len;
    }
    Ok(())
}

pub(super) async fn discard(core: Arc<Core>, offset: u64, len: u64) -> Result<()> {
    let guard = lock(&core, offset, len).await;
    let work = move |core: &Arc<Core>| {
        let result = discard_range(core, offset, len);
        drop(guard);
        result
    };
    engine::run(&core, Operation::Discard, work).await
}

fn discard_range(core: &Core, offset: u64, len: u64) -> Result<()> {
    let (start, end) = whole_blocks(core, offset, offset + len);
    let result = match core.block_device {
        _ if start == end => Ok(()),
        Some(_) => sys::block_device_discard(&core.file, start, end - start),
        None => fallocate(core, PUNCH_HOLE, start, end - start).map_err(io::Error::from),
    };
    match result {
        // It is advice only.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        Err(error) => Err(core.error(Operation::Discard, offset, len, &error)),
        Ok(()) => Ok(()),
    }
}

pub(super) async fn truncate(core: Arc<Core>, size: u64) -> Result<()> {
    let from = size.min(core.size());
    let guard = lock(&core, from, u64::MAX).await;
    let work = move |core: &Arc<Core>| {
        let result = core.truncate(size);
        drop(guard);
        result
    };
    engine::run(&core, Operation::Truncate, work).await
}

pub(super) async fn block_status(core: Arc<Core>, offset: u64, len: u64) -> Result<BlockStatus> {
    engine::run(&core, Operation::BlockStatus, move |core| status(core, offset, len)).await
}

fn status(core: &Core, offset: u64, len: u64) -> Result<BlockStatus> {
    let end = offset + len;
    if core.block_device.is_some() {
        return Ok(BlockStatus { len, flags: DATA });
    }
    let failed = |error: Errno| core.error(Operation::BlockStatus, offset, len, &error.into());
    let asked = core.data_runs.forgotten();
    let next_data = match rustix::fs::seek(&core.file, SeekFrom::Data(offset)) {
        Ok(at) => at,
        // No data up to the end of the file.
        Err(Errno::NXIO) => end,
        // The file system does not know.
        Err(Errno::INVAL | Errno::OPNOTSUPP) => return Ok(BlockStatus { len, flags: DATA }),
        Err(error) => return Err(failed(error)),
    };
    if next_data > offset {
        return Ok(BlockStatus { len: next_data.min(end) - offset, flags: HOLE });
    }
    let next_hole = match rustix::fs::seek(&core.file, SeekFrom::Hole(offset)) {
        Ok(at) => at,
        Err(Errno::NXIO | Errno::INVAL | Errno::OPNOTSUPP) => end,
        Err(error) => return Err(failed(error)),
    };
    // A hole that has appeared here since is not yet known to this answer.
    let next_hole = if next_hole > offset { next_hole } else { offset + 1 };
    core.data_runs.insert(offset, next_hole, asked);
    Ok(BlockStatus { len: next_hole.min(end) - offset, flags: DATA })
}
