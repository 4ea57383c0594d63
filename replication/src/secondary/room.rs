//! Room for pre-images: what the buffers may take, and what there is.

use std::sync::Arc;
use std::time::Duration;

use brep_block::{Error as BlockError, ErrorKind, Operation, storage};

use super::disk::ReplicaDisk;
use super::group::Group;
use super::session::Session;
use crate::Result;

/// How often the room is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// Less free space than this is little: an early checkpoint lets buffers be used again.
pub(super) const SPACE_LOW_BYTES: u64 = 64 << 20;

/// With less free space than this replication does not begin again after it has run out.
pub(super) const SPACE_MIN_BYTES: u64 = 16 << 20;

/// An early checkpoint has to be worth it.
const EARLY_MIN_BYTES: u64 = 4 << 20;

/// How long an early checkpoint may take.
const EARLY_LIMIT: Duration = Duration::from_secs(60);

impl Group {
    /// Bytes of pre-images that the last checkpoint needs, of all disks.
    fn kept_bytes(&self) -> u64 {
        self.disks().iter().map(|disk| disk.hidden_bytes()).sum()
    }

    /// Bytes that the file system of the buffers has left, as far as it says. It is asked beside the
    /// thread of the disks: it may hang.
    pub(super) async fn space_bytes(&self) -> Option<u64> {
        let dir = self.config.state_dir.clone();
        let asked = storage::beside(move || {
            #[cfg(test)]
            crate::state::faults::pass_by(&dir, crate::state::faults::Kind::Space);
            let stat = rustix::fs::statvfs(&dir).ok()?;
            stat.f_bavail.checked_mul(stat.f_frsize)
        });
        asked.await.ok().flatten()
    }

    /// Why no pre-image may be kept any more.
    fn over_budget(&self) -> Option<String> {
        let limit = self.config.buffer_limit?;
        (self.kept_bytes() >= limit)
            .then(|| format!("the pre-images have reached --buffer-limit ({limit} bytes)"))
    }

    /// Fails a write for which no pre-image may be kept.
    pub(super) fn check_budget(&self, disk: &str, operation: Operation) -> brep_block::Result<()> {
        match self.over_budget() {
            None => Ok(()),
            Some(reason) => Err(BlockError::new(operation, ErrorKind::NoSpace, disk, reason)),
        }
    }

    /// A write has failed because there was no room.
    pub(super) fn note_full(&self, error: &BlockError) {
        if error.kind() == ErrorKind::NoSpace {
            self.core().full = Some(error.to_string());
            self.test_is_over("there was no room for pre-images");
        }
    }

    /// Why a session with pre-images is of no use now. Once room has run out, it has to come back
    /// first.
    pub(super) async fn no_room(&self) -> Option<String> {
        if let Some(reason) = self.over_budget() {
            return Some(reason);
        }
        let full = self.core().full.clone()?;
        self.space_bytes().await.filter(|space| *space < SPACE_MIN_BYTES)?;
        // Without the number, which changes: the same is said once.
        let least = SPACE_MIN_BYTES >> 20;
        Some(format!(
            "{full}; the file system of the state directory has less than {least} MiB left"
        ))
    }

    /// Asks the primary for early checkpoints while room is short, as long as the session lasts.
    pub(super) async fn watch_room(&self, session: &Session) {
        // Where a guest runs here, checkpoints are its manager's.
        if self.has_guest() {
            return std::future::pending().await;
        }
        loop {
            tokio::time::sleep(LOOK_PAUSE).await;
            if self.core().copying || !self.is_short().await {
                continue;
            }
            tracing::info!("room for pre-images is short: asking for an early checkpoint");
            if let Err(error) = session.request_checkpoint(EARLY_LIMIT).await {
                tracing::warn!(%error, "no early checkpoint");
                tokio::time::sleep(LOOK_PAUSE * 10).await;
            }
        }
    }

    /// Gives the pre-images up: nothing can be promoted before the next commit. What the last
    /// checkpoint was stays known.
    pub(super) async fn discard_checkpoint(self: &Arc<Self>) -> Result<()> {
        self.drop_test("the checkpoint is given up");
        self.update_record(|record| {
            self.record_disks(record, ReplicaDisk::record_without_buffers);
            record.secondary.inconsistent = true;
            record.secondary.latest_ok = false;
        })?;
        // An older record names buffers that are about to be emptied.
        self.secure_record().await?;
        self.core().full = None;
        let _held = match self.has_guest() {
            true => Some(self.hold_guest().await?),
            false => None,
        };
        for disk in self.disks() {
            disk.drop_buffers().await?;
        }
        Ok(())
    }

    async fn is_short(&self) -> bool {
        let kept = self.kept_bytes();
        let of_budget = self.config.buffer_limit.is_some_and(|limit| kept >= limit / 2);
        of_budget
            || kept >= EARLY_MIN_BYTES
                && self.space_bytes().await.is_some_and(|space| space < SPACE_LOW_BYTES)
    }
}
