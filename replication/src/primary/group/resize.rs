//! Disks that grow while they are used.

use std::sync::atomic::Ordering;

use super::Group;
use crate::{Error, Result};

impl Group {
    /// Makes a disk larger: here now, on the secondary with the next session, which begins at once.
    /// Guests learn the new size when they connect again.
    ///
    /// # Errors
    /// There is no such disk, it cannot have this size, or its file does not grow; nothing was
    /// changed. Or its maps do not grow: then it is served as it was.
    pub(crate) async fn resize(&self, name: &str, size: u64) -> Result<()> {
        self.check_final()?;
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
        if size > disk.device.size() {
            disk.device.truncate(size).await?;
        }
        if size == old {
            return Ok(());
        }
        // Before anybody can write there. What is added differs until it has been looked at.
        let grown = self.core().grow_maps(disk.number, size);
        grown.map_err(|e| Error::failed(format!("maps of disk {name}: {e}")))?;
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
