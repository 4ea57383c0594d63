use super::buffers::BufferPool;
use super::disk::ReplicaDisk;
use crate::config::{DiskConfig, SideConfig};
use crate::image::Image;
use crate::state::{DiskRecord, Record, SecondaryRecord};
use crate::{Error, Result};

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

/// Every disk of the record must be given, and no other: a group is promoted as a whole.
pub(super) fn check_known_disks(secondary: &SecondaryRecord, config: &SideConfig) -> Result<()> {
    for known in &secondary.disks {
        if !config.disks.iter().any(|d| d.name == known.name) {
            return Err(Error::refused(format!(
                "disk {}: the state record knows it, but it was not given; add --disk {}=FILE",
                known.name, known.name
            )));
        }
    }
    let new = config.disks.iter().find(|d| !secondary.disks.iter().any(|k| k.name == d.name));
    if let Some(new) = new.filter(|_| !secondary.disks.is_empty()) {
        return Err(Error::refused(format!(
            "disk {}: it is not part of the checkpoint that the state record names; leave it out, \
             or move the state directory away and start over",
            new.name
        )));
    }
    Ok(())
}
