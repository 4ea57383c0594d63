//! I/O that bypasses the page cache.
//!
//! The kernel takes whole blocks from aligned memory only. What does not fit is read, modified
//! and written as whole blocks under a range lock, and the last block of a file whose length is
//! no multiple of the block goes through the page cache (direct I/O would make the file longer).

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::core::Core;
use super::engine;
use crate::Buffer;
use crate::{Error, LockMode, Operation, RangeLock, Result};

/// Longest piece of a misaligned write that is copied to aligned memory at a time, in bytes.
const BOUNCE_LEN: u64 = 1 << 20;

/// What the page cache works with; it must not mix with direct I/O within one page.
const PAGE_LEN: u64 = 4096;

#[derive(Debug)]
pub(super) struct Direct {
    /// Addresses of buffers are multiples of this many bytes.
    pub(super) memory_align: usize,
    /// Offsets and lengths are multiples of this many bytes.
    pub(super) block_len: u64,
    /// The same file, through the page cache.
    pub(super) cached: File,
    /// Rounded to pages: shared by what transfers whole blocks, exclusive for what does not.
    pub(super) lock: RangeLock,
}

impl Direct {
    /// The range to be locked.
    pub(super) fn pages(&self, offset: u64, len: u64) -> Range<u64> {
        let page = self.block_len.max(PAGE_LEN);
        let end = offset.saturating_add(len);
        round_down(offset, page)..end.checked_next_multiple_of(page).unwrap_or(u64::MAX)
    }

    fn is_aligned(&self, offset: u64, data: &[u8]) -> bool {
        offset.is_multiple_of(self.block_len)
            && (data.len() as u64).is_multiple_of(self.block_len)
            && data.as_ptr().addr().is_multiple_of(self.memory_align)
    }

    fn block_len_usize(&self) -> usize {
        // A block is no longer than a few pages.
        self.block_len as usize
    }

    /// Writes anything anywhere; the caller holds the lock.
    fn write(&self, core: &Core, offset: u64, data: &[u8], durable: bool) -> io::Result<()> {
        let end = offset + data.len() as u64;
        // The block in which the file will end is not a whole one.
        let tail = round_down(core.size().max(end), self.block_len).clamp(offset, end);
        let (blocks, rest) = data.split_at((tail - offset) as usize);
        if self.is_aligned(offset, blocks) {
            self.write_blocks(core, offset, blocks, durable)?;
        } else {
            self.write_bounced(core, offset, blocks, durable)?;
        }
        engine::write_full(&self.cached, tail, rest, 1, durable)
    }

    fn write_blocks(&self, core: &Core, at: u64, data: &[u8], durable: bool) -> io::Result<()> {
        engine::write_full(&core.file, at, data, self.block_len_usize(), durable)
    }

    fn write_bounced(
        &self,
        core: &Core,
        offset: u64,
        mut data: &[u8],
        durable: bool,
    ) -> io::Result<()> {
        let mut at = offset;
        while !data.is_empty() {
            let start = round_down(at, self.block_len);
            let end = (at + data.len() as u64).min(start + BOUNCE_LEN);
            let (now, rest) = data.split_at((end - at) as usize);
            let len = round_up(end, self.block_len) - start;
            let mut buffer = Buffer::aligned(len as usize, self.memory_align);
            buffer.fill(0);
            self.read_edges(core, start, at..end, &mut buffer)?;
            buffer[(at - start) as usize..][..now.len()].copy_from_slice(now);
            self.write_blocks(core, start, &buffer, durable)?;
            (at, data) = (end, rest);
        }
        Ok(())
    }

    /// Fills in the first and the last block if `new` does not cover them. What lies beyond the
    /// end of the file stays zero.
    fn read_edges(
        &self,
        core: &Core,
        start: u64,
        new: Range<u64>,
        buffer: &mut [u8],
    ) -> io::Result<()> {
        let block = self.block_len_usize();
        let first = new.start > start;
        if first {
            engine::read_full(&core.file, start, &mut buffer[..block], block)?;
        }
        let last = buffer.len() - block;
        let is_read = first && last == 0;
        if !new.end.is_multiple_of(self.block_len) && !is_read {
            let at = start + last as u64;
            engine::read_full(&core.file, at, &mut buffer[last..], block)?;
        }
        Ok(())
    }
}

/// Reads at any offset.
pub(super) async fn read(core: Arc<Core>, offset: u64, len: usize) -> Result<Bytes> {
    let (memory_align, block_len) = match &core.direct {
        Some(direct) => (direct.memory_align, direct.block_len),
        None => (1, 1),
    };
    let start = round_down(offset, block_len);
    let end = round_up(offset + len as u64, block_len);
    let buffer = Buffer::aligned((end - start) as usize, memory_align);
    let skip = (offset - start) as usize;
    // The last block may be a short one: less than the whole buffer is enough.
    let (mut buffer, read) = engine::read_by_ring(&core, start, buffer, 0).await?;
    if read >= skip + len {
        return Ok(buffer.freeze().slice(skip..skip + len));
    }
    engine::run(&core, Operation::Read, move |core| {
        let read = engine::read_full(&core.file, start, &mut buffer, block_len as usize)
            .map_err(|error| core.error(Operation::Read, offset, len as u64, &error))?;
        if read < skip + len {
            return Err(core.ended_early(offset, len as u64, start + read as u64));
        }
        Ok(buffer.freeze().slice(skip..skip + len))
    })
    .await
}

/// Writes at any offset.
pub(super) async fn write(core: Arc<Core>, offset: u64, data: Bytes, durable: bool) -> Result<()> {
    let Some(direct) = &core.direct else { return core.write_cached(offset, &data) };
    if durable {
        core.flusher.check(&core, Operation::Write)?;
    }
    let len = data.len() as u64;
    let end = offset + len;
    // Whole blocks below the end of the file touch no byte that is not theirs.
    let whole = offset.is_multiple_of(direct.block_len)
        && len.is_multiple_of(direct.block_len)
        && end <= core.size();
    let mode = if whole { LockMode::Shared } else { LockMode::Exclusive };
    let guard = direct.lock.lock(direct.pages(offset, len), mode).await;
    engine::run(&core, Operation::Write, move |core| {
        let result = write_locked(core, offset, &data, durable);
        drop(guard);
        result
    })
    .await
}

/// Writes where it may block; the caller holds the lock.
pub(super) fn write_locked(core: &Core, offset: u64, data: &[u8], durable: bool) -> Result<()> {
    let Some(direct) = &core.direct else { return core.write_cached(offset, data) };
    let len = data.len() as u64;
    let end = offset + len;
    let work = |durable| core.write_to(end, || direct.write(core, offset, data, durable));
    let failed = |error: &io::Error| -> Error { core.error(Operation::Write, offset, len, error) };
    match work(durable) {
        Ok(()) => Ok(()),
        Err(error) => {
            // As for a durable write through the page cache.
            if durable && work(false).is_ok() {
                core.flusher.fail(&core.name, &error);
            }
            Err(failed(&error))
        }
    }
}

fn round_down(at: u64, align: u64) -> u64 {
    at - at % align
}

/// `at` is an offset in a file, so that there is room above it.
fn round_up(at: u64, align: u64) -> u64 {
    at.next_multiple_of(align)
}
