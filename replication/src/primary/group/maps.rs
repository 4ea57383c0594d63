//! The maps: what the peer is not known to have.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};

use brep_block::storage;
use brep_hbitmap::{
    AfterPowerLoss, Error as MapError, Identity, InFlight, MapSet, Options, Role, Tag,
};
use sha2::{Digest, Sha256};
use tokio::time::Instant;
use uuid::Uuid;

use super::{Core, Group};
use crate::link::CopyMode;
use crate::primary::progress::CopyProgress;
use crate::side::Side;
use crate::status::Written;
use crate::written::show_written;
use crate::{Commit, Epoch, Error, Generation, Result, SetId};

/// Since when a map counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Since {
    /// Nobody knows: the map was made anew after it, or the power, had been lost.
    Unknown,
    /// Whatever may differ from a disk of any contents: they hold all of it.
    Ever,
    /// Everything after this checkpoint.
    Commit(Commit),
}

impl Since {
    const EVER: Tag = Tag { id: [0xff; 16], number: 0 };

    pub(crate) fn of(tag: Tag) -> Self {
        match tag {
            tag if tag == Tag::default() => Since::Unknown,
            Self::EVER => Since::Ever,
            Tag { id, number } => {
                let cur = Generation(Uuid::from_bytes(id));
                Since::Commit(Commit { cur, epoch: Epoch(number) })
            }
        }
    }

    pub(crate) fn tag(self) -> Tag {
        match self {
            Since::Unknown => Tag::default(),
            Since::Ever => Self::EVER,
            Since::Commit(Commit { cur, epoch }) => Tag { id: cur.0.into_bytes(), number: epoch.0 },
        }
    }
}

/// Where a disk's maps are, and whose.
#[derive(Debug, Clone, Copy)]
pub(crate) struct MapsOf<'a> {
    pub(crate) state_dir: &'a Path,
    pub(crate) set: Option<SetId>,
    /// The disk's name.
    pub(crate) disk: &'a str,
    /// The disk's size in bytes.
    pub(crate) size: u64,
    /// Bytes that a bit stands for, as a power of two. None: what the file has, and its size, which
    /// may be less: nothing is counted in it any more. In a new one, what fits the size.
    pub(crate) granularity_log2: Option<u32>,
}

impl<'a> MapsOf<'a> {
    pub(crate) fn new(side: &'a Side, disk: &'a str, size: u64) -> Self {
        let state_dir = &side.config.state_dir;
        let chosen = side.config.granularity.map(u64::ilog2);
        let granularity_log2 = Some(chosen.unwrap_or_else(|| Options::granularity_log2_for(size)));
        MapsOf { state_dir, set: side.record.get().set, disk, size, granularity_log2 }
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.state_dir.join(format!("{}.maps", self.disk))
    }

    /// Maps belong to a disk of a set.
    pub(super) fn identity(&self) -> Identity {
        let mut hash = Sha256::new();
        hash.update(self.set.map_or([0; 16], |s| s.0.into_bytes()));
        hash.update(self.disk);
        let mut id = [0; 16];
        id.copy_from_slice(&hash.finalize()[..16]);
        Identity(id)
    }

    fn options(&self) -> Options {
        let identity = self.identity();
        let options = match self.granularity_log2 {
            Some(granularity_log2) => Options::new(identity, self.size, granularity_log2),
            None => {
                let fitting = Options::granularity_log2_for(self.size);
                Options::new(identity, self.size, fitting).keep_granularity().keep_size()
            }
        };
        in_boot(options, storage::boot_id(self.state_dir).as_deref())
    }

    pub(super) fn failed(&self, error: &MapError) -> Error {
        Error::failed(format!("dirty maps of disk {}: {error}", self.disk))
    }

    /// Opens them; they are copied if the disk has grown, or another granularity is wanted. After a
    /// kill differs holds what was in flight; after a loss of power everything that was in the maps, and
    /// what was hot, if there was a log. What cannot be trusted is made
    /// anew: everything differs, since nobody knows when.
    ///
    /// # Errors
    /// The file is in use, or cannot be read or written.
    pub(crate) fn open(&self) -> Result<MapSet> {
        self.open_with_log()
    }

