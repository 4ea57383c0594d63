//! From a cut to its commit, on all disks together.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use brep_block::detach;
use futures_util::future::join_all;
use serde_json::json;
use tokio::time::Instant;

use super::buffers::Buffer;
use super::disk::{Fresh, ReplicaDisk};
use super::group::Group;
use super::session::Session;
use crate::state::Record;
use crate::table::Disks;
use crate::{Commit, Epoch, Error, Result};

impl Group {
    /// Ends `epoch` on all these disks at once. Nothing of the primary is in flight, as it says; this
    /// checks it.
    pub(crate) async fn cut(
        &self,
        session: &Session,
        disks: &Disks<ReplicaDisk>,
        epoch: Epoch,
    ) -> Result<()> {
        let begun = Instant::now();
        for disk in &**disks {
            disk.drain(self.config.peer_timeout).await?;
        }
        self.check_current(session)?;
        // From here to the end there is no await: no write can come between two disks.
        for disk in &**disks {
            // A plain primary may not have been stopped: all are cut, or none is.
            disk.check_switch()?;
        }
        for disk in &**disks {
            disk.switch()?;
        }
        session.forget_failed_writes();
        self.core().receiving = epoch.next();
        let pause_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.counters.last_pause_us.store(pause_us, Ordering::Relaxed);
        Ok(())
    }

    /// Commits `epoch` on the disks that were cut: one record names the new chain, and the older
    /// buffers are given up.
    pub(crate) async fn commit(
        self: &Arc<Self>,
        session: &Arc<Session>,
        disks: Disks<ReplicaDisk>,
        epoch: Epoch,
    ) -> Result<()> {
        // The next epoch is being written meanwhile; that some of it is flushed too does no harm.
        for flushed in join_all(disks.iter().map(|disk| disk.flush_image())).await {
            flushed.inspect_err(|_| self.note_failed_flushes())?;
        }
        // A link does not wait whose session has ended meanwhile; nothing of this is left half done
        // then, and no buffer is lost.
        let (group, session) = (Arc::clone(self), Arc::clone(session));
        detach(async move { group.commit_flushed(&session, &disks, epoch).await }).await
    }

    async fn commit_flushed(
        self: &Arc<Self>,
        session: &Session,
        cut: &Disks<ReplicaDisk>,
        epoch: Epoch,
    ) -> Result<()> {
        let retired = {
            let _held = match self.has_guest() {
                true => Some(self.hold_guest().await?),
                false => None,
            };
            self.commit_held(session, cut, epoch).await?
        };
        {
            let mut core = self.core();
            core.last_commit = Some(Instant::now());
            core.copying = false;
            core.full = None;
        }
        self.errors.clear_latch();
        self.counters.checkpoints.fetch_add(1, Ordering::Relaxed);
        let left_out = session.disks.taking_part.only(|disk| disk.joining().is_some());
        let left_out: Vec<_> = left_out.iter().map(|disk| &disk.name).collect();
        self.events.emit("BREP_CHECKPOINT", json!({ "epoch": epoch, "left-out": left_out }));
        let group = Arc::clone(self);
        tokio::spawn(async move { group.recycle(retired).await });
        Ok(())
    }

    async fn commit_held(
        &self,
        session: &Session,
        cut: &Disks<ReplicaDisk>,
        epoch: Epoch,
    ) -> Result<Vec<(Arc<ReplicaDisk>, Vec<Buffer>)>> {
        let Some(set) = self.record().set else {
            return Err(Error::failed("no set: the session was never begun"));
        };
        let fresh = self.fresh(set, cut).await?;
        // Whoever ends the session waits for what follows.
        let _committing = session.committing.lock().await;
        let mut disks: Vec<_> =
            cut.iter().zip(&fresh).map(|(d, f)| d.record_after_commit(f)).collect();
        let leaving = self.leaving_disks(session);
        disks.extend(self.bystanders(cut, &leaving).map(|disk| disk.record()));
        let seq = self.disks().iter().map(|d| d.pool.seq()).max().unwrap_or(0);
        // A write may fail while this is saved; it then finds the record saved and clears the
        // flag again, for both run on the thread of the disks.
        let latest_ok = session.is_complete();
        // The last await was above: a failover, a stop or a newer session has ended this one
        // before that, or finds the commit done.
        if let Err(error) = self.check_current(session) {
            self.give_back(fresh, cut).await;
            return Err(error);
        }
        let save = |record: &mut Record| {
            if let Some(cur) = record.cur {
                record.com = Some(Commit { cur, epoch });
            }
            record.epoch = record.epoch.max(epoch.next());
            let secondary = &mut record.secondary;
            secondary.inconsistent = false;
            secondary.outdated = false;
            secondary.discard_local = false;
            secondary.latest_ok = latest_ok;
            secondary.disks = disks;
            secondary.buffer_seq = secondary.buffer_seq.max(seq);
            leaving.iter().for_each(|disk| record.remove_disk(&disk.name));
        };
        #[cfg(feature = "simulation")]
        let Some(fresh) = self.drop_early(fresh, cut).await? else {
            return self.update_record(save).map(|()| Vec::new());
        };
        self.update_record(save)?;
        // Nor is there one between the record and what follows it here.
        let gone: Vec<_> = leaving.iter().map(|disk| (disk, self.part_with(disk))).collect();
        let mut retired = Vec::new();
        for (disk, fresh) in cut.iter().zip(fresh) {
            retired.push((Arc::clone(disk), disk.committed(fresh).await?));
            // The first commit is also the first time that there is something to show.
            disk.show_guest().await?;
        }
        // Before anything that it drops is given up, and before the guest goes on.
        let secured = self.secure_record().await;
        for (disk, closing) in gone {
            self.take_out(disk, closing, &secured);
        }
        secured?;
        self.drop_own_maps();
        Ok(retired)
    }

    /// Takes the buffers that a commit is going to name, on all disks or on none.
    async fn fresh(&self, set: crate::SetId, disks: &Disks<ReplicaDisk>) -> Result<Vec<Fresh>> {
        let mut fresh = Vec::new();
        for disk in &**disks {
            match disk.fresh(set).await {
                Ok(buffers) => fresh.push(buffers),
                Err(error) => {
                    self.give_back(fresh, disks).await;
                    return Err(error);
                }
            }
        }
        Ok(fresh)
    }

    /// Gives buffers up that no record has named.
    async fn give_back(&self, fresh: Vec<Fresh>, disks: &Disks<ReplicaDisk>) {
        let unused = disks.iter().zip(fresh);
        self.recycle(unused.map(|(d, f)| (Arc::clone(d), f.into_buffers())).collect()).await;
    }

    pub(super) async fn recycle(&self, retired: Vec<(Arc<ReplicaDisk>, Vec<Buffer>)>) {
        for (disk, buffers) in retired {
            for buffer in buffers {
                if let Err(error) = disk.pool.recycle(buffer).await {
                    // The buffer is lost as a spare; a new one will be made.
                    tracing::warn!(disk = disk.name, %error, "a retired buffer was not emptied");
                }
            }
        }
    }
}
