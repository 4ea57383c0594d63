//! L1 table and L2 tables: what is in memory of them, and how it gets there.
//!
//! Memory is a copy of the file: a change is in the file before it is in memory, so nothing here
//! is ever dirty.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use brep_block::{Operation, Result};
use bytes::Bytes;
use tokio::sync::Mutex as AsyncMutex;

use crate::entry::{Decoded, Entry};
use crate::geometry::{COPIED, Geometry, OFFSET_MASK};
use crate::header::{decode_table, encode_table};
use crate::image::{Image, lock};
use crate::regions::Kind;

const SHARDS: usize = 16;

/// The active L1 table and a cache of L2 tables.
#[derive(Debug)]
pub(crate) struct Map {
    pub(crate) l1: Mutex<L1>,
    cache: Mutex<Cache>,
    /// By L1 index: a table is loaded once, and not while it is being moved.
    loads: [AsyncMutex<()>; SHARDS],
}

/// The active L1 table as it stands in the file.
#[derive(Debug)]
pub(crate) struct L1 {
    pub(crate) offset: u64,
    pub(crate) entries: Vec<u64>,
}

#[derive(Debug, Default)]
struct Cache {
    tables: HashMap<u64, (Arc<L2Table>, u64)>,
    clock: u64,
    /// Number of tables that are kept, apart from those in use.
    max: usize,
}

/// An L2 table in memory.
#[derive(Debug)]
pub(crate) struct L2Table {
    /// Its place in the file, in bytes.
    pub(crate) offset: u64,
    words: Mutex<Vec<u64>>,
}

impl L2Table {
    pub(crate) fn new(offset: u64, words: Vec<u64>) -> Self {
        L2Table { offset, words: Mutex::new(words) }
    }

    /// Calls `visit` for the entries from `index` on, until it says `false`.
    pub(crate) fn visit(
        &self,
        g: &Geometry,
        index: usize,
        mut visit: impl FnMut(usize, Decoded) -> bool,
    ) {
        let words = lock(&self.words);
        for i in index..g.l2_entries() as usize {
            if !visit(i, decode_at(g, &words, i)) {
                return;
            }
        }
    }

    /// A copy of the words of entries `from..to`.
    pub(crate) fn words(&self, g: &Geometry, from: usize, to: usize) -> Vec<u64> {
        let n = g.entry_words();
        lock(&self.words).get(from * n..to * n).unwrap_or_default().to_vec()
    }

    pub(crate) fn store(&self, g: &Geometry, from: usize, new: &[u64]) {
        let n = g.entry_words();
        if let Some(old) = lock(&self.words).get_mut(from * n..from * n + new.len()) {
            old.copy_from_slice(new);
        }
    }
}

fn decode_at(g: &Geometry, words: &[u64], index: usize) -> Decoded {
    let at = index * g.entry_words();
    let word = words.get(at).copied().unwrap_or(0);
    let bitmap = if g.extended_l2 { words.get(at + 1).copied().unwrap_or(0) } else { 0 };
    Entry::decode(g, word, bitmap)
}

impl Map {
    pub(crate) fn new(l1: L1, tables_max: usize) -> Self {
        Map {
            l1: Mutex::new(l1),
            cache: Mutex::new(Cache { max: tables_max.max(2), ..Cache::default() }),
            loads: Default::default(),
        }
    }

    /// The raw L1 entry; 0 beyond the end of the table.
    pub(crate) fn l1_entry(&self, index: usize) -> u64 {
        lock(&self.l1).entries.get(index).copied().unwrap_or(0)
    }

    /// The next used L1 entry at or after `index`, below `end`.
    pub(crate) fn next_used(&self, index: usize, end: usize) -> Option<usize> {
        let l1 = lock(&self.l1);
        let end = end.min(l1.entries.len());
        let used = l1.entries.get(index..end)?.iter().position(|e| e & OFFSET_MASK != 0)?;
        Some(index + used)
    }

    pub(crate) fn cached(&self, offset: u64) -> Option<Arc<L2Table>> {
        let mut cache = lock(&self.cache);
        cache.clock += 1;
        let clock = cache.clock;
        let (table, used) = cache.tables.get_mut(&offset)?;
        *used = clock;
        Some(Arc::clone(table))
    }

    /// The table of an L1 entry, if it needs no I/O.
    pub(crate) fn cached_for(&self, l1_index: usize) -> Option<Arc<L2Table>> {
        match self.l1_entry(l1_index) & OFFSET_MASK {
            0 => None,
            offset => self.cached(offset),
        }
    }

    pub(crate) fn insert(&self, table: Arc<L2Table>) {
        let mut cache = lock(&self.cache);
        cache.clock += 1;
        let clock = cache.clock;
        cache.tables.insert(table.offset, (table, clock));
        while cache.tables.len() > cache.max {
            // A table that somebody holds must stay: a second copy would miss its changes.
            let idle =
                |(_, (table, _)): &(&u64, &(Arc<L2Table>, u64))| Arc::strong_count(table) == 1;
            let oldest = cache.tables.iter().filter(idle).min_by_key(|(_, (_, used))| *used);
            let Some(offset) = oldest.map(|(offset, _)| *offset) else { return };
            cache.tables.remove(&offset);
        }
    }

