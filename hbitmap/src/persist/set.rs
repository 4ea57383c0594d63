use std::path::Path;

use super::file::{MapFile, MapFlush, renew};
use super::in_flight::InFlight;
use super::rebuild::rebuild;
use super::{LastStop, Options, Tag, create, open};
use crate::{Error, HBitmap, Result};

/// One of the three maps of a [`MapSet`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Written in the current epoch.
    Open,
    /// Written in the epoch that has been cut and is not committed.
    Pending,
    /// Not known to be equal on the peer.
    Differs,
}

/// What a replicating primary remembers of a disk: three bitmaps in one file, whose roles change
/// atomically.
///
/// Every change is in the file when the call returns, and outlives a kill of the process at any
/// instruction; every change of roles is either made or not. The changes of roles take constant
/// time, but for those that unite two maps.
///
/// The file is locked while it is open. Dropping it is the same as being killed: nothing is lost,
/// but [`close`](MapSet::close) is what survives a loss of power.
#[derive(Debug)]
pub struct MapSet {
    file: MapFile,
}

pub(super) const OPEN: usize = 0;
pub(super) const PENDING: usize = 1;
pub(super) const DIFFERS: usize = 2;

impl Role {
    fn index(self) -> usize {
        match self {
            Role::Open => OPEN,
            Role::Pending => PENDING,
            Role::Differs => DIFFERS,
        }
    }
}

impl MapSet {
    /// Creates a file, which must not exist, with three empty maps, all with this tag, and no
    /// pending epoch; and opens it.
    ///
    /// # Errors
    /// [`Error::Impossible`], [`Error::Io`] (among other things if the disk is full), and what
    /// [`open`](MapSet::open) returns.
    pub fn create(path: impl AsRef<Path>, options: &Options, tag: Tag) -> Result<Self> {
        create::create(path.as_ref(), options, 3, tag)?;
        Self::open(path, options)
    }

    /// Opens a file, verifies all of it, and notes, durably, that it is in use. If the disk
    /// has grown, or `options` have another granularity, the maps are copied to a file that fits, which takes
    /// its place; what is added differs.
    ///
    /// # Errors
    /// [`Error::Locked`], [`Error::NotABitmap`], [`Error::Foreign`], [`Error::PowerLost`],
    /// [`Error::Corrupt`] and [`Error::Io`]. Except for the last one, the file is as it was.
    pub fn open(path: impl AsRef<Path>, options: &Options) -> Result<Self> {
        Ok(MapSet { file: open::open(path.as_ref(), options, 3)? })
    }

    /// Bytes that a file with these options takes: all of them from its creation on.
    ///
    /// # Errors
    /// [`Error::Impossible`], as [`create`](MapSet::create).
    pub fn file_len(options: &Options) -> Result<u64> {
        create::file_len(options, 3)
    }

    /// One of the maps, for all queries. Pending is empty while no cut is outstanding.
    pub fn map(&self, role: Role) -> &HBitmap {
        &self.file.maps[role.index()]
    }

    /// How the last user of the file ended.
    pub fn last_stop(&self) -> LastStop {
        self.file.last_stop
    }

    /// As [`HBitmap::set`].
    ///
    /// # Panics
    /// As that; and for pending, while no cut is outstanding.
    pub fn set(&mut self, role: Role, start: u64, count: u64) -> bool {
        self.check_role(role);
        self.file.set(role.index(), start, count)
    }

    /// As [`HBitmap::reset`].
    ///
    /// # Panics
    /// As that.
    pub fn reset(&mut self, role: Role, start: u64, count: u64) -> bool {
        self.file.reset(role.index(), start, count)
    }

    /// Clears one map at once, in constant time. Its tag and its role stay.
    pub fn reset_all(&mut self, role: Role) {
        self.file.reset_all(role.index());
    }

    /// As [`HBitmap::or_assign`].
    ///
    /// # Errors
    /// [`Error::SizesDiffer`].
    ///
    /// # Panics
    /// For pending, while no cut is outstanding.
    pub fn or_assign(&mut self, role: Role, other: &HBitmap) -> Result<()> {
        self.check_role(role);
        self.file.or_assign(role.index(), other)
    }

