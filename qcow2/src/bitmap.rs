//! Persistent bitmaps of other programs (specification §6): which there are, and what they say.
//!
//! They are read only: an image that is opened for writing has none, because whatever is written
//! then is not in them.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use brep_block::{Error, ErrorKind, Operation, Result};
use bytes::Bytes;

use crate::Qcow2;
use crate::file::File;
use crate::geometry::{Geometry, OFFSET_MASK};
use crate::header::{BitmapsExtension, byte_at, decode_table, u16_at, u32_at, u64_at};
use crate::image::{Image, lock};

/// Length of a directory entry without its name, in bytes.
const ENTRY_LEN: usize = 24;
const NAME_LEN_MAX: usize = 1023;
const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// Longest bitmap, in bytes.
const DATA_LEN_MAX: u64 = 0x2000_0000;
/// Longest tables of bitmaps that are opened together, in bytes: the longest that one may have, eight
/// times. In the image they may share their clusters, in memory they do not.
const TABLES_LEN_MAX: u64 = 64 << 20;
/// What stands in a table in the place of an offset.
const ALL_CLEAN: u64 = 0;
const ALL_MARKED: u64 = 1;

mod flag {
    pub(super) const IN_USE: u32 = 1;
    pub(super) const AUTO: u32 = 1 << 1;
    pub(super) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    pub(super) const KNOWN: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// A persistent bitmap, as the image's directory describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Unique in the image.
    pub name: String,
    /// How much of the disk one bit stands for, in bytes: a power of two.
    pub granularity: u64,
    /// It was not saved by its last user, so nobody knows what it would say.
    pub in_use: bool,
    /// Writes are to be tracked whenever the image is in use.
    pub auto: bool,
}

#[derive(Debug)]
struct Entry {
    info: BitmapInfo,
    table_offset: u64,
    table_entries: u32,
}

/// An open bitmap: it says which ranges of the disk are marked. It keeps its table in memory, and
/// the piece of its data that was looked at last.
#[derive(Debug)]
pub struct Bitmap {
    name: String,
    file: File,
    granularity_bits: u32,
    /// Bits that a cluster of data holds.
    cluster_bits: u64,
    /// Bits that the disk has.
    bits: u64,
    table: Vec<u64>,
    last: Mutex<Option<(usize, Bytes)>>,
}

impl Qcow2 {
    /// The persistent bitmaps of the image. None if it is open for writing, or if its last writer
    /// did not keep them ([`Info::bitmaps_outdated`](crate::Info::bitmaps_outdated)).
    ///
    /// # Errors
    /// The directory does not keep to the format ([`ErrorKind::Corrupt`]); or a failure of the file.
    pub async fn bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let entries = self.image.bitmap_directory().await?;
        Ok(entries.into_iter().map(|entry| entry.info).collect())
    }

    /// Opens the bitmap of this name; none if there is none.
    ///
    /// # Errors
    /// As [`open_bitmaps`](Self::open_bitmaps).
    pub async fn bitmap(&self, name: &str) -> Result<Option<Arc<Bitmap>>> {
        Ok(self.open_bitmaps(&[name]).await?.pop().flatten())
    }

    /// Opens the bitmaps of these names, in their order; none in the place of what there is not.
    ///
    /// # Errors
    /// One was left in use, or does not keep to the format ([`ErrorKind::Corrupt`]); their tables
    /// take more than 64 MiB ([`ErrorKind::Unsupported`]); or a failure of the file.
    pub async fn open_bitmaps(
        &self,
        names: &[impl AsRef<str> + Sync],
    ) -> Result<Vec<Option<Arc<Bitmap>>>> {
        let directory = self.image.bitmap_directory().await?;
        let by_name: BTreeMap<&str, &Entry> =
            directory.iter().map(|entry| (entry.info.name.as_str(), entry)).collect();
        let entries: Vec<Option<&Entry>> =
            names.iter().map(|name| by_name.get(name.as_ref()).copied()).collect();
        let tables_len: u64 = entries.iter().flatten().map(|entry| entry.table_len()).sum();
        if tables_len > TABLES_LEN_MAX {
            let what = format!(
                "the tables of these bitmaps take {tables_len} bytes; at most {TABLES_LEN_MAX} \
                 can be kept in memory"
            );
            return Err(self.image.error(Operation::Open, ErrorKind::Unsupported, what));
        }
        let mut bitmaps = Vec::with_capacity(entries.len());
        for entry in entries {
            bitmaps.push(match entry {
                Some(entry) => Some(Arc::new(self.image.open_bitmap(entry).await?)),
                None => None,
            });
        }
        Ok(bitmaps)
    }
}