    pub(crate) fn forget(&self, offset: u64) {
        lock(&self.cache).tables.remove(&offset);
    }

    pub(crate) fn forget_all(&self) {
        lock(&self.cache).tables.clear();
    }
}

impl Image {
    /// The L2 table that maps `l1_index`, if there is one.
    pub(crate) async fn l2(
        &self,
        operation: Operation,
        l1_index: usize,
    ) -> Result<Option<Arc<L2Table>>> {
        let offset = self.map.l1_entry(l1_index) & OFFSET_MASK;
        if offset == 0 {
            return Ok(None);
        }
        if let Some(table) = self.map.cached(offset) {
            return Ok(Some(table));
        }
        let _load = self.map.loads[l1_index % SHARDS].lock().await;
        match self.map.l1_entry(l1_index) & OFFSET_MASK {
            0 => Ok(None),
            offset => self.load_l2(operation, offset).await.map(Some),
        }
    }

    /// Loads a table through the cache. The caller sees to it that nobody moves it meanwhile.
    pub(crate) async fn load_l2(&self, operation: Operation, offset: u64) -> Result<Arc<L2Table>> {
        if let Some(table) = self.map.cached(offset) {
            return Ok(table);
        }
        if !self.g.is_aligned(offset) || offset >= self.file_limit() {
            let what = format!("L2 table at invalid offset {offset:#x}");
            return Err(self.corrupt(operation, offset, self.g.cluster_size(), what).await);
        }
        let data = self.file.read(offset, self.g.cluster_len()).await?;
        if let Some(table) = self.map.cached(offset) {
            return Ok(table);
        }
        let table = Arc::new(L2Table::new(offset, decode_table(&data)));
        self.map.insert(Arc::clone(&table));
        Ok(table)
    }

    /// The L2 table for `l1_index`, made if it is missing, copied if a snapshot shares it.
    pub(crate) async fn writable_l2(
        &self,
        operation: Operation,
        l1_index: usize,
    ) -> Result<Arc<L2Table>> {
        if let Some(table) = self.own_l2(operation, l1_index).await? {
            return Ok(table);
        }
        let _structure = self.structure.lock().await;
        if let Some(table) = self.own_l2(operation, l1_index).await? {
            return Ok(table);
        }
        let old = self.l2(operation, l1_index).await?;
        let words = match &old {
            Some(table) => table.words(&self.g, 0, self.g.l2_entries() as usize),
            None => vec![0; self.g.cluster_len() / 8],
        };
        let run = self.allocate(1).await?;
        let offset = run.first << self.g.cluster_bits;
        let written = self.file.write(offset, encode_table(&words)).await;
        if let Err(error) = written {
            self.give_back(run.first, 1);
            return Err(error);
        }
        self.order().await?;
        let _load = self.map.loads[l1_index % SHARDS].lock().await;
        self.write_l1_entry(l1_index, offset | COPIED).await?;
        let table = Arc::new(L2Table::new(offset, words));
        lock(&self.regions).insert_table(run.first, Kind::L2);
        self.map.insert(Arc::clone(&table));
        if let Some(old) = old {
            let cluster = old.offset >> self.g.cluster_bits;
            lock(&self.regions).remove_table(cluster);
            self.map.forget(old.offset);
            self.drop_references(vec![cluster], false).await?;
        }
        Ok(table)
    }

    /// The L2 table, if there is one that may be written in place.
    async fn own_l2(&self, operation: Operation, l1_index: usize) -> Result<Option<Arc<L2Table>>> {
        if self.map.l1_entry(l1_index) & COPIED == 0 {
            return Ok(None);
        }
        let Some(table) = self.l2(operation, l1_index).await? else { return Ok(None) };
        let sole = lock(&self.regions).is_sole_table(table.offset >> self.g.cluster_bits, Kind::L2);
        if !sole {
            let what = format!("L2 table at {:#x} overlaps other metadata", table.offset);
            return Err(self.corrupt(operation, table.offset, self.g.cluster_size(), what).await);
        }
        Ok(Some(table))
    }

    async fn write_l1_entry(&self, index: usize, entry: u64) -> Result<()> {
        let at = lock(&self.map.l1).offset + index as u64 * 8;
        let data = Bytes::copy_from_slice(&entry.to_be_bytes());
        self.write_live("write of an L1 entry", at, data).await?;
        if let Some(old) = lock(&self.map.l1).entries.get_mut(index) {
            *old = entry;
        }
        Ok(())
    }

    /// Host offsets at and above this one cannot be in use, in bytes.
    pub(crate) fn file_limit(&self) -> u64 {
        let end = self.g.clusters(self.file.size()).max(lock(&self.pool).touched_end);
        end << self.g.cluster_bits
    }
}
