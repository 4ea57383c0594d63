//! One cut, from the end of an epoch to its commit.

use std::sync::atomic::Ordering;

use brep_hbitmap::MapSet;
use serde_json::json;
use tokio::time::Instant;

use super::Group;
use super::maps::Since;
use crate::primary::epochs::Drained;
use crate::{Commit, Epoch, Error, Result};

impl Group {
    /// Ends the current epoch, and returns it with the disks that are no part of the checkpoint yet.
    /// None: there is no session, or a cut is outstanding.
    ///
    /// # Errors
    /// The record could not be saved.
    pub(crate) fn start_cut(&self) -> Result<Option<(Epoch, Vec<usize>)>> {
        let epoch = {
            let mut core = self.core();
            core.dirty = false;
            core.epochs.start_cut()
        };
        let Some(epoch) = epoch else { return Ok(None) };
        // The secondary may commit this epoch and this side never hear of it: it must not take
        // itself for an older copy then. After a commit this is recorded already, after a void
        // cut it is not.
        self.record.update(|record| record.epoch = record.epoch.max(epoch.next()))?;
        let cur = self.record.get().cur;
        let since = cur.map_or(Since::Unknown, |cur| Since::Commit(Commit { cur, epoch }));
        let mut core = self.core();
        // Maps of a disk that joins go on counting: everything that was sent of it, since its copy began.
        for maps in core.maps_to_cut() {
            maps.rotate(since.tag()).map_err(|e| Error::failed(e.to_string()))?;
        }
        Ok(Some((epoch, core.joining_disks())))
    }

    pub(crate) fn drained(&self) -> Drained {
        self.core().epochs.drained()
    }

    /// The cut is made: the writes that were held go out, in their order, before any other.
    pub(crate) fn release(&self) {
        let mut core = self.core();
        let held = core.epochs.release();
        core.send_held(held);
    }

    /// The cut is not made, or not committed; its epoch runs on.
    pub(crate) fn void_cut(&self) {
        self.void_pending();
        let mut core = self.core();
        core.dirty = true;
        let held = core.epochs.void_cut();
        core.send_held(held);
    }

    /// The secondary has committed `epoch`, but for the disks `without`, and everything of it is as
    /// safe here as is promised.
    pub(crate) async fn committed(&self, epoch: Epoch, without: &[usize]) -> Result<()> {
        let next = {
            let mut core = self.core();
            if !core.epochs.is_of_session(epoch) {
                // This side has begun a new line meanwhile; the checkpoint is not of it.
                return Err(Error::failed("the secondary was lost during a commit"));
            }
            core.epochs.committed();
            core.last_commit = Some(Instant::now());
            core.epochs.current().next()
        };
        self.record.update(|record| {
            // The next cut's epoch too: the secondary may have committed it when this side is
            // started again.
            record.epoch = record.epoch.max(next);
            if let Some(cur) = record.cur {
                record.com = Some(Commit { cur, epoch });
            }
        })?;
        self.record.secure().await?;
        {
            let mut core = self.core();
            if !core.epochs.is_of_session(epoch) {
                return Err(Error::failed("the secondary was lost after a commit"));
            }
            // Only now: a start after a kill in between finds more than it needs.
            core.maps.values_mut().for_each(MapSet::drop_pending);
        }
        self.errors.clear_latch();
        self.counters.checkpoints.fetch_add(1, Ordering::Relaxed);
        let left_out = self.names_of(without);
        self.events.emit("BREP_CHECKPOINT", json!({ "epoch": epoch, "left-out": left_out }));
        Ok(())
    }

    /// Whether a cut waits for nothing but the local disk.
    pub(crate) fn cut_waits_for_local(&self) -> bool {
        self.core().epochs.waits_for_local()
    }

    /// Waits for the local writes that have kept a cut from being made.
    pub(crate) async fn late_writes(&self) {
        loop {
            let ended = self.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            if !self.core().epochs.has_late_writes() {
                return;
            }
            ended.await;
        }
    }

    /// Everything that failed in this epoch has been sent again.
    pub(crate) fn repaired(&self) {
        self.core().epochs.repaired();
    }
}
