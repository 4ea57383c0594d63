use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use brep_hbitmap::HBitmap;

const NAME_BYTES_MAX: usize = 1023;
const GRANULARITY_BYTES: Range<u64> = 512..(2 << 30) + 1;

/// Why a call on a bitmap was refused. Nothing has changed then.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// There is none of this name.
    #[error("bitmap '{0}' could not be found: add it first")]
    NotFound(String),
    /// There is one of this name.
    #[error("there is a bitmap '{0}' already: choose another name, or remove it")]
    Exists(String),
    /// A job uses it.
    #[error("bitmap '{0}' is in use by a job: wait until the job has ended, or cancel it")]
    Busy(String),
    /// Writes were missed while it was not open.
    #[error("bitmap '{0}' is inconsistent: remove it, and begin anew with a full backup")]
    Inconsistent(String),
    /// It must not change.
    #[error("bitmap '{0}' is read-only: only bitmap mode 'never' leaves it as it is")]
    ReadOnly(String),
    /// The name is empty or longer than 1023 bytes.
    #[error("a bitmap's name has from 1 to 1023 bytes")]
    Name,
    /// The granularity is not acceptable. Holds it, in bytes.
    #[error("a granularity of {0} bytes is no power of two from 512 to 2 GiB")]
    Granularity(u64),
    /// It describes a disk of another size.
    #[error("bitmap '{name}' is for a disk of {bitmap} bytes, the disk has {disk}")]
    Size {
        /// Its name.
        name: String,
        /// The size it was made for, in bytes.
        bitmap: u64,
        /// The size of the disk, in bytes.
        disk: u64,
    },
    /// No such bitmap can be had. Says why.
    #[error("{0}")]
    Impossible(String),
}

impl From<brep_hbitmap::Error> for BitmapError {
    fn from(error: brep_hbitmap::Error) -> Self {
        BitmapError::Impossible(error.to_string())
    }
}

/// What is known of a bitmap.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BitmapInfo {
    /// Its name.
    pub name: String,
    /// Bytes that one bit stands for.
    pub granularity: u64,
    /// Dirty bytes, those that were written while a job has it included.
    pub count: u64,
    /// Whether writes are recorded.
    pub recording: bool,
    /// Whether a job uses it.
    pub busy: bool,
    /// Whether writes may be missing.
    pub inconsistent: bool,
    /// Whether it must not change.
    pub read_only: bool,
}

/// What a bitmap that comes from elsewhere is worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum BitmapState {
    /// It has every write; from now on writes are recorded.
    #[default]
    Recording,
    /// It has every write that was to be recorded; no more are.
    Disabled,
    /// It is not to change: no writes are recorded.
    ReadOnly,
    /// Its file was not closed: writes may be missing. It can only be removed.
    Inconsistent,
}

/// What a job does to the bitmap when it ends (spec: backup, bitmaps).
#[derive(Debug, Clone)]
pub(crate) enum Settle {
    /// What was written since the start, only.
    Replace,
    /// What it was at the start, too.
    Merge,
    /// What was written since, and these ranges of bytes.
    ReplaceAnd(Vec<Range<u64>>),
}

#[derive(Debug)]
struct Bitmap {
    map: HBitmap,
    /// While a job has the bitmap: what is written meanwhile.
    successor: Option<HBitmap>,
    state: BitmapState,
}

impl Bitmap {
    fn live(&mut self) -> &mut HBitmap {
        self.successor.as_mut().unwrap_or(&mut self.map)
    }

    fn check_usable(&self, name: &str) -> Result<(), BitmapError> {
        if self.successor.is_some() {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        if self.state == BitmapState::Inconsistent {
            return Err(BitmapError::Inconsistent(name.to_owned()));
        }
        Ok(())
    }

    fn check_changeable(&self, name: &str) -> Result<(), BitmapError> {
        self.check_usable(name)?;
        if self.state == BitmapState::ReadOnly {
            return Err(BitmapError::ReadOnly(name.to_owned()));
        }
        Ok(())
    }
}

/// The dirty bitmaps of a [`LiveDisk`](crate::LiveDisk), by name: where it was written since.
///
/// They live in memory. [`export`](Self::export) and [`import`](Self::import) are for those who
/// keep them in files.
#[derive(Debug)]
pub struct Bitmaps {
    table: Mutex<BTreeMap<String, Bitmap>>,
    /// Whether there is any, so that a disk without bitmaps pays nothing.
    any: AtomicBool,
    size: Mutex<u64>,
}

impl Bitmaps {
    pub(crate) fn new(size: u64) -> Self {
        Bitmaps { table: Mutex::default(), any: AtomicBool::new(false), size: Mutex::new(size) }
    }

    /// Adds an empty bitmap that records every change that is made from now on. `granularity` is
    /// in bytes, a power of two from 512 to 2 GiB.
    ///
    /// # Errors
    /// If there is one of this name, or the name or the granularity is not acceptable.
    pub fn add(&self, name: &str, granularity: u64) -> Result<(), BitmapError> {
        if !granularity.is_power_of_two() || !GRANULARITY_BYTES.contains(&granularity) {
            return Err(BitmapError::Granularity(granularity));
        }
        let map = HBitmap::new(self.size(), granularity.trailing_zeros())?;
        self.import(name, map, BitmapState::Recording)
    }

    /// Adds a bitmap that was kept somewhere.
    ///
    /// # Errors
    /// If there is one of this name, the name is not acceptable, or it is for another size.
    pub fn import(&self, name: &str, map: HBitmap, state: BitmapState) -> Result<(), BitmapError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX {
            return Err(BitmapError::Name);
        }
        let disk = self.size();
        if map.size() != disk {
            return Err(BitmapError::Size { name: name.to_owned(), bitmap: map.size(), disk });
        }
        let mut table = self.table();
        if table.contains_key(name) {
            return Err(BitmapError::Exists(name.to_owned()));
        }
        table.insert(name.to_owned(), Bitmap { map, successor: None, state });
        self.any.store(true, Ordering::Release);
        Ok(())
    }

