use std::sync::Arc;

use brep_block::plant::{self, Plant};

use super::disk::{Fresh, ReplicaDisk};
use super::group::Group;
use crate::Result;
use crate::table::Disks;

impl Group {
    /// A bug: the buffers of a checkpoint are given up before the record of the next one.
    pub(super) async fn drop_early(
        &self,
        fresh: Vec<Fresh>,
        disks: &Disks<ReplicaDisk>,
    ) -> Result<Option<Vec<Fresh>>> {
        if !plant::is(Plant::BuffersDroppedEarly) {
            return Ok(Some(fresh));
        }
        let mut retired = Vec::new();
        for (disk, fresh) in disks.iter().zip(fresh) {
            retired.push((Arc::clone(disk), disk.committed(fresh).await?));
        }
        self.recycle(retired).await;
        Ok(None)
    }
}
