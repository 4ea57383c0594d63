//! The hierarchy of words, in bits: no items and no granularity here.
//!
//! The last level holds the bits. Bit `n` of any other level is set if and only if word `n` of
//! the level below is not zero. Level 0 is one word.
//!
//! One rule makes clearing everything free: **a word counts only if every bit above it is set;
//! otherwise it reads as zero, whatever it contains.** So [`Levels::clear`] zeroes the root and
//! touches nothing else, and a word that is written while the bit above it is clear is assigned
//! and not merged. The price is that every look-up starts at the root; the upper levels are so
//! small that they stay in the cache.

/// Bits of a word, as a power of two.
pub(crate) const WORD_LOG2: u32 = 6;
/// Words of a chunk, the unit in which memory is allocated: one page.
const CHUNK_WORDS: usize = 512;

type Chunk = Box<[u64; CHUNK_WORDS]>;

/// One level: an array of words that is allocated where it is written to.
#[derive(Debug, Clone, Default)]
struct Level {
    words: u64,
    /// Empty until the first store.
    chunks: Vec<Option<Chunk>>,
    allocated: usize,
}

impl Level {
    fn new(words: u64) -> Self {
        Level { words, ..Level::default() }
    }

    fn load(&self, word: u64) -> u64 {
        debug_assert!(word < self.words);
        let (chunk, index) = locate(word);
        match self.chunks.get(chunk) {
            Some(Some(words)) => words[index],
            _ => 0,
        }
    }

    fn store(&mut self, word: u64, value: u64) {
        debug_assert!(word < self.words);
        let (chunk, index) = locate(word);
        if chunk >= self.chunks.len() {
            self.grow_table();
        }
        let words = self.chunks[chunk].get_or_insert_with(|| {
            self.allocated += 1;
            Box::new([0; CHUNK_WORDS])
        });
        words[index] = value;
    }

    fn grow_table(&mut self) {
        let table_len = (self.words as usize).div_ceil(CHUNK_WORDS);
        if self.chunks.is_empty() {
            // Zeroed by the allocator: a large table costs nothing until it is used.
            self.chunks = vec![None; table_len];
        } else {
            self.chunks.resize_with(table_len, || None);
        }
    }

    fn resize(&mut self, words: u64) {
        self.words = words;
        let table_len = (words as usize).div_ceil(CHUNK_WORDS);
        for chunk in self.chunks.drain(table_len.min(self.chunks.len())..) {
            self.allocated -= usize::from(chunk.is_some());
        }
    }

    fn memory_bytes(&self) -> usize {
        self.allocated * size_of::<[u64; CHUNK_WORDS]>()
            + self.chunks.capacity() * size_of::<Option<Chunk>>()
    }
}

fn locate(word: u64) -> (usize, usize) {
    ((word / CHUNK_WORDS as u64) as usize, (word % CHUNK_WORDS as u64) as usize)
}

/// Bits `low` to `high` of a word, both included.
fn mask(low: u64, high: u64) -> u64 {
    debug_assert!(low <= high && high < 64);
    (!0 << low) & (!0 >> (63 - high))
}

/// Words that hold `bits` bits; at least one.
pub(crate) fn words_for(bits: u64) -> u64 {
    bits.div_ceil(64).max(1)
}

/// A bitmap with its summary levels and the number of bits set.
#[derive(Debug, Clone)]
pub(crate) struct Levels {
    /// Root first, bits last. Never empty.
    levels: Vec<Level>,
    bits: u64,
    count: u64,
}

impl Levels {
    pub(crate) fn new(bits: u64) -> Self {
        let mut levels = Vec::new();
        let mut words = words_for(bits);
        levels.push(Level::new(words));
        while words > 1 {
            words = words_for(words);
            levels.push(Level::new(words));
        }
        levels.reverse();
        Levels { levels, bits, count: 0 }
    }

    pub(crate) fn bits(&self) -> u64 {
        self.bits
    }

    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// Words of the last level.
    pub(crate) fn words(&self) -> u64 {
        self.levels[self.leaf()].words
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        let table = self.levels.capacity() * size_of::<Level>();
        table + self.levels.iter().map(Level::memory_bytes).sum::<usize>()
    }

    fn leaf(&self) -> usize {
        self.levels.len() - 1
    }

    /// How far a bit number of the last level is shifted to become one of `level`.
    fn shift(&self, level: usize) -> u32 {
        (self.leaf() - level) as u32 * WORD_LOG2
    }

    /// Clears every bit in constant time. Memory is kept.
    pub(crate) fn clear(&mut self) {
        if self.count > 0 {
            self.levels[0].store(0, 0);
            self.count = 0;
        }
    }

