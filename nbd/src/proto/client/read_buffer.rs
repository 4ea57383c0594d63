use bytes::{BufMut, Bytes, BytesMut};

use super::ReplyError;

/// Most separate pieces that a server may leave between the parts of one read that it has sent.
const PIECES_MAX: usize = 4096;

/// The data of one read while they arrive.
///
/// Almost every server sends them in ascending order: then they are appended to a buffer of the
/// right size, without zeroing it first. Only when a chunk comes out of order is the whole range
/// laid out and what has arrived written down.
#[derive(Debug, Default)]
pub(super) struct ReadBuffer {
    data: BytesMut,
    /// Length of the whole read, in bytes.
    len: u32,
    /// Ranges that have arrived, ascending, none touching another; used out of order only.
    pieces: Vec<(u32, u32)>,
    scattered: bool,
    /// Where the next byte goes, relative to the read; used out of order only.
    position: u32,
}

impl ReadBuffer {
    pub(super) fn new(len: u32) -> Self {
        ReadBuffer { len, ..Self::default() }
    }

    /// Length of the whole read, in bytes.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// A chunk is about to bring `len` bytes for `start`, relative to the read. Allocates.
    pub(super) fn begin(&mut self, start: u64, len: u32) -> Result<(), ReplyError> {
        let start = u32::try_from(start).map_err(|_| ReplyError::OutsideRequest)?;
        if start > self.len || len > self.len - start {
            return Err(ReplyError::OutsideRequest);
        }
        if self.data.capacity() == 0 {
            self.data = BytesMut::with_capacity(self.len as usize);
        }
        if !self.scattered && start as usize == self.data.len() {
            return Ok(());
        }
        self.scatter();
        self.insert(start, start + len)?;
        self.position = start;
        Ok(())
    }

    fn scatter(&mut self) {
        if !self.scattered {
            let arrived = self.data.len() as u32;
            if arrived > 0 {
                self.pieces.push((0, arrived));
            }
            self.data.resize(self.len as usize, 0);
            self.scattered = true;
        }
    }

    fn insert(&mut self, start: u32, end: u32) -> Result<(), ReplyError> {
        let index = self.pieces.partition_point(|piece| piece.1 <= start);
        let after = self.pieces.get(index);
        if after.is_some_and(|piece| piece.0 < end) {
            return Err(ReplyError::Overlap);
        }
        let joins_after = after.is_some_and(|piece| piece.0 == end);
        let joins_before =
            index.checked_sub(1).and_then(|i| self.pieces.get(i)).is_some_and(|p| p.1 == start);
        match (joins_before, joins_after) {
            (true, true) => {
                self.pieces[index - 1].1 = self.pieces[index].1;
                self.pieces.remove(index);
            }
            (true, false) => self.pieces[index - 1].1 = end,
            (false, true) => self.pieces[index].0 = start,
            (false, false) if self.pieces.len() == PIECES_MAX => {
                return Err(ReplyError::TooManyChunks);
            }
            (false, false) => self.pieces.insert(index, (start, end)),
        }
        Ok(())
    }

    /// Takes in bytes of the chunk that was begun; never more than it announced.
    pub(super) fn put(&mut self, bytes: &[u8]) {
        if self.scattered {
            let start = self.position as usize;
            self.data[start..start + bytes.len()].copy_from_slice(bytes);
            self.position += bytes.len() as u32;
        } else {
            self.data.put_slice(bytes);
        }
    }

    /// The chunk that was begun is a hole of `len` bytes.
    pub(super) fn put_zeroes(&mut self, len: u32) {
        // Laid out ranges are zero already.
        if !self.scattered {
            self.data.put_bytes(0, len as usize);
        }
    }

    /// Where bytes can be received without a copy; `None` if they come out of order.
    pub(super) fn spare(&mut self) -> Option<&mut BytesMut> {
        (!self.scattered).then_some(&mut self.data)
    }

    /// The whole read, if all of it has arrived.
    pub(super) fn finish(self) -> Result<Bytes, ReplyError> {
        let complete = if self.scattered {
            self.pieces == [(0, self.len)]
        } else {
            self.data.len() == self.len as usize
        };
        if complete { Ok(self.data.freeze()) } else { Err(ReplyError::Incomplete) }
    }
}
