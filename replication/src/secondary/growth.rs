//! Disks that grow with the primary's.

use std::sync::Arc;

use super::Group;
use super::disk::ReplicaDisk;
use crate::Result;
use crate::link::{DiskInfo, StopReason};

impl Group {
    /// Makes disks as large as the primary's, before a session begins.
    pub(crate) async fn grow_disks(self: &Arc<Self>, theirs: &[DiskInfo]) -> Result<()> {
        let size_there = |d: &ReplicaDisk| theirs.iter().find(|t| t.name == d.name).map(|t| t.size);
        let growing = |d: &&Arc<ReplicaDisk>| size_there(d).is_some_and(|size| size > d.size());
        if !self.disks().iter().any(|d| growing(&d)) {
            return Ok(());
        }
        self.end_session(StopReason::Replaced).await?;
        self.drop_test("the disk grows");
        let _held = self.hold_guest().await?;
        for disk in self.disks().iter().filter(growing) {
            disk.grow(size_there(disk).unwrap_or_default()).await?;
        }
        Ok(())
    }
}