    /// Moves what is set in a range of whole groups from one map to another. At no time is it in
    /// neither.
    ///
    /// # Panics
    /// As [`HBitmap::reset`]; and towards pending, while no cut is outstanding.
    pub fn transfer(&mut self, from: Role, to: Role, start: u64, count: u64) {
        self.check_role(to);
        if from == to || self.map(from).whole_groups(start, count).is_none() {
            return;
        }
        let end = start + count;
        let mut at = start;
        while let Some(area) = self.map(from).next_dirty_area(at..end, u64::MAX) {
            self.set(to, area.start, area.end - area.start);
            at = area.end;
        }
        self.reset(from, start, count);
    }

    /// A write, or whatever else makes two sides equal, begins: if the process is killed before it
    /// has ended, differs takes in what open and pending hold of its range when the file is opened
    /// again. It has ended after `ends` calls of [`end_in_flight`](MapSet::end_in_flight), one for
    /// each side, say. Constant time, whatever the length. None: there is nothing to end.
    ///
    /// There is room for 8191 at a time. While there are more, a kill takes everything in open and
    /// pending to be in flight.
    ///
    /// # Panics
    /// As [`HBitmap::set`].
    pub fn begin_in_flight(&mut self, start: u64, count: u64, ends: u8) -> Option<InFlight> {
        self.file.begin_in_flight(start, count, ends)
    }

    /// It has ended in one more place: that side has it, or differs says that it does not.
    ///
    /// # Panics
    /// If it had ended everywhere.
    pub fn end_in_flight(&mut self, request: InFlight) {
        self.file.end_in_flight(request);
    }

    /// Whether anything has begun and not ended.
    pub fn is_in_flight(&self) -> bool {
        !self.file.in_flight.is_empty()
    }

    /// Whether a cut is outstanding: its epoch may still have been empty.
    pub fn has_pending(&self) -> bool {
        self.file.header.entries[PENDING].present
    }

    /// What the caller has noted about a map.
    pub fn tag(&self, role: Role) -> Tag {
        self.file.tag(role.index())
    }

    /// Replaces a tag, at once.
    pub fn set_tag(&mut self, role: Role, tag: Tag) {
        self.file.set_tag(role.index(), tag);
    }

    /// The cut: what was open becomes pending, with its tag, and an empty map with a new tag
    /// becomes open. Atomic, in constant time.
    ///
    /// # Errors
    /// [`Error::State`] if a cut is outstanding already.
    pub fn rotate(&mut self, tag: Tag) -> Result<()> {
        if self.has_pending() {
            return Err(Error::State {
                path: self.file.path.clone(),
                reason: "a cut is outstanding already",
            });
        }
        let mut header = self.file.header;
        header.entries.swap(OPEN, PENDING);
        header.entries[PENDING].present = true;
        header.entries[OPEN].present = true;
        header.entries[OPEN].tag = tag;
        // Whatever ended the cut before has left that bank with a generation of its own.
        assert!(self.file.maps[PENDING].is_empty(), "pending is empty while there is none");
        self.file.commit(header);
        self.file.maps.swap(OPEN, PENDING);
        Ok(())
    }

    /// The commit: pending is dropped. Atomic, in constant time. Nothing if no cut is
    /// outstanding.
    pub fn drop_pending(&mut self) {
        if self.has_pending() {
            let mut header = self.file.header;
            header.entries[PENDING].present = false;
            renew(&mut header, PENDING);
            self.file.commit(header);
            self.file.maps[PENDING].reset_all();
        }
    }

    /// Sets in one map what is set in another. The cost is that of what that one holds.
    ///
    /// Before [`void_pending`](MapSet::void_pending) and
    /// [`all_to_differs`](MapSet::all_to_differs) this and a flush make the changes of roles safe
    /// from a loss of power, which could keep them and not the bits.
    ///
    /// # Panics
    /// Towards pending, while no cut is outstanding.
    pub fn unite(&mut self, to: Role, from: Role) {
        self.check_role(to);
        if to != from {
            self.file.or_from(to.index(), from.index());
        }
    }