    pub(super) fn open_after(&self, power_loss: AfterPowerLoss) -> Result<MapSet> {
        let options = self.options().after_power_loss(power_loss);
        match MapSet::open(self.path(), &options) {
            Ok(maps) => return Ok(maps),
            Err(MapError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {}
            Err(error @ (MapError::Locked { .. } | MapError::Io { .. })) => {
                return Err(self.failed(&error));
            }
            Err(error) => {
                let disk = self.disk;
                tracing::warn!(disk, %error, "the dirty maps are made anew: everything may differ");
            }
        }
        let mut maps = self.create(Since::Unknown)?;
        maps.set(Role::Differs, 0, self.size);
        Ok(maps)
    }

    /// Bytes that the file takes.
    ///
    /// # Errors
    /// There are no maps for such a disk.
    pub(crate) fn file_len(&self) -> Result<u64> {
        MapSet::file_len(&self.options()).map_err(|e| self.failed(&e))
    }

    /// Makes empty ones that count from there, such as those of a disk that is promoted. A file that
    /// is there already is replaced.
    ///
    /// # Errors
    /// The file cannot be replaced or written.
    pub(crate) fn create(&self, since: Since) -> Result<MapSet> {
        self.remove()?;
        MapSet::create(self.path(), &self.options(), since.tag()).map_err(|e| self.failed(&e))
    }

    /// What the next start finds is what a loss of power has left.
    #[cfg(test)]
    pub(crate) fn lose_power(&self) {
        let options = self.options().after_power_loss(AfterPowerLoss::Accept);
        // Only who says that he keeps a log has made a loss of power good: another boot's own.
        let mut maps = MapSet::open(self.path(), &options.boot_id([9; 16])).unwrap();
        maps.set_logged(true).unwrap();
    }

    /// Removes the file, if there is one: maps do not follow what a secondary is given.
    ///
    /// # Errors
    /// It cannot be removed; it must not be taken for true later.
    pub(crate) fn remove(&self) -> Result<()> {
        let path = self.path();
        match storage::remove(&path) {
            Err(error) if error.kind() != ErrorKind::NotFound => {
                Err(Error::failed(format!("{}: {error}", path.display())))
            }
            _ => Ok(()),
        }
    }
}

/// What lies on another machine may have lost its power with nobody here knowing.
fn in_boot(options: Options, boot: Option<&str>) -> Options {
    match boot {
        Some(_) => options,
        None => options.boot_id([0; 16]),
    }
}

fn bytes_behind(maps: &MapSet) -> u64 {
    maps.map(Role::Differs).dirty_bytes()
}

/// From now on nobody knows since when they count.
pub(crate) fn distrust(maps: &mut MapSet) {
    maps.set_tag(Role::Differs, Since::Unknown.tag());
}

/// The operator says that the peer's disk is equal to this one: whatever differs is written later.
/// Another peer's may differ anywhere.
fn trust(maps: &mut MapSet, size: u64) {
    maps.set(Role::Open, 0, size);
    maps.reset_all(Role::Differs);
    maps.void_pending();
    for role in [Role::Open, Role::Differs] {
        maps.set_tag(role, Since::Ever.tag());
    }
}

/// Brings the maps to what they have to be when a session begins.
fn begin_copy(maps: &mut MapSet, copy: CopyMode, size: u64) {
    match copy {
        CopyMode::Full | CopyMode::Compare => {
            maps.set(Role::Differs, 0, size);
            maps.void_pending();
            for role in [Role::Open, Role::Differs] {
                maps.set_tag(role, Since::Ever.tag());
            }
        }
        // The peer may have been given something else meanwhile.
        CopyMode::Changed => {
            // What is open counts since the epoch that is pending, if there is one.
            maps.void_pending();
            maps.all_to_differs();
        }
        // The peer has what it acknowledged. A stop may have left a cut behind; it is void.
        CopyMode::Missing => maps.void_pending(),
    }
}

/// What has to be on stable storage before [`trust`] and [`begin_copy`] empty a map.
fn unite_for(maps: &mut MapSet, copy: CopyMode, trusted: bool) {
    maps.unite(Role::Open, Role::Pending);
    if trusted {
        maps.set(Role::Open, 0, maps.map(Role::Open).size());
    }
    if copy == CopyMode::Changed {
        maps.unite(Role::Differs, Role::Open);
    }
}

impl Group {
    /// Brings all maps to what they have to be when a session begins.
    ///
    /// # Errors
    /// They could not be put on stable storage where that is promised.
    pub(super) fn prepare_maps(&self, copy: CopyMode, trusted: bool) -> Result<()> {
        let unite = |core: &mut Core| {
            core.maps.values_mut().for_each(|maps| unite_for(maps, copy, trusted));
        };
        self.change_roles(unite, |core| {
            for maps in core.maps.values_mut() {
                let size = maps.map(Role::Differs).size();
                if trusted {
                    trust(maps, size);
                }
                begin_copy(maps, copy, size);
            }
            core.progress = Some(CopyProgress::begin(core.all_bytes_behind(), Instant::now()));
        });
        match self.core().fatal() {
            None => Ok(()),
            Some(reason) => Err(Error::failed(reason)),
        }
    }