    /// Word `word` of `level`, or zero if it does not count.
    fn word_at(&self, level: usize, word: u64) -> u64 {
        for above in 0..level {
            let bit = word >> ((level - 1 - above) as u32 * WORD_LOG2);
            if self.levels[above].load(bit >> WORD_LOG2) >> (bit & 63) & 1 == 0 {
                return 0;
            }
        }
        self.levels[level].load(word)
    }

    /// Word `word` of the last level.
    pub(crate) fn word(&self, word: u64) -> u64 {
        self.word_at(self.leaf(), word)
    }

    pub(crate) fn get(&self, bit: u64) -> bool {
        self.word(bit >> WORD_LOG2) >> (bit & 63) & 1 != 0
    }

    /// Sets the bits `first` to `last`, both included, and returns how many were clear.
    pub(crate) fn set(&mut self, first: u64, last: u64) -> u64 {
        debug_assert!(first <= last && last < self.bits);
        let added = self.set_in(0, 0, true, first, last);
        self.count += added;
        added
    }

    fn set_in(&mut self, level: usize, word: u64, counts: bool, first: u64, last: u64) -> u64 {
        let shift = self.shift(level);
        let (low, high) = (first >> shift, last >> shift);
        let old = if counts { self.levels[level].load(word) } else { 0 };
        let new = old | mask(low & 63, high & 63);
        let mut added = 0;
        if level == self.leaf() {
            added = u64::from((new ^ old).count_ones());
        } else {
            for child in low..=high {
                let start = child << shift;
                let end = start | !(!0 << shift);
                let child_counts = old >> (child & 63) & 1 != 0;
                added +=
                    self.set_in(level + 1, child, child_counts, first.max(start), last.min(end));
            }
        }
        if new != old || !counts {
            self.levels[level].store(word, new);
        }
        added
    }

    /// Sets those bits of word `word` that are set in `bits`.
    pub(crate) fn or_word(&mut self, word: u64, bits: u64) {
        if bits == 0 {
            return;
        }
        let leaf = self.leaf();
        let mut counts = true;
        for level in 0..leaf {
            let bit = word >> ((leaf - 1 - level) as u32 * WORD_LOG2);
            let old = if counts { self.levels[level].load(bit >> WORD_LOG2) } else { 0 };
            let new = old | 1 << (bit & 63);
            if new != old || !counts {
                self.levels[level].store(bit >> WORD_LOG2, new);
            }
            counts = new == old;
        }
        let old = if counts { self.levels[leaf].load(word) } else { 0 };
        self.levels[leaf].store(word, old | bits);
        self.count += u64::from((bits & !old).count_ones());
    }

    /// Clears the bits `first` to `last`, both included, and returns how many were set.
    pub(crate) fn reset(&mut self, first: u64, last: u64) -> u64 {
        debug_assert!(first <= last && last < self.bits);
        if self.count == 0 {
            return 0;
        }
        let removed = if first == 0 && last == self.bits - 1 {
            let all = self.count;
            self.clear();
            return all;
        } else {
            self.reset_in(0, 0, first, last).0
        };
        self.count -= removed;
        removed
    }

    /// Clears a range below a word that counts. Returns how many bits were set, and whether the
    /// word has become zero.
    fn reset_in(&mut self, level: usize, word: u64, first: u64, last: u64) -> (u64, bool) {
        let shift = self.shift(level);
        let mask = mask(first >> shift & 63, last >> shift & 63);
        let old = self.levels[level].load(word);
        let mut new = old & !mask;
        let mut removed = 0;
        if level == self.leaf() {
            removed = u64::from((old & mask).count_ones());
        } else {
            let mut touched = old & mask;
            while touched != 0 {
                let index = u64::from(touched.trailing_zeros());
                touched &= touched - 1;
                let child = word << WORD_LOG2 | index;
                let start = child << shift;
                let end = start | !(!0 << shift);
                if first <= start && end <= last {
                    removed += self.count_in(level + 1, child);
                } else {
                    let (below, empty) =
                        self.reset_in(level + 1, child, first.max(start), last.min(end));
                    removed += below;
                    new |= u64::from(!empty) << index;
                }
            }
        }
        if new != old {
            self.levels[level].store(word, new);
        }
        (removed, new == 0)
    }

    fn count_in(&self, level: usize, word: u64) -> u64 {
        let mut bits = self.levels[level].load(word);
        if level == self.leaf() {
            return u64::from(bits.count_ones());
        }
        let mut count = 0;
        while bits != 0 {
            count += self.count_in(level + 1, word << WORD_LOG2 | u64::from(bits.trailing_zeros()));
            bits &= bits - 1;
        }
        count
    }

    /// The first set bit at or after `from`.
    pub(crate) fn next_set(&self, from: u64) -> Option<u64> {
        if from >= self.bits || self.count == 0 {
            return None;
        }
        self.next_set_in(0, 0, from)
    }

