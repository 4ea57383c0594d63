use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::device::{check_request, check_request_write};
use crate::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, Operation, Result, StatusFlags, WriteFlags,
    ZeroFlags, is_zero, zeroes,
};

const CHUNK_LEN: u64 = 64 << 10;

/// A device in memory. What was never written occupies no space.
///
/// Every operation finishes inline. Nothing survives the end of the process, so both levels of
/// flush do nothing and succeed.
#[derive(Debug)]
pub struct Memory {
    name: String,
    limits: Limits,
    content: Mutex<Content>,
}

#[derive(Debug)]
struct Content {
    size: u64,
    /// By index; what lies beyond `size` in the last chunk is zero.
    chunks: BTreeMap<u64, Box<[u8]>>,
}

/// The part of one chunk that a range covers.
struct Piece {
    chunk: u64,
    start: usize,
    len: usize,
}

impl Memory {
    /// A device of `size` bytes, all zero.
    #[must_use]
    pub fn new(name: impl Into<String>, size: u64) -> Arc<Self> {
        Self::build(name.into(), size, false)
    }

    /// A device that writes beyond its end extend, as if it were a file.
    #[must_use]
    pub fn new_growable(name: impl Into<String>, size: u64) -> Arc<Self> {
        Self::build(name.into(), size, true)
    }

    fn build(name: String, size: u64, growable: bool) -> Arc<Self> {
        let limits = Limits { growable, can_discard: true, fast_zero: true, ..Limits::default() };
        let content = Mutex::new(Content { size, chunks: BTreeMap::new() });
        Arc::new(Memory { name, limits, content })
    }

    /// How many bytes of memory the content occupies: a multiple of 64 KiB.
    #[must_use]
    pub fn allocated_bytes(&self) -> u64 {
        self.lock().chunks.len() as u64 * CHUNK_LEN
    }

    fn lock(&self) -> MutexGuard<'_, Content> {
        self.content.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn admit_write(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        check_request_write(&self.name, self.size(), &self.limits, operation, offset, len)
    }
}

impl Content {
    fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Piece> {
        let end = offset + len;
        let mut at = offset;
        std::iter::from_fn(move || {
            if at == end {
                return None;
            }
            let chunk = at / CHUNK_LEN;
            let start = at % CHUNK_LEN;
            let len = (CHUNK_LEN - start).min(end - at);
            at += len;
            Some(Piece { chunk, start: start as usize, len: len as usize })
        })
    }

    fn chunk(&mut self, index: u64) -> &mut [u8] {
        self.chunks.entry(index).or_insert_with(|| vec![0; CHUNK_LEN as usize].into())
    }

    fn write(&mut self, offset: u64, mut data: &[u8]) {
        self.size = self.size.max(offset + data.len() as u64);
        for piece in Self::pieces(offset, data.len() as u64) {
            let (now, rest) = data.split_at(piece.len);
            self.chunk(piece.chunk)[piece.start..][..piece.len].copy_from_slice(now);
            data = rest;
        }
    }

    fn read(&self, offset: u64, len: usize) -> Bytes {
        let mut present =
            Self::pieces(offset, len as u64).filter(|p| self.chunks.contains_key(&p.chunk));
        if present.next().is_none() {
            return zeroes(len);
        }
        let mut data = Vec::with_capacity(len);
        for piece in Self::pieces(offset, len as u64) {
            match self.chunks.get(&piece.chunk) {
                Some(chunk) => data.extend_from_slice(&chunk[piece.start..][..piece.len]),
                None => data.resize(data.len() + piece.len, 0),
            }
        }
        Bytes::from(data)
    }

    fn zero(&mut self, offset: u64, len: u64, may_unmap: bool) {
        let whole = self.size;
        for piece in Self::pieces(offset, len) {
            let end = piece.chunk * CHUNK_LEN + (piece.start + piece.len) as u64;
            let covered = piece.start == 0 && (piece.len as u64 == CHUNK_LEN || end >= whole);
            if may_unmap && covered {
                self.chunks.remove(&piece.chunk);
            } else if !may_unmap || self.chunks.contains_key(&piece.chunk) {
                self.chunk(piece.chunk)[piece.start..][..piece.len].fill(0);
            }
        }
        self.size = self.size.max(offset + len);
    }

    fn status(&self, offset: u64, len: u64) -> BlockStatus {
        let mut found = BlockStatus { len: 0, flags: StatusFlags::default() };
        for piece in Self::pieces(offset, len) {
            let chunk = self.chunks.get(&piece.chunk);
            let zero = chunk.is_none_or(|chunk| is_zero(&chunk[piece.start..][..piece.len]));
            let flags = StatusFlags { data: chunk.is_some(), zero, allocated: true };
            if found.len > 0 && found.flags != flags {
                break;
            }
            found = BlockStatus { len: found.len + piece.len as u64, flags };
        }
        found
    }

    fn truncate(&mut self, size: u64) {
        if size < self.size {
            let _ = self.chunks.split_off(&size.div_ceil(CHUNK_LEN));
            if let Some(chunk) = self.chunks.get_mut(&(size / CHUNK_LEN)) {
                chunk[(size % CHUNK_LEN) as usize..].fill(0);
            }
        }
        self.size = size;
    }
}

impl BlockDevice for Memory {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.lock().size
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let size = self.size();
        check_request(&self.name, size, &self.limits, Operation::Read, offset, len as u64)
            .map(|()| self.lock().read(offset, len))
            .into()
    }

    fn write(&self, offset: u64, data: Bytes, _flags: WriteFlags) -> Io<'_, ()> {
        if data.is_empty() {
            return Io::ok(());
        }
        self.admit_write(Operation::Write, offset, data.len() as u64)
            .map(|()| self.lock().write(offset, &data))
            .into()
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        if len == 0 {
            return Io::ok(());
        }
        self.admit_write(Operation::WriteZeroes, offset, len)
            .map(|()| self.lock().zero(offset, len, flags.may_unmap))
            .into()
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        check_request(&self.name, self.size(), &self.limits, Operation::Discard, offset, len)
            .map(|()| self.lock().zero(offset, len, true))
            .into()
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        check_request(&self.name, self.size(), &self.limits, Operation::BlockStatus, offset, len)
            .map(|()| self.lock().status(offset, len))
            .into()
    }

    fn flush(&self, _level: FlushLevel) -> Io<'_, ()> {
        Io::ok(())
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        self.lock().truncate(size);
        Io::ok(())
    }
}
