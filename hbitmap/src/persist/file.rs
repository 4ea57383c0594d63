//! An open file: the same maps in memory and in the mapping, and a header.

use std::path::PathBuf;
use std::sync::Arc;

use super::backing::Backing;
use super::header::Header;
use super::in_flight::InFlightWords;
use super::layout::{CHUNK_BITS, CHUNK_WORDS, Layout, PAGE};
use super::words::Words;
use super::{LastStop, Tag};
use crate::levels::Levels;
use crate::{Error, HBitmap, Result};

/// The maps are looked up in memory only. What changes there is stored to the file before the
/// call returns.
#[derive(Debug)]
pub(super) struct MapFile {
    pub(super) path: PathBuf,
    pub(super) words: Arc<Words>,
    /// Holds the lock; after the mapping, because it is dropped in this order.
    pub(super) _file: Backing,
    pub(super) layout: Layout,
    pub(super) header: Header,
    /// The copy of the header that is overwritten last.
    pub(super) newest_copy: u64,
    pub(super) maps: Vec<HBitmap>,
    pub(super) in_flight: InFlightWords,
    pub(super) last_stop: LastStop,
    /// The present boot. In the header it stands when the last user's loss of power is made good.
    pub(super) boot_id: [u8; 16],
    pub(super) flush_failed: bool,
}

impl MapFile {
    pub(super) fn set(&mut self, map: usize, start: u64, count: u64) -> bool {
        let Some((first, last)) = self.maps[map].groups(start, count) else { return false };
        self.set_groups(map, first, last)
    }

    pub(super) fn set_groups(&mut self, map: usize, first: u64, last: u64) -> bool {
        let changed = self.maps[map].levels_mut().set(first, last) > 0;
        if changed {
            self.store_groups(map, first, last, true);
        }
        changed
    }

    pub(super) fn reset(&mut self, map: usize, start: u64, count: u64) -> bool {
        let Some((first, last)) = self.maps[map].whole_groups(start, count) else { return false };
        let changed = self.maps[map].levels_mut().reset(first, last) > 0;
        if changed {
            self.store_groups(map, first, last, false);
        }
        changed
    }

    pub(super) fn or_assign(&mut self, map: usize, other: &HBitmap) -> Result<()> {
        let size = self.header.size;
        if other.size() != size {
            return Err(Error::SizesDiffer { left: size, right: other.size() });
        }
        for area in other.dirty_areas(0..size) {
            self.set(map, area.start, area.end - area.start);
        }
        Ok(())
    }

    /// Sets in map `to` what is set in map `from`.
    pub(super) fn or_from(&mut self, to: usize, from: usize) {
        let source = self.maps[from].take();
        for area in source.dirty_areas(0..self.header.size) {
            self.set(to, area.start, area.end - area.start);
        }
        self.maps[from] = source;
    }

    pub(super) fn reset_all(&mut self, map: usize) {
        if !self.maps[map].is_empty() {
            let mut header = self.header;
            renew(&mut header, map);
            self.commit(header);
            self.maps[map].reset_all();
        }
    }

    pub(super) fn tag(&self, map: usize) -> Tag {
        self.header.entries[map].tag
    }

    pub(super) fn set_tag(&mut self, map: usize, tag: Tag) {
        if self.tag(map) != tag {
            let mut header = self.header;
            header.entries[map].tag = tag;
            self.commit(header);
        }
    }

    /// Makes `header` the one that counts, all at once.
    pub(super) fn commit(&mut self, mut header: Header) {
        header.sequence = self.header.sequence + 1;
        self.header = header;
        // The copy that counts must stay whole until the other one does.
        self.store_header(1 - self.newest_copy);
        self.store_header(self.newest_copy);
    }

    fn store_header(&self, copy: u64) {
        let bytes = self.header.encode();
        let (words, _) = bytes.as_chunks();
        let at = copy * PAGE / 8;
        // Without its first word, the magic, a copy is invalid.
        self.words.store(at, 0);
        for (index, word) in (0..).zip(words).skip(1) {
            self.words.store(at + index, u64::from_le_bytes(*word));
        }
        self.words.store(at, u64::from_le_bytes(words[0]));
    }

    /// Stores groups that have just been set or reset in memory.
    fn store_groups(&self, map: usize, first: u64, last: u64, set: bool) {
        let bank = self.header.entries[map].bank;
        let levels = self.maps[map].levels();
        for chunk in first / CHUNK_BITS..=last / CHUNK_BITS {
            if set || self.chunk_is_used(map, chunk) {
                self.unseal(map, chunk);
            } else {
                continue;
            }
            let first = first.max(chunk * CHUNK_BITS);
            let last = last.min((chunk + 1) * CHUNK_BITS - 1);
            for word in first / 64..=last / 64 {
                let whole = word * 64 >= first && word * 64 + 63 <= last;
                let bits = match (whole, set) {
                    (true, true) => !0,
                    (true, false) => 0,
                    (false, _) => levels.word(word),
                };
                self.words.store(self.layout.data_word(bank, word), bits);
            }
        }
    }