    fn next_set_in(&self, level: usize, word: u64, from: u64) -> Option<u64> {
        let shift = self.shift(level);
        let mut bits = self.levels[level].load(word) & (!0 << (from >> shift & 63));
        while bits != 0 {
            let child = word << WORD_LOG2 | u64::from(bits.trailing_zeros());
            if level == self.leaf() {
                return Some(child);
            }
            // Only the first child can turn out to have nothing at or after `from`.
            let found = self.next_set_in(level + 1, child, from.max(child << shift));
            if found.is_some() {
                return found;
            }
            bits &= bits - 1;
        }
        None
    }

    /// The first clear bit in `from..end`; `end` is at most the number of bits.
    pub(crate) fn next_clear(&self, from: u64, end: u64) -> Option<u64> {
        debug_assert!(end <= self.bits);
        if from >= end {
            return None;
        }
        let leaf = self.leaf();
        let mut word = from >> WORD_LOG2;
        let mut clear = !self.word(word) & (!0 << (from & 63));
        // Which of the words around `word` count; one look-up from the root serves 64 words.
        let mut parent = if leaf > 0 { self.word_at(leaf - 1, word >> WORD_LOG2) } else { 1 };
        while clear == 0 {
            word += 1;
            if word << WORD_LOG2 >= end {
                return None;
            }
            if word & 63 == 0 {
                parent = self.word_at(leaf - 1, word >> WORD_LOG2);
            }
            let counts = parent >> (word & 63) & 1 != 0;
            clear = if counts { !self.levels[leaf].load(word) } else { !0 };
        }
        let bit = word << WORD_LOG2 | u64::from(clear.trailing_zeros());
        (bit < end).then_some(bit)
    }

    /// The first word of the last level, at or after `from`, that is not zero.
    pub(crate) fn next_word(&self, from: u64) -> Option<(u64, u64)> {
        self.next_bits(from.checked_mul(64)?)
    }

    /// The word of the first set bit at or after `from`, and what it holds from that bit on.
    pub(crate) fn next_bits(&self, from: u64) -> Option<(u64, u64)> {
        let bit = self.next_set(from)?;
        let word = bit >> WORD_LOG2;
        Some((word, self.levels[self.leaf()].load(word) & (!0 << (bit & 63))))
    }

    /// Changes the number of bits. New bits are clear, bits beyond the end are dropped.
    pub(crate) fn resize(&mut self, bits: u64) {
        if bits < self.bits {
            self.reset(bits, self.bits - 1);
        }
        self.bits = bits;
        let target = Levels::new(bits).levels;
        while self.levels.len() > target.len() {
            // Everything left lies below the first word of the next level: it is the new root.
            let root = self.word_at(1, 0);
            self.levels[1].store(0, root);
            self.levels.remove(0);
        }
        while self.levels.len() < target.len() {
            let root = self.levels[0].load(0);
            let mut above = Level::new(1);
            above.store(0, u64::from(root != 0));
            self.levels.insert(0, above);
        }
        for (level, target) in self.levels.iter_mut().zip(&target) {
            level.resize(target.words);
        }
    }

    /// Gives back the memory of chunks in which no bit is set.
    pub(crate) fn shrink(&mut self) {
        for level in (1..self.levels.len()).rev() {
            for chunk in 0..self.levels[level].chunks.len() {
                if self.levels[level].chunks[chunk].is_none() {
                    continue;
                }
                let first = (chunk * CHUNK_WORDS) as u64 >> WORD_LOG2;
                let end =
                    (first + (CHUNK_WORDS as u64 >> WORD_LOG2)).min(self.levels[level - 1].words);
                if (first..end).all(|above| self.word_at(level - 1, above) == 0) {
                    self.levels[level].chunks[chunk] = None;
                    self.levels[level].allocated -= 1;
                }
            }
            if self.levels[level].allocated == 0 {
                self.levels[level].chunks = Vec::new();
            }
        }
    }

    /// Checks everything that this module promises. For tests: the cost is that of the whole map.
    #[cfg(test)]
    pub(crate) fn check(&self) {
        let count: u64 = (0..self.words()).map(|w| u64::from(self.word(w).count_ones())).sum();
        assert_eq!(count, self.count, "the count must be that of the bits");
        for level in 0..self.leaf() {
            for below in 0..self.levels[level + 1].words {
                let bit = self.word_at(level, below >> WORD_LOG2) >> (below & 63) & 1 != 0;
                assert_eq!(
                    bit,
                    self.word_at(level + 1, below) != 0,
                    "bit {below} of level {level} must say whether the word below is zero"
                );
            }
        }
        assert_eq!(self.levels[0].words, 1);
        for level in &self.levels {
            assert_eq!(level.allocated, level.chunks.iter().flatten().count());
        }
    }
}
