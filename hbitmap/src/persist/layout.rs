//! Where everything lies in the file.

use std::ops::Range;

pub(super) const PAGE: u64 = 4096;
/// Words of the bitmap in a chunk: a page.
pub(super) const CHUNK_WORDS: u64 = PAGE / 8;
/// Bits in a chunk.
pub(super) const CHUNK_BITS: u64 = PAGE * 8;
/// Bytes of a chunk's place in the table.
const TABLE_ENTRY_BYTES: u64 = 16;

#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) banks: u64,
    /// In each bank.
    pub(super) chunks: u64,
    /// Words for what is in flight.
    pub(super) in_flight: u64,
}

impl Layout {
    pub(super) fn new(bits: u64, banks: usize, in_flight: u64) -> Self {
        Layout { banks: banks as u64, chunks: bits.div_ceil(CHUNK_BITS).max(1), in_flight }
    }

    fn table_bytes(&self) -> u64 {
        (self.chunks * TABLE_ENTRY_BYTES).next_multiple_of(PAGE)
    }

    pub(super) fn file_len(&self) -> u64 {
        self.data_bytes().end
    }

    /// Both copies of the header.
    pub(super) fn header_bytes(&self) -> Range<u64> {
        0..2 * PAGE
    }

    pub(super) fn in_flight_words(&self) -> Range<u64> {
        let start = self.header_bytes().end / 8;
        start..start + self.in_flight
    }

    /// The tables of all banks.
    pub(super) fn tables_bytes(&self) -> Range<u64> {
        let start = self.in_flight_words().end * 8;
        start..start + self.banks * self.table_bytes()
    }

    pub(super) fn data_bytes(&self) -> Range<u64> {
        let start = self.tables_bytes().end;
        start..start + self.banks * self.chunks * PAGE
    }

    /// The word with a chunk's state; the one with its checksum follows.
    pub(super) fn state_word(&self, bank: u32, chunk: u64) -> u64 {
        debug_assert!(u64::from(bank) < self.banks && chunk < self.chunks);
        let table = self.tables_bytes().start + u64::from(bank) * self.table_bytes();
        (table + chunk * TABLE_ENTRY_BYTES) / 8
    }

    /// Word `word` of a bank's bitmap.
    pub(super) fn data_word(&self, bank: u32, word: u64) -> u64 {
        debug_assert!(u64::from(bank) < self.banks && word < self.chunks * CHUNK_WORDS);
        (self.data_bytes().start + u64::from(bank) * self.chunks * PAGE) / 8 + word
    }
}
