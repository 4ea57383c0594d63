//! A primary that has become a secondary again: what it wrote, and what its operator gives up.

use std::path::Path;

use brep_block::storage;
use brep_hbitmap::MapSet;
use serde::Serialize;

use super::disk::ReplicaDisk;
use super::group::Group;
use crate::config::SideConfig;
use crate::link::{MapsInfo, Message, RANGES_MAX, RefusalKind};
use crate::primary::{MapsOf, distrust};
use crate::state::{Record, RecordStore, Role};
use crate::status::{Written, size_text};
use crate::table::Disks;
use crate::written::{describe, show_written, written_ranges};
use crate::{Error, Result};

/// What is lost if this side gives up what it has and its primary lacks.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Discard {
    /// Bytes in all, by granules: at most so many; none: not known, possibly everything.
    pub bytes: Option<u64>,
    /// One entry a disk.
    pub disks: Vec<Written>,
    /// It was only asked.
    pub dry_run: bool,
}

/// The primary's refusal.
#[derive(Debug, Clone)]
pub(crate) struct Refused {
    pub(crate) kind: RefusalKind,
    pub(crate) reason: String,
    pub(crate) advice: Option<String>,
    /// What the primary has and this side lacks.
    pub(crate) theirs: Vec<Written>,
}

/// Whether a side with this record becomes a secondary by being run as one.
///
/// # Errors
/// It cannot be run as one, or there is nothing to be discarded.
pub(crate) fn check(record: &Record, config: &SideConfig) -> Result<bool> {
    let secondary = &record.secondary;
    let returns = record.role == Role::Primary
        && match &secondary.promotion {
            None => true,
            Some(promotion) if config.discard_local && promotion.held.is_some() => {
                return Err(Error::refused(
                    "this side has been promoted, and that is held: start it without \
                     --discard-local, and undo it with brep failover --rollback",
                ));
            }
            Some(promotion) if config.discard_local && !promotion.merged => {
                return Err(Error::refused(
                    "this side has been promoted, and the merge has not ended: start it without \
                     --discard-local, and wait until brep status says `promoted`",
                ));
            }
            Some(_) => config.discard_local,
        };
    let outdated = returns || secondary.outdated;
    if outdated && config.plain_primary {
        return Err(Error::refused(
            "this is the state of a primary; a plain primary does not say what it has. Start with \
             an empty state directory",
        ));
    }
    if config.discard_local && !outdated {
        return Err(Error::refused(
            "nothing is to be discarded here: this side is no primary that returns. Start it \
             without --discard-local",
        ));
    }
    Ok(returns)
}

/// What this side wrote as a primary: the maps of the disks that it had then, by their names. None,
/// if it was no primary, or nothing is left of that.
#[derive(Debug, Default)]
pub(super) struct OwnMaps(Vec<(String, MapSet)>);

impl OwnMaps {
    /// Opens those of an old primary that returns. Of a secondary that was none, maps that were left
    /// behind are removed. `disks` are names and sizes.
    pub(super) fn open(record: &Record, state_dir: &Path, disks: &[(&str, u64)]) -> Result<Self> {
        let joins = |name: &str| {
            record.secondary.disks.iter().any(|d| d.name == name && d.joining.is_some())
        };
        let mut own = OwnMaps::default();
        for (disk, size) in disks.iter().copied() {
            let file = maps_of(state_dir, record, disk, size);
            match (record.secondary.outdated, record.role) {
                // It was added after that: nothing of it is this side's own.
                (true, _) if joins(disk) => {}
                (true, _) => own.0.push((disk.to_owned(), file.open()?)),
                (false, Role::Secondary) => file.remove()?,
                // A promoted side's own.
                (false, Role::Primary) => {}
            }
        }
        Ok(own)
    }

    fn of(&self, disk: &str) -> Option<&MapSet> {
        self.0.iter().find(|(name, _)| name == disk).map(|(_, maps)| maps)
    }

    /// From now on nobody knows since when they count.
    pub(super) fn distrust(&mut self) {
        self.0.iter_mut().for_each(|(_, maps)| distrust(maps));
    }

