//! What is put on stable storage: for a guest that asks for it, and for a commit.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use brep_block::FlushLevel;
use futures_util::future::join_all;

use super::{DiskPart, Group};
use crate::Result;
use crate::config::Durability;

/// Whether the peer has anything of a disk that a flush would put on stable storage.
#[derive(Debug, Default)]
pub(crate) struct PeerWrites {
    /// Changes that have ended there. One that has not ended is of no flush's concern yet.
    ended: AtomicU64,
    /// How many of them a flush covers that has ended.
    flushed: AtomicU64,
}

impl PeerWrites {
    /// A change has ended there; or what has is not known.
    pub(super) fn note(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

    fn ended(&self) -> u64 {
        self.ended.load(Ordering::Relaxed)
    }

    /// A flush has ended that was begun when so many changes had.
    fn note_flush(&self, ended: u64) {
        self.flushed.fetch_max(ended, Ordering::Relaxed);
    }

    fn are_flushed(&self) -> bool {
        self.flushed.load(Ordering::Relaxed) == self.ended()
    }
}

impl Group {
    /// Flushes a disk of this side.
    pub(crate) async fn flush_disk(
        &self,
        disk: &DiskPart,
        level: FlushLevel,
    ) -> brep_block::Result<()> {
        let result = disk.device.flush(level).await;
        if result.is_err() {
            self.distrust_maps(disk.number);
        }
        result
    }

    /// Puts what the last cut ended on stable storage, if that is promised.
    ///
    /// # Errors
    /// A disk could not be flushed. What the peer is not known to have must not be forgotten then.
    pub(crate) async fn secure_disks(&self) -> Result<()> {
        if self.config.durability == Durability::Process {
            return Ok(());
        }
        let disks = self.disks();
        let flushes = disks.iter().map(|disk| self.flush_disk(disk, FlushLevel::Durable));
        for (disk, flushed) in disks.iter().zip(join_all(flushes).await) {
            flushed.inspect_err(|error| self.report(disk.number, error))?;
        }
        Ok(())
    }

    /// Puts the record on stable storage, if that is promised; nobody is held up meanwhile.
    pub(crate) async fn secure_record(&self) -> Result<()> {
        self.record.secure().await
    }

    /// A guest's flush goes to the peer too, if there is one and the guest waits for it: what is
    /// flushed there was acknowledged, so it is there. It fails for no guest: a peer that cannot
    /// flush is reported, one that does not answer is lost; and it is not asked for nothing.
    pub(crate) async fn flush_peer(self: &Arc<Self>, part: &DiskPart) {
        let (disk, writes) = (part.number, &part.peer_writes);
        if !self.core().flushes_reach_peer || writes.are_flushed() {
            return;
        }
        let admission = self.admit(0).await;
        let ended = writes.ended();
        let (epoch, flush) = {
            let core = self.core();
            // Locked with the look: a session that ends later ends the flush.
            let Some(connection) = core.connections.get(&disk) else { return };
            (core.epochs.current(), connection.start_flush(FlushLevel::Durable))
        };
        match flush.await {
            Ok(()) => writes.note_flush(ended),
            Err(error) => self.remote_failed(disk, epoch, &error),
        }
        drop(admission);
    }
}