impl Entry {
    /// In bytes.
    fn table_len(&self) -> u64 {
        u64::from(self.table_entries) * 8
    }
}

impl Image {
    fn bad_bitmap(&self, name: &str, what: &str) -> Error {
        let what = format!("bitmap {name:?}: {what}");
        self.error(Operation::Open, ErrorKind::Corrupt, what)
    }

    async fn bitmap_directory(&self) -> Result<Vec<Entry>> {
        let Some(extension) = lock(&self.header).bitmaps() else { return Ok(Vec::new()) };
        let BitmapsExtension { count, directory_size, directory_offset } = extension;
        let damaged = |what| self.error(Operation::Open, ErrorKind::Corrupt, what);
        if directory_offset.saturating_add(directory_size) > self.file.size() {
            return Err(damaged("the bitmap directory ends beyond the file"));
        }
        // At most 64 MiB: the header was checked.
        let directory = self.file.read(directory_offset, directory_size as usize).await?;
        let mut rest = &directory[..];
        let mut names = BTreeSet::new();
        let mut entries = Vec::new();
        for _ in 0..count {
            let entry = decode_entry(&mut rest).map_err(damaged)?;
            if !names.insert(entry.info.name.clone()) {
                return Err(self.bad_bitmap(&entry.info.name, "there are two of this name"));
            }
            entries.push(entry);
        }
        match rest {
            [] => Ok(entries),
            _ => Err(damaged("the bitmap directory is longer than what it holds")),
        }
    }

    async fn open_bitmap(&self, entry: &Entry) -> Result<Bitmap> {
        let Entry { info, table_offset, table_entries } = entry;
        let (table_offset, table_len) = (*table_offset, entry.table_len());
        let bad = |what| self.bad_bitmap(&info.name, what);
        if info.in_use {
            return Err(bad("it was left in use: what it would say is not known"));
        }
        let bits = self.size().div_ceil(info.granularity);
        let len = bits.div_ceil(8);
        if len > DATA_LEN_MAX {
            return Err(bad("too long"));
        }
        if u64::from(*table_entries) != self.g.clusters(len) {
            return Err(bad("its table does not fit the size of the disk"));
        }
        let in_file = |offset: u64, len| {
            self.g.is_aligned(offset)
                && offset.checked_add(len).is_some_and(|end| end <= self.file.size())
        };
        if !in_file(table_offset, table_len) {
            return Err(bad("its table lies outside the file"));
        }
        let table = decode_table(&self.file.read(table_offset, table_len as usize).await?);
        for (index, &word) in table.iter().enumerate() {
            let start = (index as u64) << self.g.cluster_bits;
            // What lies beyond the file would read as "clean".
            let used = (len - start).min(self.g.cluster_size());
            let good = match word {
                ALL_CLEAN | ALL_MARKED => true,
                word => word & !OFFSET_MASK == 0 && in_file(word, used),
            };
            if !good {
                return Err(bad("an entry of its table does not keep to the format"));
            }
        }
        Ok(Bitmap {
            name: info.name.clone(),
            file: self.file.clone(),
            granularity_bits: info.granularity.trailing_zeros(),
            cluster_bits: cluster_bits(&self.g),
            bits,
            table,
            last: Mutex::new(None),
        })
    }
}

/// How many bits one cluster holds.
fn cluster_bits(g: &Geometry) -> u64 {
    g.cluster_size() * 8
}

