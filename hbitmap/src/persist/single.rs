use std::path::Path;

use super::file::MapFile;
use super::{LastStop, Options, Tag, create, open};
use crate::{HBitmap, Result};

/// A bitmap that is in a file as soon as it is in memory, and outlives a kill of the process.
///
/// The file is locked while it is open. Dropping it is the same as being killed: nothing is lost,
/// but [`close`](PersistentBitmap::close) is what survives a loss of power.
#[derive(Debug)]
pub struct PersistentBitmap {
    file: MapFile,
}

const MAP: usize = 0;

impl PersistentBitmap {
    /// Creates a file, which must not exist, with an empty map, and opens it.
    ///
    /// # Errors
    /// [`Error::Impossible`](crate::Error::Impossible), [`Error::Io`](crate::Error::Io) (among
    /// other things if the disk is full), and what [`open`](PersistentBitmap::open) returns.
    pub fn create(path: impl AsRef<Path>, options: &Options, tag: Tag) -> Result<Self> {
        create::create(path.as_ref(), options, 1, tag)?;
        Self::open(path, options)
    }

    /// Opens a file, verifies all of it, and notes, durably, that it is in use. If the disk
    /// has grown, or `options` have another granularity, the map is copied to a file that fits, which takes
    /// its place; what is added is set.
    ///
    /// # Errors
    /// [`Error::Locked`](crate::Error::Locked), [`Error::NotABitmap`](crate::Error::NotABitmap),
    /// [`Error::Foreign`](crate::Error::Foreign), [`Error::PowerLost`](crate::Error::PowerLost),
    /// [`Error::Corrupt`](crate::Error::Corrupt) and [`Error::Io`](crate::Error::Io). Except for
    /// the last one, the file is as it was.
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        Ok(PersistentBitmap { file: open::open(path.as_ref(), options, 1)? })
    }

    /// The map, for all queries.
    pub fn map(&self) -> &HBitmap {
        &self.file.maps[MAP]
    }

    /// How the last user of the file ended.
    pub fn last_stop(&self) -> LastStop {
        self.file.last_stop
    }

    /// As [`HBitmap::set`].
    ///
    /// # Panics
    /// As that.
    pub fn set(&mut self, start: u64, count: u64) -> bool {
        self.file.set(MAP, start, count)
    }

    /// As [`HBitmap::reset`].
    ///
    /// # Panics
    /// As that.
    pub fn reset(&mut self, start: u64, count: u64) -> bool {
        self.file.reset(MAP, start, count)
    }

    /// Clears everything at once, in constant time.
    pub fn reset_all(&mut self) {
        self.file.reset_all(MAP);
    }

    /// As [`HBitmap::or_assign`].
    ///
    /// # Errors
    /// [`Error::SizesDiffer`](crate::Error::SizesDiffer).
    pub fn or_assign(&mut self, other: &HBitmap) -> Result<()> {
        self.file.or_assign(MAP, other)
    }

    /// What the caller has noted about the map.
    pub fn tag(&self) -> Tag {
        self.file.tag(MAP)
    }

    /// Replaces the tag, at once.
    pub fn set_tag(&mut self, tag: Tag) {
        self.file.set_tag(MAP, tag);
    }

    /// Memory held, in bytes, without the pages of the file.
    pub fn memory_bytes(&self) -> usize {
        self.file.memory_bytes()
    }

    /// Gives back memory that holds no set bit.
    pub fn shrink(&mut self) {
        self.file.maps[MAP].shrink();
    }

    /// Waits until everything that was set is on stable storage, with checksums.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io); from then on [`Error::Sticky`](crate::Error::Sticky),
    /// until the file has been opened again.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }

    /// Flushes, and notes a clean stop.
    ///
    /// # Errors
    /// As [`flush`](PersistentBitmap::flush).
    pub fn close(mut self) -> Result<()> {
        self.file.close()
    }
}
