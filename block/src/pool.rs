//! Memory of payloads, used again.
//!
//! Fresh memory costs more than what is done with it: the kernel finds and zeroes every page of
//! it, and it is in no cache. So large buffers are kept when they are no longer used, the one that
//! was used last is taken first, and nobody zeroes them.

use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

/// Shorter buffers are left to the allocator, which has such pieces at hand.
const KEPT_LEN_MIN: usize = 32 << 10;
/// Longer ones are rare, and would soon be all that is kept.
const KEPT_LEN_MAX: usize = 4 << 20;
/// Most bytes that are kept for the whole process.
const KEPT_BYTES_MAX: usize = 16 << 20;
/// Lengths are rounded up to this, so that those of similar length serve for each other.
const STEP_LEN: usize = 16 << 10;
/// Processors copy at a fifth of their speed to an address that lies less than 32 bytes behind the
/// one they copy from, in its page. Pages are where the kernel copies from; and large pieces of the
/// allocator's memory lie 16 bytes behind the start of one.
const ALIGN_MIN: usize = 64;
/// Of what is kept, a buffer serves a request for this part of it at least.
const PART_MIN: usize = 2;

static KEPT: Mutex<Kept> = Mutex::new(Kept { buffers: Vec::new(), bytes: 0 });

struct Kept {
    /// The one that was used last is the last.
    buffers: Vec<Vec<u8>>,
    bytes: usize,
}

/// A buffer for data that is about to be received or read. What it holds before is arbitrary:
/// never hand out a part that has not been filled.
#[derive(Debug)]
pub struct Buffer {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// A buffer of so many bytes.
    #[must_use]
    pub fn new(len: usize) -> Self {
        Buffer::aligned(len, ALIGN_MIN)
    }

    /// A buffer of so many bytes whose address is a multiple of `align`, a power of two.
    pub(crate) fn aligned(len: usize, align: usize) -> Self {
        debug_assert!(align.is_power_of_two());
        let align = align.max(ALIGN_MIN);
        let room = len + align - 1;
        let memory = match is_kept(room) {
            true => kept().take(room).unwrap_or_else(|| vec![0; room.next_multiple_of(STEP_LEN)]),
            false => vec![0; room],
        };
        let start = memory.as_ptr().addr().wrapping_neg() & (align - 1);
        Buffer { memory, start, len }
    }

    /// What was filled in, without a copy. Its memory is kept when the last part is dropped.
    #[must_use]
    pub fn freeze(mut self) -> Bytes {
        if is_kept(self.memory.len()) {
            return Bytes::from_owner(self);
        }
        Bytes::from(std::mem::take(&mut self.memory)).slice(self.start..self.start + self.len)
    }
}

fn is_kept(len: usize) -> bool {
    (KEPT_LEN_MIN..=KEPT_LEN_MAX).contains(&len)
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if is_kept(self.memory.len()) {
            kept().put(std::mem::take(&mut self.memory));
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::ops::Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..self.start + self.len]
    }
}

impl std::ops::DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

fn kept() -> MutexGuard<'static, Kept> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Kept {
    fn take(&mut self, len: usize) -> Option<Vec<u8>> {
        let fits = |memory: &Vec<u8>| memory.len() >= len && memory.len() / PART_MIN <= len;
        let index = self.buffers.iter().rposition(fits)?;
        let memory = self.buffers.remove(index);
        self.bytes -= memory.len();
        Some(memory)
    }

    fn put(&mut self, memory: Vec<u8>) {
        self.bytes += memory.len();
        self.buffers.push(memory);
        // Those that nobody has wanted for longest.
        let mut bytes = self.bytes;
        let excess = self.buffers.iter().take_while(|memory| {
            let is_excess = bytes > KEPT_BYTES_MAX;
            bytes -= if is_excess { memory.len() } else { 0 };
            is_excess
        });
        let excess = excess.count();
        self.buffers.drain(..excess);
        self.bytes = bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(len: usize) -> Vec<u8> {
        vec![0; len]
    }

    #[test]
    fn what_was_used_last_is_used_first() {
        let mut kept = Kept { buffers: Vec::new(), bytes: 0 };
        for len in [64 << 10, 1 << 20, 64 << 10] {
            kept.put(memory(len));
        }
        let last = kept.buffers[2].as_ptr();
        let taken = kept.take(50 << 10).unwrap();
        assert_eq!(taken.as_ptr(), last);
        assert_eq!(kept.take((64 << 10) + 1), None, "neither too short nor far too long");
        assert_eq!(
            kept.take(300 << 10),
            None,
            "what is counted for a request is at least half of what it holds"
        );
        assert_eq!(kept.take(600 << 10).unwrap().len(), 1 << 20);
        assert_eq!(kept.bytes, 64 << 10);
    }

    #[test]
    fn no_more_is_kept_than_the_bound() {
        let mut kept = Kept { buffers: Vec::new(), bytes: 0 };
        for _ in 0..100 {
            kept.put(memory(1 << 20));
        }
        assert_eq!((kept.buffers.len(), kept.bytes), (16, KEPT_BYTES_MAX));
    }

    #[test]
    fn buffers_have_the_length_that_was_asked_for_whoever_had_their_memory() {
        for len in [0, 1, 5000, KEPT_LEN_MIN, KEPT_LEN_MIN + 1, 1 << 20, KEPT_LEN_MAX + 1] {
            for _ in 0..3 {
                let mut buffer = Buffer::new(len);
                assert_eq!(buffer.len(), len);
                buffer.fill(7);
                let bytes = buffer.freeze();
                assert!(bytes.len() == len && bytes.iter().all(|&byte| byte == 7));
            }
        }
    }

    #[test]
    fn aligned_buffers_are_aligned_and_keep_their_bytes() {
        for align in [1, 4, 512, 4096, 65536] {
            for len in [1000, 100_000] {
                let mut buffer = Buffer::aligned(len, align);
                assert_eq!(buffer.len(), len);
                assert!(buffer.as_ptr().addr().is_multiple_of(align.max(ALIGN_MIN)));
                buffer[10..13].copy_from_slice(&[1, 2, 3]);
                let address = buffer.as_ptr();
                let bytes = buffer.freeze();
                assert_eq!((bytes.len(), &bytes[10..13]), (len, &[1, 2, 3][..]));
                assert_eq!(bytes.as_ptr(), address, "no copy");
            }
        }
    }

    #[test]
    fn memory_is_not_used_again_while_a_part_of_it_is_held() {
        let mut buffer = Buffer::new(100 << 10);
        buffer.fill(1);
        let part = buffer.freeze().slice(10..20);
        let mut others: Vec<_> = (0..4).map(|_| Buffer::new(100 << 10)).collect();
        others.iter_mut().for_each(|other| other.fill(2));
        assert_eq!(part, [1; 10][..]);
    }
}
