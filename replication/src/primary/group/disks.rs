//! Disks that come and go while the others are used.

use std::sync::Arc;

use brep_hbitmap::Role;
use tokio::sync::oneshot;

use super::hot::begin_logs;
use super::maps::{MapsOf, Since};
use super::{DiskPart, Group};
use crate::config::{DiskConfig, PeerKind};
use crate::daemon;
use crate::image::Image;
use crate::link::{self, DiskInfo};
use crate::primary::PrimaryDisk;
use crate::secondary::ReplicaDisk;
use crate::side::{CLOSE_LIMIT, Side, still_closing};
use crate::table::Disks;
use crate::written::describe;
use crate::{Error, Result};

/// Every disk that the record knows has to be there: its guest would miss it, and the secondary's
/// checkpoint holds it.
pub(super) fn check_known_disks(known: &[(String, u64)], given: &[DiskConfig]) -> Result<()> {
    let missing = known.iter().find(|(name, _)| !given.iter().any(|disk| disk.name == *name));
    missing.map_or(Ok(()), |(name, _)| {
        Err(Error::refused(format!(
            "disk {name}: the state record knows it, but it was not given; add --disk {name}=FILE. \
             To take it out of the group: start with it, then brep disk remove {name}"
        )))
    })
}

/// Makes the maps of a disk that is new to the group: the secondary lacks all of it.
pub(super) fn maps_of_new(side: &Side, disk: &DiskPart) -> Result<()> {
    let of = MapsOf::new(side, &disk.name, disk.size());
    let mut maps = of.create(Since::Ever)?;
    maps.set(Role::Differs, 0, disk.size());
    maps.close().map_err(|e| of.failed(&e))
}

impl Group {
    pub(crate) fn disks(&self) -> Disks<DiskPart> {
        self.disks.get()
    }

    /// A disk by its number, while it is part of the group.
    pub(crate) fn disk(&self, number: usize) -> Option<Arc<DiskPart>> {
        self.disks().iter().find(|disk| disk.number == number).cloned()
    }

    pub(crate) fn disk_names(&self) -> Vec<String> {
        self.disks().iter().map(|disk| disk.name.clone()).collect()
    }

    /// The names of some disks.
    pub(crate) fn names_of(&self, numbers: &[usize]) -> Vec<String> {
        let disks = self.disks().into_iter().filter(|disk| numbers.contains(&disk.number));
        disks.map(|disk| disk.name.clone()).collect()
    }

    /// The name of a disk, for messages.
    pub(crate) fn disk_name(&self, number: usize) -> String {
        self.disk(number).map_or_else(String::new, |disk| disk.name.clone())
    }

    /// What hello tells of this side.
    pub(crate) fn introduce(&self) -> link::Side {
        let maps = describe(self.core().maps.values());
        let record = self.record();
        let joins = &record.primary.joins;
        let disks = self.disks().into_iter().map(|d| DiskInfo {
            name: d.name.clone(),
            size: d.size(),
            growable: true,
            joining: joins.iter().find(|(name, _)| *name == d.name).map(|(_, id)| *id),
        });
        self.side.introduce(disks.collect(), maps)
    }

    /// Adds a disk. It is part of the group when this returns, and its export can be served; the
    /// secondary is connected again, and gets a copy. Returns whether it was not there before.
    ///
    /// # Errors
    /// Refused, or the file cannot be used; nothing was changed.
    pub(crate) async fn add_disk(self: &Arc<Self>, config: DiskConfig) -> Result<bool> {
        let _one = self.side.closing.lock_without(&config, &self.changing_disks).await?;
        if self.is_there_already(&config)? {
            return Ok(false);
        }
        self.check_change()?;
        let number = self.next_disk.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let (disk, replica) = self.open_disk(number, &config).await?;
        // Again: the roles may have begun to change meanwhile.
        self.check_change()?;
        self.check_peer_has(&config.name, disk.size())?;
        maps_of_new(&self.side, &disk)?;
        let mut maps = MapsOf::new(&self.side, &disk.name, disk.size()).open()?;
        let mut hot = begin_logs(&self.side, std::iter::once((&disk, &mut maps)))?;
        // Whoever is attached has a connection for every disk.
        self.take_leave(&format!("disk {} is added", disk.name)).await;
        // And again: from here to the record nothing comes in between.
        self.check_change()?;
        self.update_record(|record| {
            record.add_disk(&config);
            record.primary.disks.push((disk.name.clone(), disk.size()));
        })?;
        self.side.note_added(&config);
        {
            let mut core = self.core();
            core.maps.insert(number, maps);
            core.hot.append(&mut hot);
        }
        self.disks.add(Arc::clone(&disk));
        if let Some((secondary, replica)) = self.promoted.as_ref().zip(replica) {
            secondary.adopt(replica, Arc::new(PrimaryDisk::new(self, Arc::clone(&disk))));
        }
        self.secure_record().await?;
        tracing::info!(disk = disk.name, file = disk.file, "the disk is part of the group");
        self.wake.notify_one();
        Ok(true)
    }

