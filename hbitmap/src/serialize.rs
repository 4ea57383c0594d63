//! Bits as bytes: bit `n` of the part is bit `n % 8` of byte `n / 8`, whatever the host.

use crate::{Error, HBitmap, Result};

impl HBitmap {
    /// What the start of a part is a multiple of, in items, and its length too unless the part
    /// ends with the map. `None` if the granularity exceeds 57: such a map has no parts.
    pub fn serialization_align(&self) -> Option<u64> {
        (self.granularity_log2() < 58).then(|| 64 << self.granularity_log2())
    }

    /// The length of a part in bytes: eight for every 64 groups that it touches.
    ///
    /// # Errors
    /// [`Error::Part`] if there is no such part.
    pub fn serialization_size(&self, start: u64, count: u64) -> Result<usize> {
        let (first, end) = self.part(start, count, 0)?;
        Ok((end - first) as usize * 8)
    }

    /// Writes `count` items from `start` to `buffer`.
    ///
    /// # Errors
    /// [`Error::Part`] if there is no such part, or if the buffer's length is not
    /// [`serialization_size`](HBitmap::serialization_size).
    pub fn serialize_part(&self, start: u64, count: u64, buffer: &mut [u8]) -> Result<()> {
        let (first, _) = self.part_of_len(start, count, buffer.len())?;
        for (word, bytes) in (first..).zip(buffer.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&self.levels().word(word).to_le_bytes());
        }
        Ok(())
    }

    /// Replaces `count` items from `start` by what [`serialize_part`](HBitmap::serialize_part)
    /// wrote on another map of the same size and granularity. Bits beyond the end of the map are
    /// ignored.
    ///
    /// The map is consistent after every part: there is nothing to be finished when all parts
    /// are in.
    ///
    /// # Errors
    /// As for serialising; nothing has changed then.
    pub fn deserialize_part(&mut self, start: u64, count: u64, buffer: &[u8]) -> Result<()> {
        let (first, end) = self.part_of_len(start, count, buffer.len())?;
        self.fill(first, end, false);
        let beyond = self.bits() % 64;
        let last_word = self.bits() / 64;
        let (words, _) = buffer.as_chunks();
        for (word, bytes) in (first..).zip(words) {
            let mut bits = u64::from_le_bytes(*bytes);
            if word == last_word {
                bits &= !(!0 << beyond);
            }
            self.levels_mut().or_word(word, bits);
        }
        Ok(())
    }

    /// Replaces `count` items from `start` by clear ones, as deserialising a part of zeroes does.
    ///
    /// # Errors
    /// [`Error::Part`] if there is no such part.
    pub fn deserialize_zeroes(&mut self, start: u64, count: u64) -> Result<()> {
        let (first, end) = self.part(start, count, 0)?;
        self.fill(first, end, false);
        Ok(())
    }

    /// Replaces `count` items from `start` by dirty ones, as deserialising a part of ones does.
    ///
    /// # Errors
    /// [`Error::Part`] if there is no such part.
    pub fn deserialize_ones(&mut self, start: u64, count: u64) -> Result<()> {
        let (first, end) = self.part(start, count, 0)?;
        self.fill(first, end, true);
        Ok(())
    }

    fn fill(&mut self, first_word: u64, end_word: u64, dirty: bool) {
        let first = first_word * 64;
        let end = (end_word * 64).min(self.bits());
        if first >= end {
            return;
        }
        if dirty {
            self.levels_mut().set(first, end - 1);
        } else {
            self.levels_mut().reset(first, end - 1);
        }
    }

    fn part_of_len(&self, start: u64, count: u64, len: usize) -> Result<(u64, u64)> {
        let (first, end) = self.part(start, count, len)?;
        if (end - first) as usize * 8 == len {
            Ok((first, end))
        } else {
            Err(Error::Part { start, count, len, reason: "the buffer has the wrong length" })
        }
    }

    /// The words that a part covers; `len` is for the error only.
    fn part(&self, start: u64, count: u64, len: usize) -> Result<(u64, u64)> {
        let fail = |reason| Err(Error::Part { start, count, len, reason });
        let Some(align) = self.serialization_align() else {
            return fail("the granularity is too coarse");
        };
        if count == 0 {
            return Ok((0, 0));
        }
        let Some(last) = start.checked_add(count - 1) else {
            return fail("out of range");
        };
        let last_bit = last >> self.granularity_log2();
        if last_bit >= self.bits() {
            return fail("out of range");
        }
        if !start.is_multiple_of(align) {
            return fail("the start is not aligned");
        }
        if last_bit != self.bits() - 1 && !count.is_multiple_of(align) {
            return fail("the end is not aligned");
        }
        Ok((start / align, last / align + 1))
    }
}
