//! Disks that grow while they are used.

use std::sync::atomic::Ordering;

use brep_block::FlushLevel;

use super::{DiskPart, Group};
use crate::{Error, Result};

/// The image is as large as it was: nobody knows of its new end, and a start would take it for one
/// that has grown.
async fn undo_growth(disk: &DiskPart, image_size: u64) {
    if disk.device.size() > image_size
        && let Err(error) = disk.device.truncate(image_size).await
    {
        tracing::warn!(disk = disk.name, %error, "the image stays larger than its disk");
    }
}

impl Group {
    /// Makes a disk larger: here now, on the secondary with the next session, which begins at once.
    /// Guests learn the new size when they connect again.
    ///
    /// # Errors
    /// There is no such disk, it cannot have this size, or its file or its maps do not grow; it is
    /// as it was then, but for an image that cannot be made smaller again.
    pub(crate) async fn resize(&self, name: &str, size: u64) -> Result<()> {
        self.check_final()?;
        self.check_stays()?;
        let _one = self.changing_disks.lock().await;
        let disk = self.disks().into_iter().find(|d| d.name == name);
        let disk = disk.ok_or_else(|| Error::usage(format!("there is no disk {name:?}")))?;
        let old = disk.size();
        if size < old || !size.is_multiple_of(512) {
            return Err(Error::usage(format!(
                "disk {name}: {size} is no size for it: a disk only grows, and by multiples of 512 \
                 bytes; it has {old} now"
            )));
        }
        let image_size = disk.device.size();
        if size > image_size {
            disk.device.truncate(size).await?;
        }
        if size == old {
            return Ok(());
        }
        let grown = async {
            // Before maps and record name it: after a loss of power they would be another disk's.
            self.flush_disk(&disk, FlushLevel::Durable).await?;
            // A record of the other role must not be changed: from here on nothing comes in between.
            self.check_stays()?;
            // Before anybody can write there. What is added differs until it has been looked at.
            let grown = self.grow_maps(disk.number, size);
            grown.map_err(|e| Error::failed(format!("maps of disk {name}: {e}")))
        };
        if let Err(error) = grown.await {
            undo_growth(&disk, image_size).await;
            return Err(error);
        }
        disk.size.store(size, Ordering::Release);
        let saved = self.update_record(|record| {
            for (_, known) in record.primary.disks.iter_mut().filter(|(n, _)| n == name) {
                *known = size;
            }
        });
        tracing::info!(disk = name, from = old, to = size, "the disk has grown");
        self.drop_peer(format!("disk {name} has grown"));
        self.wake.notify_one();
        saved
    }
}