    /// A copy of a bitmap, for a file.
    ///
    /// # Errors
    /// If there is none, or it is in use or inconsistent.
    pub fn export(&self, name: &str) -> Result<HBitmap, BitmapError> {
        self.with(name, |bitmap| {
            bitmap.check_usable(name)?;
            Ok(bitmap.map.clone())
        })
    }

    /// Removes a bitmap; an inconsistent one, too.
    ///
    /// # Errors
    /// If there is none, or a job uses it.
    pub fn remove(&self, name: &str) -> Result<(), BitmapError> {
        let mut table = self.table();
        let bitmap = table.get(name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))?;
        if bitmap.successor.is_some() {
            return Err(BitmapError::Busy(name.to_owned()));
        }
        table.remove(name);
        self.any.store(!table.is_empty(), Ordering::Release);
        Ok(())
    }

    /// Forgets every write up to now.
    ///
    /// # Errors
    /// If there is none, or it is in use, inconsistent or read-only.
    pub fn clear(&self, name: &str) -> Result<(), BitmapError> {
        self.with(name, |bitmap| {
            bitmap.check_changeable(name)?;
            bitmap.map.reset_all();
            Ok(())
        })
    }

    /// Switches recording on or off.
    ///
    /// # Errors
    /// As [`clear`](Self::clear).
    pub fn set_recording(&self, name: &str, recording: bool) -> Result<(), BitmapError> {
        self.with(name, |bitmap| {
            bitmap.check_changeable(name)?;
            let states = [BitmapState::Disabled, BitmapState::Recording];
            bitmap.state = states[usize::from(recording)];
            Ok(())
        })
    }

    /// All bitmaps, in the order of their names.
    #[must_use]
    pub fn query(&self) -> Vec<BitmapInfo> {
        let info = |(name, bitmap): (&String, &Bitmap)| BitmapInfo {
            name: name.clone(),
            granularity: bitmap.map.granularity(),
            count: bitmap.dirty_bytes(),
            recording: bitmap.state == BitmapState::Recording,
            busy: bitmap.successor.is_some(),
            inconsistent: bitmap.state == BitmapState::Inconsistent,
            read_only: bitmap.state == BitmapState::ReadOnly,
        };
        self.table().iter().map(info).collect()
    }

    /// Notes that a range was changed.
    pub(crate) fn record(&self, bytes: &Range<u64>) {
        if !self.any.load(Ordering::Acquire) {
            return;
        }
        for bitmap in self.table().values_mut() {
            if bitmap.state == BitmapState::Recording {
                bitmap.live().set(bytes.start, bytes.end - bytes.start);
            }
        }
    }

    /// Whether a job that leaves the bitmap changed, or not, may use it.
    pub(crate) fn check(&self, name: &str, changes: bool) -> Result<(), BitmapError> {
        self.with(name, |bitmap| match changes {
            true => bitmap.check_changeable(name),
            false => bitmap.check_usable(name),
        })
    }

    /// Freezes a bitmap for a job: what is written from now on is kept apart. Returns what was
    /// dirty.
    pub(crate) fn freeze(&self, name: &str, changes: bool) -> Result<Vec<Range<u64>>, BitmapError> {
        self.with(name, |bitmap| {
            if changes {
                bitmap.check_changeable(name)?;
            } else {
                bitmap.check_usable(name)?;
            }
            let log2 = bitmap.map.granularity_log2();
            bitmap.successor = Some(HBitmap::new(bitmap.map.size(), log2)?);
            Ok(bitmap.map.dirty_areas(0..u64::MAX).collect())
        })
    }

    /// Ends what [`freeze`](Self::freeze) began.
    pub(crate) fn settle(&self, name: &str, how: Settle) {
        // A frozen bitmap cannot be removed, so it is there.
        let _ = self.with(name, |bitmap| {
            let Some(successor) = bitmap.successor.take() else { return Ok(()) };
            match how {
                Settle::Merge => bitmap.map.or_assign(&successor)?,
                Settle::Replace => bitmap.map = successor,
                Settle::ReplaceAnd(ranges) => {
                    bitmap.map = successor;
                    for range in ranges {
                        bitmap.map.set(range.start, range.end - range.start);
                    }
                }
            }
            Ok(())
        });
    }

    /// The disk has another size. What is added counts as clean: it reads as zeroes on every
    /// copy that is made as large.
    pub(crate) fn truncate(&self, size: u64) -> Result<(), BitmapError> {
        let mut table = self.table();
        for bitmap in table.values_mut() {
            bitmap.map.truncate(size)?;
            if let Some(successor) = &mut bitmap.successor {
                successor.truncate(size)?;
            }
        }
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = size;
        Ok(())
    }

    fn size(&self) -> u64 {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(
        &self,
        name: &str,
        act: impl FnOnce(&mut Bitmap) -> Result<T, BitmapError>,
    ) -> Result<T, BitmapError> {
        let mut table = self.table();
        act(table.get_mut(name).ok_or_else(|| BitmapError::NotFound(name.to_owned()))?)
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Bitmap>> {
        // Every bitmap is consistent whenever the lock is released, by a panic too.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Bitmap {
    fn dirty_bytes(&self) -> u64 {
        match &self.successor {
            None => self.map.dirty_bytes(),
            Some(successor) => {
                let mut all = self.map.clone();
                // Same size and granularity: it was made so.
                let _ = all.or_assign(successor);
                all.dirty_bytes()
            }
        }
    }
}