    /// Opens a disk; on a side that was promoted as one of those that guests find there.
    async fn open_disk(
        &self,
        number: usize,
        config: &DiskConfig,
    ) -> Result<(Arc<DiskPart>, Option<Arc<ReplicaDisk>>)> {
        let Some(secondary) = &self.promoted else {
            let image = Image::open(config).await?;
            return Ok((DiskPart::of_image(number, config, image), None));
        };
        let (replica, device) = secondary.open_promoted(config).await?;
        Ok((Arc::new(DiskPart::new(number, config, device)), Some(replica)))
    }

    fn is_there_already(&self, config: &DiskConfig) -> Result<bool> {
        daemon::check_disks(std::slice::from_ref(config))?;
        let configs = self.side.disk_configs();
        let Some(known) = configs.iter().find(|disk| disk.name == config.name) else {
            let all = [configs.as_slice(), std::slice::from_ref(config)].concat();
            daemon::check_disks(&all)?;
            daemon::check_images(&self.config.state_dir, &all)?;
            return Ok(false);
        };
        if known.path == config.path {
            return Ok(true);
        }
        Err(Error::refused(format!(
            "disk {}: it is part of the group, with the file {}",
            config.name,
            known.path.display()
        )))
    }

    /// Whether disks can come and go at present.
    fn check_change(&self) -> Result<()> {
        if self.promoted.as_ref().is_some_and(|secondary| !secondary.merge_has_ended()) {
            return Err(Error::refused(
                "this side was promoted: disks can be added and removed when it has been merged (see \
                 brep status)",
            ));
        }
        if self.config.peer_kind == PeerKind::Plain && self.peer().is_some() {
            return Err(Error::refused(
                "a plain NBD server does not say what it holds: stop both sides, and start them \
                 with the disks that there shall be",
            ));
        }
        self.check_stays()
    }

    /// Whether this side is the primary, and is not about to end being it.
    pub(super) fn check_stays(&self) -> Result<()> {
        let leaves = self.core().stepping_down.is_some() || !self.record().is_primary();
        if leaves || self.is_superseded() {
            return Err(Error::refused("the other side takes over: it is the primary then"));
        }
        Ok(())
    }

    /// A secondary that is connected has to have the disk: else it would have to be refused, and
    /// the other disks with it.
    fn check_peer_has(&self, name: &str, size: u64) -> Result<()> {
        let core = self.core();
        let Some(disks) = core.peer_disks.as_ref().filter(|_| core.epochs.is_attached()) else {
            return Ok(());
        };
        match disks.iter().find(|disk| disk.name == name) {
            None => Err(Error::refused(format!(
                "disk {name}: the secondary does not have it. First, on the secondary: brep disk \
                 add {name}=FILE, with a file of {size} bytes; then this again"
            ))),
            Some(theirs) if theirs.size > size || theirs.size < size && !theirs.growable => {
                Err(Error::refused(format!(
                    "disk {name}: {size} bytes here, {} on the secondary; give both the same size",
                    theirs.size
                )))
            }
            Some(_) => Ok(()),
        }
    }

    /// Ends the session: the next one begins with the disks that there are then.
    async fn take_leave(&self, reason: &str) {
        while self.is_attached() {
            self.drop_peer(reason.to_owned());
            self.detached().await;
        }
    }