/// Takes one entry off the front of a directory.
fn decode_entry(rest: &mut &[u8]) -> std::result::Result<Entry, &'static str> {
    let data = *rest;
    if data.len() < ENTRY_LEN {
        return Err("the bitmap directory is shorter than its count says");
    }
    let flags = u32_at(data, 12);
    let granularity_bits = byte_at(data, 17);
    let name_len = usize::from(u16_at(data, 18));
    // Below 2^33 together.
    let extra_len = u32_at(data, 20) as usize;
    let len = (ENTRY_LEN + extra_len + name_len).next_multiple_of(8);
    let name_at = ENTRY_LEN + extra_len;
    let Some(name) = data.get(name_at..name_at + name_len).filter(|_| len <= data.len()) else {
        return Err("an entry of the bitmap directory ends beyond it");
    };
    if byte_at(data, 16) != 1 {
        return Err("a bitmap of a kind that is not known");
    }
    if !(1..=NAME_LEN_MAX).contains(&name_len) {
        return Err("a bitmap without a name, or with one that is too long");
    }
    let Ok(name) = std::str::from_utf8(name) else {
        return Err("a bitmap whose name is not UTF-8");
    };
    if !GRANULARITY_BITS.contains(&granularity_bits) {
        return Err("a bitmap with a granularity that is not possible");
    }
    if flags & !flag::KNOWN != 0 {
        return Err("a bitmap with flags that are not known");
    }
    if extra_len > 0 && flags & flag::EXTRA_DATA_COMPATIBLE == 0 {
        return Err("a bitmap with extra data that is not known");
    }
    let info = BitmapInfo {
        name: name.to_owned(),
        granularity: 1 << granularity_bits,
        in_use: flags & flag::IN_USE != 0,
        auto: flags & flag::AUTO != 0,
    };
    *rest = &data[len..];
    Ok(Entry { info, table_offset: u64_at(data, 0), table_entries: u32_at(data, 8) })
}

impl Bitmap {
    /// Its name in the image.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether the first bytes of a range of the disk are marked, and how many share that: at
    /// least 1, and at most `len`, which must not be 0. Neighbouring extents need not differ.
    ///
    /// # Errors
    /// The range begins beyond the end of the disk; or a failure of the file.
    pub async fn status(&self, offset: u64, len: u64) -> Result<(u64, bool)> {
        let first = offset >> self.granularity_bits;
        let (index, bit) = ((first / self.cluster_bits) as usize, first % self.cluster_bits);
        let Some(word) = self.table.get(index).filter(|_| first < self.bits) else {
            let what = format!("beyond the end of bitmap {:?}", self.name);
            let error =
                Error::new(Operation::BlockStatus, ErrorKind::InvalidInput, self.file.name(), what);
            return Err(error.at(offset, len));
        };
        let (end, marked) = match *word {
            ALL_CLEAN | ALL_MARKED => {
                let equal = self.table[index..].iter().take_while(|next| *next == word).count();
                ((index + equal) as u64 * self.cluster_bits, *word == ALL_MARKED)
            }
            host => {
                let data = self.data(index, host).await?;
                let (end, marked) = run(&data, bit);
                (index as u64 * self.cluster_bits + end, marked)
            }
        };
        let bytes = (u128::from(end) << self.granularity_bits) - u128::from(offset);
        Ok((u64::try_from(bytes).unwrap_or(u64::MAX).min(len), marked))
    }

    async fn data(&self, index: usize, host: u64) -> Result<Bytes> {
        if let Some((of, data)) = &*lock(&self.last)
            && *of == index
        {
            return Ok(data.clone());
        }
        let data = self.file.read(host, (self.cluster_bits / 8) as usize).await?;
        *lock(&self.last) = Some((index, data.clone()));
        Ok(data)
    }
}

/// The end of the run of equal bits that begins at one, and whether they are set. Bits count from
/// the least significant of each byte.
fn run(data: &[u8], first: u64) -> (u64, bool) {
    let is_set = |bit: u64| byte_at(data, (bit / 8) as usize) >> (bit % 8) & 1 == 1;
    let marked = is_set(first);
    let uniform = if marked { 0xff } else { 0 };
    let end = data.len() as u64 * 8;
    let mut bit = first + 1;
    while bit < end {
        if bit.is_multiple_of(8) && byte_at(data, (bit / 8) as usize) == uniform {
            bit += 8;
        } else if is_set(bit) == marked {
            bit += 1;
        } else {
            break;
        }
    }
    (bit.min(end), marked)
}
