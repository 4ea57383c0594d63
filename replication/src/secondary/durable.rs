//! What is put on stable storage, and what is known of flushes that failed.

use super::group::Group;
use crate::Result;

impl Group {
    /// Puts the record on stable storage; nobody is held up meanwhile.
    pub(crate) async fn sync_record(&self) -> Result<()> {
        self.side.record.sync().await
    }

    /// The same, if that is promised.
    pub(crate) async fn secure_record(&self) -> Result<()> {
        self.side.record.secure().await
    }

    /// If a flush has failed the next run is told: what it finds may not be what was written.
    pub(super) fn note_failed_flushes(&self) {
        if self.disks().iter().any(|disk| disk.flush_has_failed())
            && let Err(error) = self.update_record(|record| record.flush_failed = true)
        {
            tracing::error!(%error, "a failed flush was not recorded");
        }
    }
}
