//! What is put on stable storage, and what becomes of files that fail.

use std::sync::Arc;
use std::time::Duration;

use brep_block::{Error as BlockError, ErrorKind};
use tokio::time::Instant;

use super::group::Group;
use crate::config::Durability;
use crate::state::Record;
use crate::{Error, Result};

/// What gets out of a failure that this process cannot mend.
pub(super) const START_AGAIN: &str =
    "start brep secondary again when its disks are in order: it looks what is left";

/// A buffer that has been opened again, and fails again within this time, waits for somebody to look
/// at the disk under it.
const REOPEN_PAUSE: Duration = Duration::from_secs(10);

/// What a loss of power has left, for people: `record` is the last run's. None: nothing that they have
/// to know here.
pub(super) fn after_power_loss(record: &Record, inconsistent: bool) -> Option<String> {
    let what = match (record.is_primary(), inconsistent) {
        // What a promotion is made of was not flushed by a run that does not promise it.
        (true, _) if record.needs_buffers() && record.durability == Durability::Process => {
            "this side is promoted and was not merged, and what it serves may be a mixture of \
             several moments: check it, or bring the other side's disks back"
        }
        (true, _) => return None,
        (false, _) if record.secondary.outdated => return None,
        (false, true) => "the checkpoint cannot be trusted",
        (false, false) => "the checkpoint is whole, and what came after it is not",
    };
    let reason = format!(
        "power was lost under the last run, and what was not on stable storage with it: {what}"
    );
    tracing::error!(reason);
    Some(reason)
}

impl Group {
    /// Puts the record on stable storage; nobody is held up meanwhile.
    pub(crate) async fn sync_record(&self) -> Result<()> {
        self.side.record.sync().await
    }

    /// The same, if that is promised.
    pub(crate) async fn secure_record(&self) -> Result<()> {
        self.side.record.secure().await
    }

    /// If a flush has failed the next run is told: what it finds may not be what was written. Nor
    /// do maps that this side has from its time as a primary: what was lost may be older than they.
    pub(super) fn note_failed_flushes(&self) {
        if self.disks().iter().all(|disk| disk.failed_flush().is_none()) {
            return;
        }
        self.core().own_maps.distrust();
        if let Err(error) = self.update_record(|record| record.flush_failed = true) {
            tracing::error!(%error, "a failed flush was not recorded");
        }
    }

    /// A write of the primary has failed. The record knows it before the primary does; if it cannot,
    /// the primary does not hear of the failure, upon which it would go on, but has lost this side.
    /// Returns what it is to be answered.
    pub(crate) fn replica_write_failed(&self, disk: &str, error: BlockError) -> BlockError {
        if let Some(session) = self.session() {
            session.note_failed_write();
        }
        if let Some(plain) = &self.plain {
            plain.break_claim(format!("one failed ({error})"));
        }
        self.note_full(&error);
        self.note_error(disk, &error);
        self.note_failed_flushes();
        let saved = self.update_record(|record| record.secondary.latest_ok = false);
        if let Err(error) = &saved {
            tracing::error!(%error, "the state record was not saved; ending the session");
        }
        if (saved.is_err() || self.wants_new_session())
            && let Some(session) = self.session()
        {
            session.ending.cancel();
        }
        match saved {
            Ok(()) => error,
            Err(unsaved) => {
                let text = format!("a write failed, and that was not recorded: {unsaved}");
                BlockError::new(error.operation(), ErrorKind::Shutdown, disk, text)
            }
        }
    }

    /// Why no session can begin until this side is started again, if that is so.
    pub(super) fn broken(&self) -> Option<String> {
        let broken = self.disks().iter().find_map(|disk| disk.is_broken());
        broken.map(|error| format!("nothing can be replicated to this side: {error}"))
    }

    /// A write has failed. What keeps all further ones from succeeding is mended by a new session.
    pub(super) fn wants_new_session(&self) -> bool {
        self.disks().iter().any(|disk| disk.has_failed_buffer() || disk.is_broken().is_some())
    }

    /// Opens buffers again of which a write of metadata has failed. There is no session.
    ///
    /// # Errors
    /// One of them fails still, or again.
    pub(super) async fn reopen_buffers(self: &Arc<Self>) -> Result<()> {
        if !self.disks().iter().any(|disk| disk.has_failed_buffer()) {
            return Ok(());
        }
        let now = Instant::now();
        let before = self.core().reopened.replace(now);
        if before.is_some_and(|before| now < before + REOPEN_PAUSE) {
            self.core().reopened = before;
            return Err(Error::failed("a buffer in the state directory fails again and again"));
        }
        self.drop_test("a buffer has to be opened again");
        let _held = self.hold_guest().await?;
        for disk in self.disks() {
            disk.reopen_buffers().await?;
        }
        Ok(())
    }
}