    /// A cut has come to nothing.
    pub(super) fn void_pending(&self) {
        let unite = |core: &mut Core| {
            core.maps.values_mut().for_each(|maps| maps.unite(Role::Open, Role::Pending));
        };
        self.change_roles(unite, |core| core.maps.values_mut().for_each(MapSet::void_pending));
    }

    /// Everything differs, in a session that goes on.
    pub(super) fn all_differs(&self) {
        let all = |core: &mut Core| {
            for maps in core.maps.values_mut() {
                maps.set(Role::Differs, 0, maps.map(Role::Differs).size());
            }
            core.progress = Some(CopyProgress::begin(core.all_bytes_behind(), Instant::now()));
        };
        self.change_roles(|_| {}, all);
    }

    /// All of these disks differs, when a session is about to begin that copies them.
    pub(super) fn copy_whole(&self, disks: impl Iterator<Item = usize>) {
        let disks: Vec<_> = disks.collect();
        if disks.is_empty() {
            return;
        }
        let all = |core: &mut Core| {
            for (_, maps) in core.maps.iter_mut().filter(|(disk, _)| disks.contains(disk)) {
                maps.set(Role::Differs, 0, maps.map(Role::Differs).size());
            }
        };
        self.change_roles(|_| {}, all);
    }

    /// Looks at the maps of a disk, by its place in the order of hello.
    pub(crate) fn with_maps<T>(&self, place: usize, look: impl FnOnce(&MapSet) -> T) -> Option<T> {
        self.core().maps.values().nth(place).map(look)
    }

    /// A flush of a disk has failed: it may have lost what the peer has, and nobody knows what.
    pub(crate) fn distrust_maps(&self, disk: usize) {
        if let Some(maps) = self.core().maps.get_mut(&disk) {
            distrust(maps);
        }
    }

    /// Marks ranges as different that the other side has written; what lies beyond the disk is left
    /// out.
    pub(crate) fn mark_theirs(&self, disk: usize, ranges: &[(u64, u64)]) {
        let mut core = self.core();
        for (start, len) in ranges {
            let size = core.maps.get(&disk).map_or(0, |maps| maps.map(Role::Differs).size());
            let start = (*start).min(size);
            core.mark(disk, Role::Differs, start, (*len).min(size - start));
        }
    }

    /// What this side has written since its maps begin.
    pub(crate) fn written(&self) -> Vec<Written> {
        show_written(self.disks().iter().map(|d| d.name.as_str()), self.core().maps.values())
    }

    /// What one bit of a disk's maps stands for.
    pub(crate) fn granule_bytes(&self, disk: usize) -> u64 {
        self.core().maps.get(&disk).map_or(1, |maps| maps.map(Role::Differs).granularity())
    }

    /// Bytes that the peer is not known to have, of each disk.
    pub(crate) fn all_bytes_behind(&self) -> Vec<u64> {
        self.core().all_bytes_behind()
    }

    /// The first range of a disk, from `offset` on, that differs; at most `max` bytes.
    pub(crate) fn next_different(&self, disk: usize, offset: u64, max: u64) -> Option<Range<u64>> {
        let core = self.core();
        let map = core.maps.get(&disk)?.map(Role::Differs);
        let granule = map.granularity();
        let area = map.next_dirty_area(offset..map.size(), max)?;
        // Whole granules: a bit is cleared for all of it.
        let start = area.start - area.start % granule;
        let end = area.end.next_multiple_of(granule).min(map.size());
        Some(start..end)
    }

    /// The range, made longer to at most `len` bytes, as far as whole granules differ.
    pub(crate) fn extend_range(&self, disk: usize, range: &Range<u64>, len: u64) -> Range<u64> {
        let core = self.core();
        let Some(maps) = core.maps.get(&disk) else { return range.clone() };
        let map = maps.map(Role::Differs);
        let limit = range.start.saturating_add(len).min(map.size());
        let end = map.next_zero(range.start..limit).unwrap_or(limit);
        let end = if end == map.size() { end } else { end - end % map.granularity() };
        range.start..end.max(range.end)
    }

    /// Takes whole granules as equal while they are compared. They differ again when the result is
    /// dropped, unless they were found equal.
    pub(crate) async fn assume_equal(
        &self,
        disk: usize,
        range: Range<u64>,
    ) -> brep_block::Result<AssumedEqual<'_>> {
        let (start, len) = (range.start, range.end - range.start);
        let assume = |core: &mut Core| {
            // A kill before they are known to be equal makes them differ.
            let in_flight = core.begin_in_flight(disk, start, len, 1);
            core.clear_different(disk, start, len);
            in_flight
        };
        let in_flight = self.when_hot(disk, (start, len), None, assume).await?;
        Ok(AssumedEqual { group: self, disk, range, in_flight })
    }

    /// Whether any range differs of any disk that checkpoints hold.
    pub(crate) fn has_differences(&self) -> bool {
        self.core().maps_to_cut().any(|maps| !maps.map(Role::Differs).is_empty())
    }

