use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

use super::range::zero_range;
use crate::{BlockDevice, Error, ErrorKind, Operation, Result, WriteFlags, ZeroFlags, is_zero};

/// Longest range that is zeroed by one request, and all that is being zeroed at a time, in bytes:
/// even a target that has to write them then answers each in time.
const ZERO_LEN_MAX: u64 = 32 << 20;
const ZEROING_MAX: u64 = 128 << 20;
/// What zeroing is counted in, in bytes.
const ZERO_UNIT: u64 = 1 << 20;

/// How [`copy_device`] copies.
#[derive(Debug, Clone)]
pub struct CopyOptions {
    /// Most pieces that are being read or written at a time; at least 1.
    pub requests_max: usize,
    /// Length of a piece, in bytes, as far as both devices take it.
    pub request_len: u32,
    /// The target reads as zeroes all over: what is zero need not be written.
    pub target_is_zero: bool,
    /// Zeroes shall occupy space on the target, even where it reads as zeroes already.
    pub allocate: bool,
    /// Runs of zeroes of at least this many bytes (a power of two) are looked for in what was
    /// read, and not written as data. 0: only what the source says of itself counts.
    pub sparse_len: u32,
}

impl Default for CopyOptions {
    /// 64 pieces of 256 KiB; zeroes are found from 4 KiB on and left out, or take no space.
    fn default() -> Self {
        CopyOptions {
            requests_max: 64,
            request_len: 256 << 10,
            target_is_zero: false,
            allocate: false,
            sparse_len: 4096,
        }
    }
}

/// Copies all of a device to the beginning of another one that is at least as long, with many
/// requests in flight on both. `progress` is told, in any order, of lengths that are done.
///
/// What lies beyond the source's end on the target stays as it is. Nothing is flushed. The
/// source must not change meanwhile.
///
/// # Errors
/// The first failure of either device. No further piece is begun then, and this returns once all
/// that had been begun have ended; the target holds any part of the source.
pub async fn copy_device(
    source: &Arc<dyn BlockDevice>,
    target: &Arc<dyn BlockDevice>,
    options: &CopyOptions,
    progress: impl Fn(u64) + Send + Sync + 'static,
) -> Result<()> {
    let copier = Arc::new(Copier::new(source, target, options, Box::new(progress))?);
    let mut workers = JoinSet::new();
    for _ in 0..options.requests_max.max(1) {
        workers.spawn(Arc::clone(&copier).work());
    }
    let mut failure = None;
    while let Some(joined) = workers.join_next().await {
        match joined {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                failure.get_or_insert(error);
            }
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => {
                    failure.get_or_insert(Error::new(
                        Operation::Read,
                        ErrorKind::Shutdown,
                        source.name(),
                        "the runtime is shutting down",
                    ));
                }
            },
        }
    }
    failure.map_or(Ok(()), Err)
}

/// What is to be copied as one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Piece {
    offset: u64,
    len: u64,
    zero: bool,
}

/// How far the source has been looked through, and what is known of what comes next.
#[derive(Debug, Default)]
struct Scan {
    at: u64,
    extent_end: u64,
    zero: bool,
    /// The ends of the extents that follow, and whether they are zero.
    known: VecDeque<(u64, bool)>,
}

struct Copier {
    source: Arc<dyn BlockDevice>,
    target: Arc<dyn BlockDevice>,
    options: CopyOptions,
    size: u64,
    /// Blocks that both devices take.
    block_len: u64,
    piece_len: u64,
    scan: Mutex<Scan>,
    /// How many more units may be zeroed now.
    zeroing: Semaphore,
    failed: AtomicBool,
    progress: Box<dyn Fn(u64) + Send + Sync>,
}

impl Copier {
    fn new(
        source: &Arc<dyn BlockDevice>,
        target: &Arc<dyn BlockDevice>,
        options: &CopyOptions,
        progress: Box<dyn Fn(u64) + Send + Sync>,
    ) -> Result<Self> {
        let size = source.size();
        let (from, to) = (source.limits(), target.limits());
        let refuse = |kind, detail: String| {
            Err(Error::new(Operation::Write, kind, target.name(), detail).at(0, size))
        };
        if target.size() < size && !to.growable {
            let detail = format!(
                "{size} bytes are to be copied, and there is room for {} only",
                target.size()
            );
            return refuse(ErrorKind::NoSpace, detail);
        }
        if target.size() > size && !size.is_multiple_of(u64::from(to.block_size.max(1))) {
            let detail = format!(
                "{size} bytes are no whole number of its blocks of {} bytes",
                to.block_size
            );
            return refuse(ErrorKind::InvalidInput, detail);
        }
        let block_len = u64::from(from.block_size.max(to.block_size).max(1));
        let longest = options.request_len.min(from.transfer_max).min(to.transfer_max);
        let piece_len = (u64::from(longest) / block_len * block_len).max(block_len);
        let scan = Mutex::new(Scan::default());
        Ok(Copier {
            source: Arc::clone(source),
            target: Arc::clone(target),
            options: options.clone(),
            size,
            block_len,
            piece_len,
            scan,
            zeroing: Semaphore::new((ZEROING_MAX / ZERO_UNIT) as usize),
            failed: AtomicBool::new(false),
            progress,
        })
    }