    /// A disk has gone, and its maps with it.
    pub(super) fn remove(&mut self, disk: &str) {
        self.0.retain(|(name, _)| name != disk);
    }

    /// What hello tells, with these disks in this order; none if nothing is known.
    fn describe<'a>(&self, disks: impl Iterator<Item = &'a str>) -> Option<MapsInfo> {
        let MapsInfo { since, bytes } = describe(self.0.iter().map(|(_, maps)| maps))?;
        let of = |disk| self.0.iter().position(|(name, _)| name == disk).map_or(0, |at| bytes[at]);
        let bytes = disks.map(of).collect();
        (!self.0.is_empty()).then_some(MapsInfo { since, bytes })
    }

    /// The same for people; of `disks`, all of which may differ, if nothing is known.
    pub(super) fn show<'a>(&'a self, disks: impl Iterator<Item = &'a str>) -> Vec<Written> {
        if self.0.is_empty() {
            return show_written(disks, std::iter::empty());
        }
        show_written(self.0.iter().map(|(name, _)| &**name), self.0.iter().map(|(_, maps)| maps))
    }

    /// Writes them out.
    ///
    /// # Errors
    /// A file could not be written.
    pub(super) fn close(self) -> Result<()> {
        let close = |(_, maps): (_, MapSet)| maps.close();
        let closed: Vec<_> = self.0.into_iter().map(close).collect();
        closed
            .into_iter()
            .collect::<std::result::Result<(), _>>()
            .map_err(|e| Error::failed(e.to_string()))
    }
}

/// Where the maps of a disk are that a side had as a primary.
pub(super) fn maps_of<'a>(
    state_dir: &'a Path,
    record: &Record,
    disk: &'a str,
    size: u64,
) -> MapsOf<'a> {
    MapsOf { state_dir, set: record.set, disk, size, granularity_log2: None }
}

/// What a start with `discard_local` would give up. Changes nothing.
///
/// # Errors
/// There is nothing to give up, or a file cannot be read.
pub fn would_discard(config: &SideConfig) -> Result<Discard> {
    let store = RecordStore::open_existing(&config.state_dir)?;
    let mut record = store.record().clone();
    if check(&record, config)? {
        record.return_as_secondary();
    }
    let disks: Vec<_> = record.secondary.disks.iter().filter(|d| d.joining.is_none()).collect();
    let names = || disks.iter().map(|disk| &*disk.name);
    let state_dir = &config.state_dir;
    let maps = match names().all(|d| storage::exists(maps_of(state_dir, &record, d, 0).path())) {
        true => {
            let sizes: Vec<_> = disks.iter().map(|disk| (&*disk.name, disk.size)).collect();
            OwnMaps::open(&record, state_dir, &sizes)?
        }
        false => OwnMaps::default(),
    };
    let written = maps.show(names());
    maps.close()?;
    Ok(Discard { bytes: written.iter().map(|d| d.bytes).sum(), disks: written, dry_run: true })
}

impl Group {
    /// What hello tells of the ranges that this side wrote itself.
    pub(super) fn own_writes(&self) -> Option<MapsInfo> {
        if let Some(primary) = &*self.primary() {
            return primary.introduce().maps;
        }
        self.core().own_maps.describe(self.disks().iter().map(|disk| &*disk.name))
    }

    /// The ranges of a disk, by its place in what hello has told, from `offset` on, that this side
    /// wrote itself.
    pub(super) fn own_ranges(&self, told: &Disks<ReplicaDisk>, disk: u32, offset: u64) -> Message {
        let index = usize::try_from(disk).unwrap_or(usize::MAX);
        let ranges = |maps: &MapSet| written_ranges(maps, offset, RANGES_MAX);
        let found = match &*self.primary() {
            Some(primary) => primary.with_maps(index, ranges),
            None => told.get(index).and_then(|d| self.core().own_maps.of(&d.name).map(ranges)),
        };
        let (ranges, next) = found.unwrap_or_default();
        Message::Ranges { disk, ranges, next }
    }