    /// Takes a disk out of the group; nobody uses its export any more. The secondary keeps it up to
    /// its next checkpoint. Returns whether it was there.
    ///
    /// # Errors
    /// Refused; nothing was changed. Or its file could not be written out, or not within
    /// [`CLOSE_LIMIT`]: then it is out of the group all the same.
    pub(crate) async fn remove_disk(&self, name: &str) -> Result<bool> {
        let one = self.changing_disks.lock().await;
        let Some(disk) = self.removable_disk(name)? else { return Ok(false) };
        let configs = self.side.disk_configs();
        let config = configs.into_iter().find(|config| config.name == name);
        let config = config.ok_or_else(|| Error::usage(format!("there is no disk {name:?}")))?;
        self.take_leave(&format!("disk {name} is removed")).await;
        // Again: the roles may have begun to change meanwhile.
        self.check_change()?;
        self.update_record(|record| record.remove_disk(name))?;
        self.side.note_removed(name);
        self.disks.remove(&disk);
        let replica = self.promoted.as_ref().and_then(|s| Some((s, s.find_promoted(name)?)));
        // Until it is closed none of its name or file is added.
        let closing = match &replica {
            Some((secondary, replica)) => secondary.part_with(replica),
            None => self.side.closing.begin(&config),
        };
        {
            let mut core = self.core();
            core.hot.remove(&disk.number);
            core.maps.remove(&disk.number);
        }
        tracing::info!(disk = name, "the disk is not part of the group any more");
        self.wake.notify_one();
        let secured = self.secure_record().await;
        if let Some((secondary, replica)) = replica {
            secondary.take_out(&replica, closing, &secured);
            drop((one, replica));
            secured?;
            return self.side.closing.ended(Some(&config)).await.map(|()| true);
        }
        let (answer, closed) = oneshot::channel();
        let side = Arc::clone(&self.side);
        // Beside the command, and whatever comes next: its storage may hang.
        tokio::spawn(async move {
            let mut result = disk.close().await;
            if secured.is_ok() {
                result = result.and(MapsOf::new(&side, &disk.name, disk.size()).remove_all());
            }
            let result = result.and(secured);
            drop((disk, closing));
            if let Err(Err(error)) = answer.send(result) {
                tracing::warn!(disk = config.name, %error, "a disk that was removed was not closed cleanly");
            }
        });
        drop(one);
        tokio::time::timeout(CLOSE_LIMIT, closed)
            .await
            .map_err(|_| still_closing(name))?
            .unwrap_or_else(|_| Err(Error::failed("brep is going away")))?;
        Ok(true)
    }

    /// The disk that is to be removed, if that can be done; none: it is not there any more.
    ///
    /// # Errors
    /// It cannot.
    pub(crate) fn removable_disk(&self, name: &str) -> Result<Option<Arc<DiskPart>>> {
        let disks = self.disks();
        let Some(disk) = disks.iter().find(|disk| disk.name == name) else {
            return match self.record().has_removed(name) {
                true => Ok(None),
                false => Err(Error::usage(format!("there is no disk {name:?}"))),
            };
        };
        self.check_change()?;
        if disks.len() == 1 {
            return Err(Error::refused(format!(
                "disk {name} is the last one of the group: stop this side instead"
            )));
        }
        Ok(Some(Arc::clone(disk)))
    }
}

#[cfg(test)]
mod tests {
    use brep_block::{BlockDevice, CacheMode, ErrorKind, WriteFlags};
    use bytes::Bytes;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::config::{DiskFormat, Role, SideConfig};

    /// A client may have come to an export just before that went.
    #[tokio::test]
    async fn a_write_to_a_disk_that_has_gone_fails() {
        let dir = tempfile::tempdir().unwrap();
        let disk = |name: &str| {
            let path = dir.path().join(format!("{name}.raw"));
            std::fs::write(&path, [0; 65536]).unwrap();
            let (format, cache) = (DiskFormat::Raw, CacheMode::Writeback);
            DiskConfig { name: name.to_owned(), path, format, cache, buffers: None }
        };
        let disks = vec![disk("vda"), disk("vdb")];
        let config = SideConfig::new(Role::Primary, "p", dir.path().join("state"), disks);
        let side = Side::open(config, CancellationToken::new()).unwrap();
        let group = Group::open(&side).await.unwrap();
        let devices = group.disks().into_iter().map(|part| PrimaryDisk::new(&group, part));
        let [first, second] = devices.collect::<Vec<_>>().try_into().unwrap();
        let write = async |device: &PrimaryDisk| {
            device.write(0, Bytes::from(vec![1; 4096]), WriteFlags::default()).await
        };
        write(&second).await.unwrap();
        group.remove_disk("vdb").await.unwrap();
        assert_eq!(write(&second).await.unwrap_err().kind(), ErrorKind::Shutdown);
        write(&first).await.unwrap();
    }
}