    async fn work(self: Arc<Self>) -> Result<()> {
        loop {
            let copied = match self.next().await {
                Ok(None) => return Ok(()),
                Ok(Some(piece)) => self.copy(piece).await.map(|()| piece.len),
                Err(error) => Err(error),
            };
            match copied {
                Ok(len) => (self.progress)(len),
                Err(error) => {
                    self.failed.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
        }
    }

    /// The next piece in order, unless something has failed.
    async fn next(&self) -> Result<Option<Piece>> {
        let mut scan = self.scan.lock().await;
        let offset = scan.at;
        if offset >= self.size || self.failed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        if offset >= scan.extent_end {
            (scan.extent_end, scan.zero) = self.extent(offset, &mut scan.known).await?;
        }
        let rest = scan.extent_end - offset;
        let len = match scan.zero {
            true => rest.min(ZERO_LEN_MAX),
            // Up to a multiple of the piece, so that the next one begins at one.
            false => rest.min(self.piece_len - offset % self.piece_len),
        };
        scan.at = offset + len;
        Ok(Some(Piece { offset, len, zero: scan.zero }))
    }

    /// The end of the extent that begins here, in whole blocks, and whether it is zero. A block
    /// that is zero only in part is data.
    async fn extent(&self, offset: u64, known: &mut VecDeque<(u64, bool)>) -> Result<(u64, bool)> {
        while known.front().is_some_and(|(end, _)| *end <= offset) {
            known.pop_front();
        }
        if known.is_empty() {
            self.look(offset, known).await?;
        }
        let (end, zero) = known.front().copied().unwrap_or((self.size, false));
        let whole = if end == self.size { end } else { end - end % self.block_len };
        if zero && whole > offset {
            return Ok((whole, true));
        }
        let whole = end.checked_next_multiple_of(self.block_len).unwrap_or(self.size);
        Ok((whole.min(self.size), false))
    }

    async fn look(&self, offset: u64, known: &mut VecDeque<(u64, bool)>) -> Result<()> {
        let mut end = offset;
        for status in self.source.extents(offset, self.size - offset).await? {
            // A device that claims more than was asked, or nothing, must not lead us astray.
            end += status.len.clamp(1, (self.size - end).max(1));
            if end > self.size {
                break;
            }
            known.push_back((end, status.flags.zero));
        }
        Ok(())
    }

    async fn copy(&self, piece: Piece) -> Result<()> {
        let Piece { offset, len, zero } = piece;
        if zero {
            return self.zero(offset, len).await;
        }
        // At most as long as both devices take at a time, which fits.
        let data = self.source.read(offset, len as usize).await?;
        let mut at = 0;
        while at < data.len() {
            let (len, zero) = self.run(offset, &data, at);
            let start = offset + at as u64;
            match zero {
                true => self.zero(start, len as u64).await?,
                false => self.write(start, data.slice(at..at + len)).await?,
            }
            at += len;
        }
        Ok(())
    }

    async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        self.target.write(offset, data, WriteFlags::default()).await
    }

    /// How many bytes from `at` on are all zero, or all to be written.
    fn run(&self, offset: u64, data: &Bytes, at: usize) -> (usize, bool) {
        if self.options.sparse_len == 0 || self.options.allocate {
            return (data.len() - at, false);
        }
        let granule = u64::from(self.options.sparse_len).next_multiple_of(self.block_len);
        let next = |at: usize| {
            let rest = granule - (offset + at as u64) % granule;
            at + rest.min((data.len() - at) as u64) as usize
        };
        let mut end = next(at);
        let zero = is_zero(&data[at..end]);
        while end < data.len() && is_zero(&data[end..next(end)]) == zero {
            end = next(end);
        }
        (end - at, zero)
    }

    async fn zero(&self, offset: u64, len: u64) -> Result<()> {
        if self.options.target_is_zero && !self.options.allocate {
            return Ok(());
        }
        // One request is no longer than all that may be zeroed; the semaphore is never closed.
        let units = len.min(ZEROING_MAX).div_ceil(ZERO_UNIT) as u32;
        let _permit = self.zeroing.acquire_many(units).await;
        if self.options.allocate {
            return self.target.write_zeroes(offset, len, ZeroFlags::default()).await;
        }
        zero_range(&*self.target, offset, offset + len).await
    }
}