    /// The same of all disks, for people.
    pub(super) fn own_written(&self) -> Vec<Written> {
        self.core().own_maps.show(self.disks().iter().map(|disk| &*disk.name))
    }

    /// The maps have done their work: a copy has been committed.
    pub(super) fn drop_own_maps(&self) {
        self.core().own_maps = OwnMaps::default();
        if let Err(error) = self.remove_maps() {
            // The next start, or a failover, tries again, and does nothing without.
            tracing::warn!(%error, "maps that are of no more use were not removed");
        }
    }

    /// Removes whatever maps lie in the state directory: they do not know what was received.
    pub(super) fn remove_maps(&self) -> Result<()> {
        self.disks().iter().try_for_each(|disk| self.maps_file(disk).remove())
    }

    /// Where the maps of a disk are that this side had as a primary.
    pub(super) fn maps_file<'a>(&'a self, disk: &'a ReplicaDisk) -> MapsOf<'a> {
        maps_of(&self.config.state_dir, &self.record(), &disk.name, disk.size())
    }

    /// Gives up what this side has and its primary lacks, or only says what that is.
    ///
    /// # Errors
    /// There is nothing to give up, or the record could not be saved.
    pub(super) fn discard_local(&self, dry_run: bool) -> Result<Discard> {
        let record = self.record();
        if record.is_primary() {
            return Err(Error::refused(
                "this side is the disk. To give its writes up: stop it, and start it with brep \
                 secondary --discard-local",
            ));
        }
        let refused = self.core().refused.as_ref().is_some_and(|r| r.kind != RefusalKind::Other);
        if !record.secondary.outdated && !refused {
            return Err(Error::refused(
                "nothing is to be discarded here: this side is a secondary, and its primary has \
                 not refused it",
            ));
        }
        let disks = self.own_written();
        let bytes: Option<u64> = disks.iter().map(|d| d.bytes).sum();
        if !dry_run {
            self.update_record(|record| record.secondary.discard_local = true)?;
            let amount = bytes.map_or_else(|| "unknown".to_owned(), size_text);
            tracing::warn!(amount, "what this side has and its primary lacks is given up");
        }
        Ok(Discard { bytes, disks, dry_run })
    }
}

impl Group {
    /// Why a primary may not overwrite this side's disks, if it may not.
    pub(super) fn wants_consent(&self) -> Option<String> {
        let secondary = &self.record().secondary;
        let wrote_nothing = self.own_writes().is_some_and(|i| i.bytes.iter().all(|b| *b == 0));
        let asks = secondary.outdated && !secondary.discard_local && !wrote_nothing;
        asks.then(|| "this side was a primary, and its writes have not been given up".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use brep_hbitmap::Role as Map;

    use super::*;
    use crate::{Commit, Epoch, Generation, SetId};

    /// What is added when the new primary's disk has grown is nothing that this side has written.
    #[test]
    fn what_an_old_primary_wrote_does_not_grow_with_its_disk() {
        let dir = tempfile::tempdir().unwrap();
        let mut record = Record::blank("p", Role::Secondary);
        record.set = Some(SetId::random());
        record.secondary.outdated = true;
        let com = Commit { cur: Generation::random(), epoch: Epoch(3) };
        let size = 1 << 20;
        let file = maps_of(dir.path(), &record, "vda", size);
        let mut maps = file.create(crate::primary::Since::Commit(com)).unwrap();
        maps.set(Map::Differs, 0, 1);
        maps.close().unwrap();
        for _ in 0..2 {
            let own = OwnMaps::open(&record, dir.path(), &[("vda", 4 * size)]).unwrap();
            let told = own.describe(["vda"].into_iter()).unwrap();
            assert_eq!(told.bytes, [65536], "{told:?}");
            own.close().unwrap();
        }
        // When it counts again, it counts all of the disk.
        let grown =
            MapsOf { granularity_log2: Some(16), ..maps_of(dir.path(), &record, "vda", 4 * size) };
        assert_eq!(grown.open().unwrap().map(Map::Differs).dirty_bytes(), 65536 + 3 * size);
    }
}
