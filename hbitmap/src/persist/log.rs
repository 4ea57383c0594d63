//! The activity log: which extents of a disk may have bits that a loss of power takes away.

use std::collections::{BTreeSet, HashMap};
use std::ops::Range;
use std::path::Path;

use super::Identity;
use crate::{Error, Result};

const MAGIC: [u8; 8] = *b"brep-log";
const VERSION: u32 = 1;
const CRC_OFFSET: usize = 12;
const EXTENTS_OFFSET: usize = 64;
const SLOT_LEN: usize = 16 << 10;
const EXTENT_LEN: usize = 4;
/// An extent that was not touched for so many syncs leaves with the next write,
const IDLE_SYNCS: u64 = 16;
/// and so many of them are worth a write of their own.
const IDLE_MAX: usize = 64;
/// Log₂ of an extent's bytes, unless the disk is so large that there would be too many.
const EXTENT_LOG2: u32 = 22;

/// The extents in which bits of a [`MapSet`](super::MapSet) may be missing after a loss of power,
/// because they were set after the last flush. Every such extent is *hot*: it stands in a file, on
/// stable storage, before the first bit in it is set. So after a loss of power exactly the hot
/// extents count as dirty.
///
/// No I/O here. The file is [`FILE_LEN`](ActivityLog::FILE_LEN) bytes long, and its owner writes
/// what [`next_write`](ActivityLog::next_write) says, flushes, and calls
/// [`written`](ActivityLog::written). One such write serves everybody who waits. An extent stays
/// hot until its bits are durable and either its place is needed or it was not touched for long, which the owner of the maps tells by
/// [`begin_sync`](ActivityLog::begin_sync) and [`synced`](ActivityLog::synced).
///
/// The file has two slots, written in turn, of which the newest valid one counts; so a torn write
/// leaves the one before it. It is described byte by byte in `docs/internals/bitmap-file.md`.
#[derive(Debug)]
pub struct ActivityLog {
    identity: Identity,
    size: u64,
    extent_log2: u32,
    /// Of the slot that counts.
    sequence: u64,
    /// On stable storage: each with the number of syncs that had begun when it was last touched.
    hot: HashMap<u32, u64>,
    /// To become hot with the next write.
    wanted: BTreeSet<u32>,
    /// On their way to the file.
    writing: Option<Vec<u32>>,
    syncs_begun: u64,
    /// The newest sync that has ended.
    synced: u64,
}

/// What is to be written to the file, and then to be flushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogWrite {
    /// Where, in bytes.
    pub offset: u64,
    /// What.
    pub bytes: Vec<u8>,
}

/// A flush of the maps that has begun.
#[derive(Debug, Clone, Copy)]
#[must_use = "extents stay hot until they are known to be durable"]
pub struct Sync(u64);

impl ActivityLog {
    /// The length of the file in bytes.
    pub const FILE_LEN: u64 = 2 * SLOT_LEN as u64;

    /// Most extents that are hot at a time.
    pub const CAPACITY: usize = (SLOT_LEN - EXTENTS_OFFSET) / EXTENT_LEN;

    /// A log of a disk of `size` bytes in which nothing is hot. Its file is to be begun with
    /// [`clear`](ActivityLog::clear).
    pub fn new(identity: Identity, size: u64) -> Self {
        let mut extent_log2 = EXTENT_LOG2;
        while size >> extent_log2 > u64::from(u32::MAX) {
            extent_log2 += 1;
        }
        ActivityLog {
            identity,
            size,
            extent_log2,
            sequence: 0,
            hot: HashMap::new(),
            wanted: BTreeSet::new(),
            writing: None,
            syncs_begun: 0,
            synced: 0,
        }
    }