    fn chunk_is_used(&self, map: usize, chunk: u64) -> bool {
        let entry = &self.header.entries[map];
        self.words.load(self.layout.state_word(entry.bank, chunk)) >> 1 == entry.generation
    }

    /// Makes a chunk ready to be written to.
    fn unseal(&self, map: usize, chunk: u64) {
        let entry = &self.header.entries[map];
        let state = self.layout.state_word(entry.bank, chunk);
        let unsealed = entry.generation << 1;
        if self.words.load(state) == unsealed {
            return;
        }
        if !self.chunk_is_used(map, chunk) {
            let data = self.layout.data_word(entry.bank, chunk * CHUNK_WORDS);
            self.words.clear(data..data + CHUNK_WORDS);
        }
        self.words.store(state, unsealed);
    }

    /// A chunk that is on stable storage with a checksum, and then written to, would be damage after
    /// a loss of power that keeps the one and not the other.
    pub(super) fn unseal_all(&self) {
        for map in 0..self.header.maps {
            for chunk in 0..self.layout.chunks {
                if self.chunk_is_used(map, chunk) {
                    self.unseal(map, chunk);
                }
            }
        }
    }

    /// Whether there is a log from now on: everything until now is on stable storage without it.
    pub(super) fn set_logged(&mut self, logged: bool) -> Result<()> {
        if logged {
            self.unseal_all();
        } else if !self.header.logged {
            return Ok(());
        }
        self.sync(0..self.layout.file_len())?;
        let header = Header { logged, boot_id: self.boot_id, ..self.header };
        self.commit(header);
        self.sync(self.layout.header_bytes())
    }

    pub(super) fn flusher(&self) -> MapFlush {
        let words = Arc::clone(&self.words);
        let failed = self.flush_failed;
        MapFlush { path: self.path.clone(), words, len: self.layout.file_len(), failed }
    }

    /// Gives every chunk that has been written to its checksum again.
    fn seal(&self) {
        for (map, entry) in self.header.entries[..self.header.maps].iter().enumerate() {
            let unsealed = entry.generation << 1;
            for chunk in 0..self.layout.chunks {
                let state = self.layout.state_word(entry.bank, chunk);
                if self.words.load(state) == unsealed {
                    let crc = chunk_crc(self.maps[map].levels(), chunk);
                    self.words.store(state + 1, u64::from(crc));
                    self.words.store(state, unsealed | 1);
                }
            }
        }
    }

    pub(super) fn tables_crc(&self) -> u32 {
        let bytes = self.layout.tables_bytes();
        let mut hash = crc32fast::Hasher::new();
        for word in bytes.start / 8..bytes.end / 8 {
            hash.update(&self.words.load(word).to_le_bytes());
        }
        hash.finalize()
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        if self.flush_failed {
            return Err(Error::Sticky { path: self.path.clone() });
        }
        // Bits first: a seal on stable storage means that its page is there too.
        self.sync(self.layout.data_bytes())?;
        self.seal();
        self.sync(0..self.layout.tables_bytes().end)
    }

    pub(super) fn close(&mut self) -> Result<()> {
        self.flush()?;
        let mut header = self.header;
        header.clean = Some(self.tables_crc());
        self.commit(header);
        self.sync(self.layout.header_bytes())
    }

    pub(super) fn sync(&mut self, bytes: std::ops::Range<u64>) -> Result<()> {
        let synced = self.words.flush(bytes);
        self.flush_failed |= synced.is_err();
        synced.map_err(Error::io(&self.path, "flush"))
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let maps: usize = self.maps.iter().map(HBitmap::memory_bytes).sum();
        maps + self.in_flight.memory_bytes()
    }
}

/// Puts maps on stable storage, from any thread, while they are in use.
#[derive(Debug, Clone)]
pub struct MapFlush {
    path: PathBuf,
    words: Arc<Words>,
    len: u64,
    failed: bool,
}

impl MapFlush {
    /// Waits until everything that was in the maps when it was called is on stable storage. Chunks
    /// get no checksums.
    ///
    /// # Errors
    /// [`Error::Io`]: then it is unknown what is there, and a later call that succeeds says nothing.
    /// [`Error::Sticky`]: something failed before.
    pub fn run(&self) -> Result<()> {
        if self.failed {
            return Err(Error::Sticky { path: self.path.clone() });
        }
        self.words.flush(0..self.len).map_err(Error::io(&self.path, "flush"))
    }
}

/// Makes a map empty: no chunk has its new generation.
pub(super) fn renew(header: &mut Header, map: usize) {
    header.entries[map].generation = header.next_generation;
    header.next_generation += 1;
}

/// The checksum that the page of a chunk has to have.
fn chunk_crc(levels: &Levels, chunk: u64) -> u32 {
    let mut page = [0; PAGE as usize];
    let (start, end) = (chunk * CHUNK_WORDS, (chunk + 1) * CHUNK_WORDS);
    let mut at = start;
    while let Some((word, bits)) = levels.next_word(at)
        && word < end
    {
        let offset = (word - start) as usize * 8;
        page[offset..offset + 8].copy_from_slice(&bits.to_le_bytes());
        at = word + 1;
    }
    crc32fast::hash(&page)
}
