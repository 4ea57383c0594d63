//! What a loss of power may take from the maps: the activity log of each disk, and the flushes that
//! let extents leave it. With `--durability process` there is none of this.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use brep_block::storage::{self, PlainFile};
use brep_block::{Operation, detach};
use brep_hbitmap::{ActivityLog, AfterPowerLoss, LastStop, LogWrite, MapFlush, MapSet, Role, Sync};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use super::maps::MapsOf;
use super::window::Admission;
use super::{Core, DiskPart, Group};
use crate::config::Durability;
use crate::side::Side;
use crate::{Error, Result};

/// The activity log of a disk, and its file.
#[derive(Debug)]
pub(super) struct HotExtents {
    log: ActivityLog,
    file: Arc<dyn PlainFile>,
}

/// Who writes the logs and flushes the maps, and who waits for that.
#[derive(Debug, Default)]
pub(super) struct HotTasks {
    /// A log has something to write.
    wanted: Notify,
    /// The maps are to be flushed.
    full: Notify,
    /// A log was written, or never will be.
    changed: Notify,
    stopped: CancellationToken,
}

impl MapsOf<'_> {
    fn log_path(&self) -> PathBuf {
        self.state_dir.join(format!("{}.log", self.disk))
    }

    /// Removes whatever there is of a disk's maps.
    ///
    /// # Errors
    /// A file cannot be removed; it must not be taken for true later.
    pub(crate) fn remove_all(&self) -> Result<()> {
        self.remove()?;
        let path = self.log_path();
        match storage::remove(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(Error::failed(format!("{}: {error}", path.display())))
            }
            _ => Ok(()),
        }
    }

    /// Opens the maps, whether or not there was a log; see [`open`](Self::open).
    pub(super) fn open_with_log(&self) -> Result<MapSet> {
        let Ok(Some((_, hot))) = self.load_log() else {
            return self.open_after(AfterPowerLoss::Refuse);
        };
        let mut maps = self.open_after(AfterPowerLoss::Accept)?;
        if maps.last_stop() == LastStop::PowerLost {
            // This side's disk may have lost any of what is in the maps; of what was hot, the maps.
            let size = maps.map(Role::Differs).size();
            for range in hot.into_iter().filter(|range| range.start < size) {
                maps.set(Role::Differs, range.start, range.end.min(size) - range.start);
            }
            maps.unite(Role::Differs, Role::Open);
            maps.unite(Role::Differs, Role::Pending);
            maps.flusher().run().map_err(|e| self.failed(&e))?;
            maps.all_to_differs();
        }
        Ok(maps)
    }

    /// Keeps a log from now on, in which nothing is hot.
    ///
    /// # Errors
    /// The log cannot be read or written, or the maps not be flushed.
    pub(super) fn begin_log(&self, maps: &mut MapSet) -> Result<HotExtents> {
        let path = self.log_path();
        let failed = |e: io::Error| Error::failed(format!("{}: {e}", path.display()));
        let log = match self.load_log().map_err(failed)? {
            Some((log, _)) => log,
            None => ActivityLog::new(self.identity(), self.size),
        };
        maps.set_logged(true).map_err(|e| self.failed(&e))?;
        let file = storage::open_file(&path).map_err(failed)?;
        let mut hot = HotExtents { log, file };
        // Whatever was hot before is on stable storage now.
        let first = hot.log.clear();
        hot.file.write_all_at(&first.bytes, first.offset).map_err(failed)?;
        hot.file.sync_data().map_err(failed)?;
        hot.log.written();
        Ok(hot)
    }

    fn load_log(&self) -> io::Result<Option<(ActivityLog, Vec<Range<u64>>)>> {
        let path = self.log_path();
        if !storage::exists(&path) {
            return Ok(None);
        }
        let file = storage::open_file(&path)?;
        let mut bytes = vec![0; file.len()?.min(ActivityLog::FILE_LEN) as usize];
        file.read_exact_at(&mut bytes, 0)?;
        Ok(ActivityLog::load(&path, &bytes, self.identity(), self.size).ok())
    }
}