    /// The log of whoever had the file before, as ranges of hot bytes in ascending order; and a new
    /// log, in which nothing is hot, that goes on in the same file with
    /// [`clear`](ActivityLog::clear). `path` is for errors.
    ///
    /// # Errors
    /// [`Error::NotABitmap`] if no slot was ever written, [`Error::Corrupt`] if none is valid,
    /// [`Error::Foreign`] if it is of something else.
    pub fn load(
        path: &Path,
        file: &[u8],
        identity: Identity,
        size: u64,
    ) -> Result<(Self, Vec<Range<u64>>)> {
        let slots = [0, 1].map(|slot| file.get(slot * SLOT_LEN..(slot + 1) * SLOT_LEN));
        let slots = slots.map(|slot| slot.and_then(Slot::decode));
        let newest = slots.into_iter().flatten().max_by_key(|slot| slot.sequence);
        let Some(newest) = newest else {
            return Err(match file.iter().all(|byte| *byte == 0) {
                true => Error::NotABitmap { path: path.to_owned(), reason: "it is empty".into() },
                false => {
                    let reason = "no slot of the activity log is valid".to_owned();
                    Error::Corrupt { path: path.to_owned(), reason }
                }
            });
        };
        if newest.identity != identity {
            let reason = format!("it belongs to {}, not {identity}", newest.identity);
            return Err(Error::Foreign { path: path.to_owned(), reason });
        }
        let log = ActivityLog { sequence: newest.sequence, ..ActivityLog::new(identity, size) };
        let hot = newest.extents.iter().filter_map(|extent| {
            let start = u64::from(*extent).checked_shl(newest.extent_log2)?;
            let end = start.saturating_add(1 << newest.extent_log2).min(size);
            (start < end).then_some(start..end)
        });
        Ok((log, hot.collect()))
    }

    /// The disk has another size from now on.
    pub fn resize(&mut self, size: u64) {
        self.size = size;
    }

    /// Bits in a range are about to be set. True: now they may be, before anything else is asked of
    /// the log. False: ask again after the next write. A range of more than
    /// [`CAPACITY`](ActivityLog::CAPACITY) extents is never hot.
    ///
    /// # Panics
    /// If the range is not inside the disk.
    pub fn heat(&mut self, start: u64, count: u64) -> bool {
        let Some(last) = count.checked_sub(1).map(|before| start + before) else { return true };
        assert!(last < self.size, "{count} bytes from {start} are out of range");
        let extents = (start >> self.extent_log2) as u32..=(last >> self.extent_log2) as u32;
        let now = self.syncs_begun;
        let mut cold = false;
        for extent in extents {
            match self.hot.get_mut(&extent) {
                Some(touched) => *touched = now,
                None => {
                    cold = true;
                    if self.writing.as_ref().is_none_or(|writing| !writing.contains(&extent)) {
                        self.wanted.insert(extent);
                    }
                }
            }
        }
        !cold
    }

    /// What is to be written next, if anything is wanted, or much is hot for nothing, and nothing is
    /// being written: all that is hot, and what is wanted as far as there is room. What makes room, or
    /// was not touched for long, is not hot any more.
    pub fn next_write(&mut self) -> Option<LogWrite> {
        if self.writing.is_some() {
            return None;
        }
        let idle_before = self.synced.saturating_sub(IDLE_SYNCS);
        let idle = self.hot.values().filter(|touched| **touched < idle_before).count();
        if self.wanted.is_empty() && idle < IDLE_MAX {
            return None;
        }
        self.hot.retain(|_, touched| *touched >= idle_before);
        self.make_room();
        let room = Self::CAPACITY - self.hot.len();
        let added: Vec<u32> = self.wanted.iter().copied().take(room).collect();
        if added.is_empty() && idle == 0 {
            return None;
        }
        for extent in &added {
            self.wanted.remove(extent);
        }
        Some(self.write_with(added))
    }

    /// What is to be written so that nothing is hot any more but what is touched later: all bits of
    /// the maps are durable.
    ///
    /// # Panics
    /// If something is being written.
    pub fn clear(&mut self) -> LogWrite {
        assert!(self.writing.is_none(), "one write at a time");
        self.hot.clear();
        self.write_with(Vec::new())
    }

    fn write_with(&mut self, added: Vec<u32>) -> LogWrite {
        let mut extents: Vec<u32> = self.hot.keys().copied().chain(added.iter().copied()).collect();
        extents.sort_unstable();
        self.writing = Some(added);
        let slot = Slot {
            sequence: self.sequence + 1,
            identity: self.identity,
            size: self.size,
            extent_log2: self.extent_log2,
            extents,
        };
        LogWrite { offset: slot.sequence % 2 * SLOT_LEN as u64, bytes: slot.encode() }
    }

