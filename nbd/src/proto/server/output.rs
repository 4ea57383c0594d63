//! What has to be written to a socket, as a queue of segments.

use std::collections::VecDeque;
use std::io::IoSlice;

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Payloads up to this many bytes are copied next to their header: one segment less costs more
/// than so few bytes.
const COPY_LEN_MAX: usize = 256;

/// A queue of bytes: small pieces are gathered, large ones are kept as they are.
#[derive(Debug, Default)]
pub struct Output {
    segments: VecDeque<Bytes>,
    /// Small pieces that come after all segments.
    tail: BytesMut,
    len: usize,
}

impl Output {
    /// Nothing to be written.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// In bytes.
    #[must_use]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Nothing is left to be written.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Appends a copy.
    pub fn put_slice(&mut self, bytes: &[u8]) {
        self.tail.put_slice(bytes);
        self.len += bytes.len();
    }

    /// Appends a payload without copying it, unless it is tiny.
    pub fn put_bytes(&mut self, bytes: Bytes) {
        if bytes.len() <= COPY_LEN_MAX {
            return self.put_slice(&bytes);
        }
        if !self.tail.is_empty() {
            self.segments.push_back(self.tail.split().freeze());
        }
        self.len += bytes.len();
        self.segments.push_back(bytes);
    }

    /// Fills `slices` from the front of the queue; returns how many were filled.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        let tail = Some(&self.tail[..]).filter(|tail| !tail.is_empty());
        let parts = self.segments.iter().map(|segment| &segment[..]).chain(tail);
        for (slot, part) in slices.iter_mut().zip(parts) {
            *slot = IoSlice::new(part);
            count += 1;
        }
        count
    }

    /// The first `count` bytes have been written.
    ///
    /// # Panics
    /// If there were not so many.
    pub fn advance(&mut self, mut count: usize) {
        self.len -= count;
        while let Some(front) = self.segments.front_mut() {
            if count < front.len() {
                front.advance(count);
                return;
            }
            count -= front.len();
            self.segments.pop_front();
        }
        self.tail.advance(count);
    }
}