/// The logs of all disks, if a loss of power is to be survived; else the maps say that there are none.
///
/// # Errors
/// A log cannot be written, or maps not be flushed.
pub(super) fn begin_logs<'a>(
    side: &Side,
    disks: impl Iterator<Item = (&'a Arc<DiskPart>, &'a mut MapSet)>,
) -> Result<BTreeMap<usize, HotExtents>> {
    let mut hot = BTreeMap::new();
    for (disk, maps) in disks {
        let of = MapsOf::new(side, &disk.name, disk.size());
        match side.config.durability {
            Durability::Power => drop(hot.insert(disk.number, of.begin_log(maps)?)),
            Durability::Process => maps.set_logged(false).map_err(|e| of.failed(&e))?,
        }
    }
    Ok(hot)
}

async fn write(file: Arc<dyn PlainFile>, write: LogWrite) -> io::Result<()> {
    storage::beside(move || {
        file.write_all_at(&write.bytes, write.offset)?;
        file.sync_data()
    })
    .await?
}

impl Core {
    /// Whether bits of a range may be set now.
    fn heat(&mut self, disk: usize, offset: u64, len: u64) -> bool {
        self.hot.get_mut(&disk).is_none_or(|hot| hot.log.heat(offset, len))
    }
}

impl Group {
    /// The disk has grown: what is added differs. On stable storage when this returns, as is what was
    /// set before. The thread of the disks waits for the file system, and queries do not: they are
    /// told what was known before.
    pub(super) fn grow_maps(&self, disk: usize, size: u64) -> brep_hbitmap::Result<()> {
        let Some(mut maps) = self.core().begin_growth(disk) else { return Ok(()) };
        #[cfg(test)]
        crate::state::faults::pass_by(&self.config.state_dir, crate::state::faults::Kind::Maps);
        let grown = maps.grow(size);
        let mut core = self.core();
        core.end_growth(disk, maps);
        grown?;
        if let Some(hot) = core.hot.get_mut(&disk) {
            hot.log.resize(size);
        }
        Ok(())
    }

    /// Calls `work` with the core locked when the bits of a range may be set: at once, unless a loss
    /// of power could take them away unnoticed.
    ///
    /// # Errors
    /// Nothing may be acknowledged any more.
    pub(super) async fn when_hot<T>(
        &self,
        disk: usize,
        range: (u64, u64),
        admission: Option<&Admission>,
        work: impl FnOnce(&mut Core) -> T,
    ) -> brep_block::Result<T> {
        let (offset, len) = range;
        let mut paused = None;
        loop {
            let changed = {
                let mut core = self.core();
                self.check_fatal_in(&core, disk, Operation::Write)
                    .map_err(|e| e.at(offset, len))?;
                if core.heat(disk, offset, len) {
                    return Ok(work(&mut core));
                }
                // With the core locked: what changes later is noticed.
                let mut changed = Box::pin(self.hot_tasks.changed.notified());
                changed.as_mut().enable();
                changed
            };
            // The state directory is waited for, and not the peer.
            if let Some(admission) = admission.filter(|_| paused.is_none()) {
                paused = Some(Paused::begin(admission));
            }
            self.hot_tasks.wanted.notify_one();
            changed.await;
        }
    }

    /// Writes the logs and flushes the maps from now on, until the maps are closed.
    pub(super) fn start_hot_tasks(self: &Arc<Self>) {
        if !self.core().hot.is_empty() {
            let stopped = &self.hot_tasks.stopped;
            let (logs, flushes) = (write_logs(Arc::clone(self)), flush_when_full(Arc::clone(self)));
            tokio::spawn(stopped.clone().run_until_cancelled_owned(logs));
            tokio::spawn(stopped.clone().run_until_cancelled_owned(flushes));
        }
    }

    pub(super) fn stop_hot_tasks(&self) {
        self.hot_tasks.stopped.cancel();
    }