    /// A cut that came to nothing: pending is united with open, which takes pending's tag,
    /// because it counts from then on again. The cost is that of what pending holds. A kill
    /// within leaves the cut outstanding, and open with more than before. Nothing if no cut is
    /// outstanding.
    pub fn void_pending(&mut self) {
        if self.has_pending() {
            self.file.or_from(OPEN, PENDING);
            let mut header = self.file.header;
            header.entries[OPEN].tag = header.entries[PENDING].tag;
            header.entries[PENDING].present = false;
            renew(&mut header, PENDING);
            self.file.commit(header);
            self.file.maps[PENDING].reset_all();
        }
    }

    /// The peer may lack anything that was ever noted: differs takes in open and pending, which
    /// are empty afterwards, and no cut is outstanding. Open takes pending's tag. The cost is that of what open
    /// and pending hold. A kill within leaves everything at least where it was.
    pub fn all_to_differs(&mut self) {
        self.file.or_from(DIFFERS, OPEN);
        self.file.or_from(DIFFERS, PENDING);
        let mut header = self.file.header;
        if self.has_pending() {
            header.entries[OPEN].tag = header.entries[PENDING].tag;
        }
        header.entries[PENDING].present = false;
        renew(&mut header, OPEN);
        renew(&mut header, PENDING);
        self.file.commit(header);
        self.file.maps[OPEN].reset_all();
        self.file.maps[PENDING].reset_all();
    }

    /// The disk has grown: the maps describe `size` items from now on. What is added differs, and
    /// what is in flight stays so. The maps lie in a new file then, made whole and put in the place
    /// of the old one; if that fails, everything is as it was. The cost is that of making a file.
    ///
    /// # Errors
    /// [`Error::State`] if it is less than before; [`Error::Impossible`]; [`Error::Io`].
    pub fn grow(&mut self, size: u64) -> Result<()> {
        let header = &self.file.header;
        if size < header.size {
            let reason = "maps do not shrink";
            return Err(Error::State { path: self.file.path.clone(), reason });
        }
        if size > header.size {
            let granularity_log2 = header.granularity_log2;
            self.file = rebuild(&mut self.file, size, granularity_log2)?;
        }
        Ok(())
    }

    /// Memory held by the three maps, in bytes, without the pages of the file.
    pub fn memory_bytes(&self) -> usize {
        self.file.memory_bytes()
    }

    /// Gives back memory that holds no set bit.
    pub fn shrink(&mut self) {
        self.file.maps.iter_mut().for_each(HBitmap::shrink);
    }

    /// Waits until everything is on stable storage, with checksums.
    ///
    /// # Errors
    /// [`Error::Io`]; from then on [`Error::Sticky`], until the file has been opened again.
    pub fn flush(&mut self) -> Result<()> {
        self.file.flush()
    }

    /// Whether the caller keeps an [`ActivityLog`](super::ActivityLog) from now on, in which nothing is
    /// hot: waits until everything is on stable storage, and notes that after a loss of power the log
    /// says what may be missing, or that there is none. With a log chunks have no checksum until the
    /// file is closed. Until then a file that was opened after a loss of power stays one that has
    /// lost power, whoever is killed meanwhile.
    ///
    /// # Errors
    /// As [`flush`](MapSet::flush).
    pub fn set_logged(&mut self, logged: bool) -> Result<()> {
        self.file.set_logged(logged)
    }

    /// Puts the maps on stable storage from another thread, while they are in use.
    pub fn flusher(&self) -> MapFlush {
        self.file.flusher()
    }

    /// Flushes, and notes a clean stop. What is still in flight differs: nobody will hear how it
    /// ends.
    ///
    /// # Errors
    /// As [`flush`](MapSet::flush).
    pub fn close(mut self) -> Result<()> {
        self.file.interrupted_to(DIFFERS, &[OPEN, PENDING])?;
        self.file.close()
    }

    fn check_role(&self, role: Role) {
        assert!(role != Role::Pending || self.has_pending(), "no cut is outstanding");
    }
}