    /// What [`next_write`](ActivityLog::next_write) returned is on stable storage. If that failed,
    /// this must not be called, and the log is of no use any more.
    pub fn written(&mut self) {
        if let Some(added) = self.writing.take() {
            self.sequence += 1;
            let now = self.syncs_begun;
            self.hot.extend(added.into_iter().map(|extent| (extent, now)));
        }
    }

    /// A flush of the maps begins: it covers every bit that was set before.
    pub fn begin_sync(&mut self) -> Sync {
        self.syncs_begun += 1;
        Sync(self.syncs_begun)
    }

    /// That flush has succeeded.
    pub fn synced(&mut self, Sync(sync): Sync) {
        self.synced = self.synced.max(sync);
    }

    /// Whether a flush of the maps is to be made soon, so that extents can leave: three quarters of
    /// the room are taken, and by what is not durable yet.
    pub fn wants_sync(&self) -> bool {
        let most = Self::CAPACITY / 4 * 3;
        self.hot.len() + self.wanted.len() > most
            && self.hot.values().filter(|touched| **touched >= self.synced).count() > most / 2
    }

    /// Whether what is wanted waits for a flush of the maps.
    pub fn is_full(&self) -> bool {
        !self.wanted.is_empty() && self.hot.len() >= Self::CAPACITY
    }

    /// How many extents are hot.
    pub fn hot_extents(&self) -> usize {
        self.hot.len()
    }

    /// Lets the extents go that were touched longest ago, if there is no room for what is wanted.
    fn make_room(&mut self) {
        let surplus = (self.hot.len() + self.wanted.len()).saturating_sub(Self::CAPACITY);
        if surplus == 0 {
            return;
        }
        let durable = self.hot.iter().filter(|(_, touched)| **touched < self.synced);
        let mut durable: Vec<(u64, u32)> =
            durable.map(|(extent, touched)| (*touched, *extent)).collect();
        durable.sort_unstable();
        // Some more than is needed now: sorting takes longer than a write.
        for (_, extent) in durable.into_iter().take(surplus.max(Self::CAPACITY / 8)) {
            self.hot.remove(&extent);
        }
    }
}

/// The contents of a slot.
struct Slot {
    sequence: u64,
    identity: Identity,
    size: u64,
    extent_log2: u32,
    extents: Vec<u32>,
}

impl Slot {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; SLOT_LEN];
        let mut put = |offset: usize, field: &[u8]| {
            bytes[offset..offset + field.len()].copy_from_slice(field);
        };
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.sequence.to_le_bytes());
        put(24, &self.identity.0);
        put(40, &self.size.to_le_bytes());
        put(48, &self.extent_log2.to_le_bytes());
        put(52, &(self.extents.len() as u32).to_le_bytes());
        for (index, extent) in self.extents.iter().enumerate() {
            put(EXTENTS_OFFSET + index * EXTENT_LEN, &extent.to_le_bytes());
        }
        let crc = crc32fast::hash(&bytes);
        bytes[CRC_OFFSET..CRC_OFFSET + 4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// None: it was never written, or not to its end, or it is damaged.
    fn decode(bytes: &[u8]) -> Option<Slot> {
        let mut unsummed = bytes.to_vec();
        unsummed.get_mut(CRC_OFFSET..CRC_OFFSET + 4)?.fill(0);
        let u32_at = |offset: usize| Some(u32::from_le_bytes(field(bytes, offset)?));
        let u64_at = |offset: usize| Some(u64::from_le_bytes(field(bytes, offset)?));
        let valid = field(bytes, 0)? == MAGIC
            && u32_at(CRC_OFFSET)? == crc32fast::hash(&unsummed)
            && u32_at(8)? == VERSION;
        let (extent_log2, count) = (u32_at(48)?, u32_at(52)? as usize);
        if !valid || extent_log2 > 62 || count > ActivityLog::CAPACITY {
            return None;
        }
        let extents = (0..count).map(|index| u32_at(EXTENTS_OFFSET + index * EXTENT_LEN));
        Some(Slot {
            sequence: u64_at(16)?,
            identity: Identity(field(bytes, 24)?),
            size: u64_at(40)?,
            extent_log2,
            extents: extents.collect::<Option<_>>()?,
        })
    }
}

fn field<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..offset.checked_add(N)?)?.try_into().ok()
}