    /// Puts the maps on stable storage and closes them.
    ///
    /// # Errors
    /// A file could not be written.
    pub(crate) fn close_maps(&self) -> Result<()> {
        self.stop_hot_tasks();
        let maps = {
            let mut core = self.core();
            core.hot.clear();
            std::mem::take(&mut core.maps)
        };
        #[cfg(test)]
        crate::state::faults::pass_by(&self.config.state_dir, crate::state::faults::Kind::Maps);
        // Queries do not wait for the file system.
        let close = |maps: MapSet| maps.close().map_err(|e| Error::failed(e.to_string()));
        maps.into_values().map(close).fold(Ok(()), Result::and)
    }
}

/// Granules that count as equal until they have been compared.
pub(crate) struct AssumedEqual<'a> {
    group: &'a Group,
    disk: usize,
    range: Range<u64>,
    in_flight: Option<InFlight>,
}

impl AssumedEqual<'_> {
    /// Up to here they are equal. Returns the end of the granules that this is true for.
    pub(crate) fn confirm_to(&mut self, end: u64) -> u64 {
        if end < self.range.end {
            let granule = self.group.granule_bytes(self.disk);
            self.range.start = (end - end % granule).max(self.range.start);
        } else {
            self.range.start = self.range.end;
        }
        self.range.start
    }

    /// All are equal but those that hold these ranges.
    pub(crate) fn confirm_but(mut self, different: &[Range<u64>]) {
        let mut core = self.group.core();
        for range in different {
            core.mark(self.disk, Role::Differs, range.start, range.end - range.start);
        }
        self.range.start = self.range.end;
    }
}

impl Drop for AssumedEqual<'_> {
    fn drop(&mut self) {
        let (start, end) = (self.range.start, self.range.end);
        let mut core = self.group.core();
        if start < end {
            core.mark(self.disk, Role::Differs, start, end - start);
        }
        core.end_in_flight(self.disk, self.in_flight);
    }
}

impl Core {
    /// In the order of the disks.
    pub(super) fn all_bytes_behind(&self) -> Vec<u64> {
        let behind = |(disk, maps): (&usize, &MapSet)| (*disk, bytes_behind(maps));
        let all: BTreeMap<usize, u64> = self.maps.iter().map(behind).chain(self.growing).collect();
        all.into_values().collect()
    }

    /// Takes the maps of a disk, which nobody changes until they are given back.
    pub(super) fn begin_growth(&mut self, disk: usize) -> Option<MapSet> {
        let maps = self.maps.remove(&disk)?;
        self.growing = Some((disk, bytes_behind(&maps)));
        Some(maps)
    }

    pub(super) fn end_growth(&mut self, disk: usize, maps: MapSet) {
        self.growing = None;
        self.maps.insert(disk, maps);
    }

    /// Marks whole granules as on their way.
    pub(super) fn clear_different(&mut self, disk: usize, offset: u64, len: u64) {
        if let Some(maps) = self.maps.get_mut(&disk) {
            maps.transfer(Role::Differs, Role::Open, offset, len);
        }
    }

    /// Something begins that is to be in the maps as long as it has not ended `ends` times.
    pub(super) fn begin_in_flight(
        &mut self,
        disk: usize,
        offset: u64,
        len: u64,
        ends: u8,
    ) -> Option<InFlight> {
        self.maps.get_mut(&disk)?.begin_in_flight(offset, len, ends)
    }

    pub(super) fn end_in_flight(&mut self, disk: usize, request: Option<InFlight>) {
        if let (Some(maps), Some(request)) = (self.maps.get_mut(&disk), request) {
            maps.end_in_flight(request);
        }
    }

    pub(super) fn mark(&mut self, disk: usize, role: Role, offset: u64, len: u64) {
        if let Some(maps) = self.maps.get_mut(&disk)
            && len > 0
        {
            maps.set(role, offset, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use brep_hbitmap::LastStop;

    use super::*;

    #[test]
    fn maps_that_were_in_use_on_another_machine_may_have_lost_power() {
        let dir = tempfile::tempdir().unwrap();
        for boot in [Some("this one"), None] {
            let path = dir.path().join("vda.maps");
            let options = in_boot(Options::new(Identity([7; 16]), 1 << 20, 16), boot);
            drop(MapSet::create(&path, &options, Tag::default()).unwrap());
            let found = MapSet::open(&path, &options).map(|maps| maps.last_stop());
            match boot {
                Some(_) => assert_eq!(found.unwrap(), LastStop::Killed),
                None => assert!(matches!(found, Err(MapError::PowerLost { .. })), "{found:?}"),
            }
            std::fs::remove_file(&path).unwrap();
        }
    }
}
