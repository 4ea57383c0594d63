//! A primary that has become a secondary again: what it wrote, and what its operator gives up.

use std::sync::Arc;

use brep_block::storage;
use brep_hbitmap::MapSet;
use serde::Serialize;

use super::disk::ReplicaDisk;
use super::group::Group;
use crate::config::SideConfig;
use crate::link::{MapsInfo, Message, RANGES_MAX, RefusalKind};
use crate::primary::MapsOf;
use crate::state::{Record, RecordStore, Role};
use crate::status::{Written, size_text};
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

/// What this side wrote as a primary; of a secondary that was none, nothing, and maps that were
/// left behind are removed.
pub(super) fn open_own_maps(
    record: &Record,
    config: &SideConfig,
    disks: &[(&str, u64)],
) -> Result<Vec<MapSet>> {
    let state_dir = &config.state_dir;
    let files = disks.iter().map(|(disk, size)| {
        let (set, size) = (record.set, *size);
        MapsOf { state_dir, set, disk, size, granularity_log2: None }
    });
    match (record.secondary.outdated, record.role) {
        (true, _) => files.map(|file| file.open()).collect(),
        (false, Role::Secondary) => {
            for file in files {
                file.remove()?;
            }
            Ok(Vec::new())
        }
        // A promoted side's own.
        (false, Role::Primary) => Ok(Vec::new()),
    }
}

/// What a start with `discard_local` would give up. Changes nothing.
///
/// # Errors
/// There is nothing to give up, or a file cannot be read.
pub fn would_discard(config: &SideConfig) -> Result<Discard> {
    let state = config.state_dir.join("state");
    if !storage::exists(&state) {
        let text = format!("{}: no such file; nothing was ever written here", state.display());
        return Err(Error::refused(text));
    }
    let store = RecordStore::open(&config.state_dir, || unreachable!("it exists"))?;
    let mut record = store.record().clone();
    check(&record, config)?;
    record.secondary.outdated = true;
    let sizes = |name: &str| {
        let mut primary = record.primary.disks.iter().map(|(name, size)| (name.as_str(), *size));
        let mut secondary = record.secondary.disks.iter().map(|d| (d.name.as_str(), d.size));
        primary.find(|d| d.0 == name).or_else(|| secondary.find(|d| d.0 == name))
    };
    let configs = record.disks_at_start(&config.disks);
    let names = || configs.iter().map(|d| d.name.as_str());
    let maps_of = |disk| {
        let (state_dir, set) = (&config.state_dir, record.set);
        MapsOf { state_dir, set, disk, size: 0, granularity_log2: None }
    };
    let known = names().all(|name| storage::exists(maps_of(name).path()));
    let disks: Option<Vec<_>> = names().map(sizes).collect();
    let maps = match disks.filter(|_| known) {
        Some(disks) => open_own_maps(&record, config, &disks)?,
        None => Vec::new(),
    };
    let disks = show_written(names(), maps.iter());
    for maps in maps {
        maps.close().map_err(|e| Error::failed(e.to_string()))?;
    }
    Ok(Discard { bytes: disks.iter().map(|d| d.bytes).sum(), disks, dry_run: true })
}

impl Group {
    /// What hello tells of the ranges that this side wrote itself.
    pub(super) fn own_writes(&self) -> Option<MapsInfo> {
        if let Some(primary) = &*self.primary() {
            return primary.introduce().maps;
        }
        let core = self.core();
        describe(core.own_maps.iter()).filter(|_| !core.own_maps.is_empty())
    }

    /// The ranges of a disk, from `offset` on, that this side wrote itself.
    pub(super) fn own_ranges(&self, disk: u32, offset: u64) -> Message {
        let index = usize::try_from(disk).unwrap_or(usize::MAX);
        let ranges = |maps: &MapSet| written_ranges(maps, offset, RANGES_MAX);
        let found = match &*self.primary() {
            Some(primary) => primary.with_maps(index, ranges),
            None => self.core().own_maps.get(index).map(ranges),
        };
        let (ranges, next) = found.unwrap_or_default();
        Message::Ranges { disk, ranges, next }
    }

    /// The same of all disks, for people.
    pub(super) fn own_written(&self) -> Vec<Written> {
        show_written(self.disks().iter().map(|d| d.name.as_str()), self.core().own_maps.iter())
    }

    /// The maps have done their work: a copy has been committed.
    pub(super) fn drop_own_maps(&self) {
        self.core().own_maps.clear();
        if let Err(error) = self.remove_maps() {
            // The next start, or a failover, tries again, and does nothing without.
            tracing::warn!(%error, "maps that are of no more use were not removed");
        }
    }

    /// Removes whatever maps lie in the state directory: they do not know what was received.
    pub(super) fn remove_maps(&self) -> Result<()> {
        let (state_dir, set) = (&self.config.state_dir, self.record().set);
        let remove = |disk: &Arc<ReplicaDisk>| {
            MapsOf { state_dir, set, disk: &disk.name, size: disk.size(), granularity_log2: None }
                .remove()
        };
        self.disks().iter().try_for_each(remove)
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