    /// Puts the maps on stable storage, beside the data path: what was set in them until now survives
    /// a loss of power without the logs. Whoever waits for it may give up; that it fails is noted all
    /// the same: a later flush that succeeds would say nothing.
    ///
    /// # Errors
    /// It failed: nothing more may be acknowledged.
    pub(crate) async fn flush_maps(self: &Arc<Self>) -> Result<()> {
        for disk in self.disks().iter().map(|disk| disk.number) {
            let Some((flush, sync)) = self.begin_flush(disk) else { continue };
            let group = Arc::clone(self);
            let flushed = detach(async move {
                let flushed = storage::beside(move || flush.run()).await;
                let flushed = flushed.map_err(|e| e.to_string());
                group.end_flush(disk, sync, flushed.and_then(|f| f.map_err(|e| e.to_string())))
            });
            flushed.await?;
        }
        Ok(())
    }

    /// The same, for what is rare and cannot be interrupted: the data path waits.
    pub(super) fn flush_maps_now(&self) -> Result<()> {
        for disk in self.disks().iter().map(|disk| disk.number) {
            let Some((flush, sync)) = self.begin_flush(disk) else { continue };
            self.end_flush(disk, sync, flush.run().map_err(|e| e.to_string()))?;
        }
        Ok(())
    }

    fn begin_flush(&self, disk: usize) -> Option<(MapFlush, Sync)> {
        let mut core = self.core();
        let sync = core.hot.get_mut(&disk)?.log.begin_sync();
        Some((core.maps.get(&disk)?.flusher(), sync))
    }

    fn end_flush(
        &self,
        disk: usize,
        sync: Sync,
        flushed: std::result::Result<(), String>,
    ) -> Result<()> {
        match flushed {
            Ok(()) => {
                if let Some(hot) = self.core().hot.get_mut(&disk) {
                    hot.log.synced(sync);
                }
                self.hot_tasks.wanted.notify_one();
                Ok(())
            }
            Err(error) => {
                self.log_failed(&format!("dirty maps: {error}"));
                Err(Error::failed(error))
            }
        }
    }

    /// Changes roles of maps after what moves in `unite` is on stable storage, and puts the change
    /// there too.
    pub(super) fn change_roles<T>(
        &self,
        unite: impl FnOnce(&mut Core),
        change: impl FnOnce(&mut Core) -> T,
    ) -> T {
        // A failure is in `fatal`: nothing is acknowledged any more that could depend on this.
        if !self.core().hot.is_empty() {
            unite(&mut self.core());
            let _ = self.flush_maps_now();
        }
        let result = change(&mut self.core());
        let _ = self.flush_maps_now();
        result
    }

    fn log_failed(&self, reason: &str) {
        tracing::error!(reason, "a loss of power could not be survived any more");
        let mut core = self.core();
        core.fatal.get_or_insert_with(|| format!("no write can be acknowledged: {reason}"));
        drop(core);
        self.hot_tasks.changed.notify_waiters();
    }
}

/// A request that does not count as waiting for the peer.
struct Paused<'a>(&'a Admission);

impl<'a> Paused<'a> {
    fn begin(admission: &'a Admission) -> Self {
        admission.pause();
        Paused(admission)
    }
}

impl Drop for Paused<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

async fn write_logs(group: Arc<Group>) {
    loop {
        let mut written = false;
        for part in group.disks() {
            let disk = part.number;
            let next = {
                let mut core = group.core();
                let Some(hot) = core.hot.get_mut(&disk) else { continue };
                let next = hot.log.next_write();
                if hot.log.wants_sync() || hot.log.is_full() {
                    group.hot_tasks.full.notify_one();
                }
                next.map(|next| (next, Arc::clone(&hot.file)))
            };
            let Some((next, file)) = next else { continue };
            if let Err(error) = write(file, next).await {
                let name = &part.name;
                group.log_failed(&format!("activity log of disk {name}: {error}"));
                return;
            }
            if let Some(hot) = group.core().hot.get_mut(&disk) {
                hot.log.written();
            }
            group.hot_tasks.changed.notify_waiters();
            written = true;
        }
        if !written {
            group.hot_tasks.wanted.notified().await;
        }
    }
}

async fn flush_when_full(group: Arc<Group>) {
    loop {
        group.hot_tasks.full.notified().await;
        if group.flush_maps().await.is_err() {
            return;
        }
    }
}
