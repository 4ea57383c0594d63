use super::buffers::BufferPool;
use super::disk::ReplicaDisk;
use crate::config::{DiskConfig, SideConfig};
use crate::image::Image;
use crate::state::{DiskRecord, Record};
use crate::{Error, Result, random};

/// Opens a disk and the buffers that the record names for it.
pub(super) async fn open_disk(
    config: &SideConfig,
    disk: &DiskConfig,
    known: Option<&DiskRecord>,
    record: &Record,
    power_lost: bool,
) -> Result<ReplicaDisk> {
    let image = Image::open(disk).await?;
    let size = image.device().size();
    if let Some(known) = known
        && known.size > size
    {
        return Err(Error::refused(format!(
            "disk {}: {} is {size} bytes long, but it was {} when it was last used; nothing was \
             changed. Bring the right file back, or move the state directory away and start over",
            disk.name,
            disk.path.display(),
            known.size
        )));
    }
    // An image that is larger than the record knows has grown; its buffers follow.
    let known_size = known.map_or(size, |known| known.size);
    let (files, durability) = (disk.buffers.clone(), config.durability);
    let pool = BufferPool::new(&config.state_dir, &disk.name, known_size, files, durability);
    ReplicaDisk::open(disk, pool, image, known, record, power_lost).await
}

/// The record of a disk that is new to a group that has others: its checkpoint lacks it.
pub(super) fn joining(disk: &DiskConfig, record: &Record) -> Option<DiskRecord> {
    let known = &record.secondary.disks;
    let is_new = !known.is_empty() && !known.iter().any(|known| known.name == disk.name);
    is_new.then(|| {
        tracing::info!(disk = disk.name, "the disk is new to the group");
        // Its size is not known yet: any is larger.
        DiskRecord { joining: Some(random::uuid()), ..DiskRecord::new(&disk.name, 0) }
    })
}

/// Every disk of the record must be given: a group is promoted as a whole. Others come in addition,
/// but not to a side that is the disk.
pub(super) fn check_known_disks(record: &Record, disks: &[DiskConfig]) -> Result<()> {
    let secondary = &record.secondary;
    for known in &secondary.disks {
        if !disks.iter().any(|d| d.name == known.name) {
            return Err(Error::refused(format!(
                "disk {}: the state record knows it, but it was not given; add --disk {}=FILE",
                known.name, known.name
            )));
        }
    }
    let new = disks.iter().find(|d| !secondary.disks.iter().any(|k| k.name == d.name));
    if let Some(new) = new.filter(|_| !secondary.disks.is_empty() && record.is_primary()) {
        return Err(Error::refused(format!(
            "disk {}: it is not part of what this side was promoted to, which is not merged yet; \
             leave it out, and add it after the merge: brep disk add {}=FILE",
            new.name, new.name
        )));
    }
    Ok(())
}
