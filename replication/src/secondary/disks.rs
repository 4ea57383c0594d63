//! Disks that come and go while the others are replicated.

use std::sync::Arc;

use brep_block::BlockDevice;
use brep_nbd::server::{OptionError, OptionErrorCode};
use tokio_util::sync::DropGuard;

use super::Group;
use super::disk::ReplicaDisk;
use super::opening::{joining, open_disk};
use super::rejoin::maps_of;
use super::session::{Session, SessionDisks};
use crate::config::DiskConfig;
use crate::daemon;
use crate::link::{DiskInfo, Message, Side};
use crate::state::Target;
use crate::table::Disks;
use crate::{Error, Result};

/// Most bytes that a disk has: what a file may have.
const SIZE_MAX: u64 = i64::MAX as u64;

impl Group {
    /// The disk of an export name; the empty name is the only disk's.
    pub(crate) fn find_disk(
        &self,
        name: &str,
    ) -> std::result::Result<Arc<ReplicaDisk>, OptionError> {
        let disks = self.disks();
        let only = (name.is_empty() && disks.len() == 1).then(|| &disks[0]);
        only.or_else(|| disks.iter().find(|d| d.name == name)).cloned().ok_or_else(|| {
            let names: Vec<_> = disks.iter().map(|d| d.name.as_str()).collect();
            let text = match self.record().has_removed(name) {
                true => format!("disk {name:?} is not part of the group any more"),
                false => format!("no export {name:?}; there is {}", names.join(", ")),
            };
            OptionError::new(OptionErrorCode::Unknown, text)
        })
    }

    /// What hello tells of the disks.
    pub(super) fn describe_disks(&self) -> Vec<DiskInfo> {
        let describe = |d: Arc<ReplicaDisk>| DiskInfo {
            name: d.name.clone(),
            size: d.size(),
            growable: d.is_growable(),
            joining: d.joining(),
        };
        self.disks().into_iter().map(describe).collect()
    }

    /// Of the disks that a primary was told, those that it takes part with, and those that it has
    /// removed.
    ///
    /// # Errors
    /// It takes part with one that is not there, or that has a size that no disk has; or disks have
    /// come or gone since.
    pub(super) fn disks_of_session(
        &self,
        told: Disks<ReplicaDisk>,
        primary: &Side,
    ) -> Result<SessionDisks> {
        if !told.is_same(&self.disks()) {
            // The end of an older session's checkpoint. The primary knows disks by their places.
            return Err(Error::refused("the disks have changed since the hello"));
        }
        if let Some(disk) = primary.disks.iter().find(|disk| disk.size > SIZE_MAX) {
            let (size, name) = (disk.size, &disk.name);
            return Err(Error::refused(format!("disk {name}: {size} bytes is no size for a disk")));
        }
        let has = |disk: &ReplicaDisk| primary.disks.iter().any(|d| d.name == disk.name);
        let taking_part = told.only(has);
        if taking_part.len() != primary.disks.len() {
            return Err(Error::refused("the primary has a disk that this side does not have"));
        }
        let removed = |disk: &ReplicaDisk| {
            let mut removed = primary.removed.iter().filter(|removed| removed.name == disk.name);
            let joining = disk.joining();
            !has(disk) && removed.any(|r| joining.is_none() || joining == r.joining)
        };
        let leaving = told.only(removed).downgrade();
        Ok(SessionDisks { leaving, taking_part, told: told.downgrade() })
    }

    /// The disks that the next checkpoint does not hold any more: none while a view of the last one is
    /// open, which has them all. One that was removed here by command has gone; another one may have
    /// its name.
    pub(super) fn leaving_disks(&self, session: &Session) -> Disks<ReplicaDisk> {
        let (is_tested, there) = (self.has_open_test(), self.disks());
        let is_there = |disk: &ReplicaDisk| there.iter().any(|d| std::ptr::eq(&**d, disk));
        session.disks.leaving.upgrade().only(|disk| !is_tested && is_there(disk))
    }

    /// Disks with which a commit has nothing to do: they are being added, or stay a while.
    pub(super) fn bystanders(
        &self,
        cut: &Disks<ReplicaDisk>,
        leaving: &Disks<ReplicaDisk>,
    ) -> impl Iterator<Item = Arc<ReplicaDisk>> {
        self.disks().into_iter().filter(|disk| !cut.has(disk) && !leaving.has(disk))
    }

    /// The disks of a session that are to be cut, without those that the primary still copies for the
    /// first time: places in what hello has told.
    ///
    /// # Errors
    /// One of them is part of the checkpoint already, or none would be left.
    pub(super) fn disks_to_cut(
        &self,
        session: &Session,
        without: &[u32],
    ) -> Result<Disks<ReplicaDisk>> {
        let told = |place: &u32| session.disks.told.get(*place as usize);
        let left_out: Vec<_> = without.iter().filter_map(told).collect();
        if let Some(disk) = left_out.iter().find(|disk| disk.joining().is_none()) {
            return Err(Error::failed(format!(
                "a checkpoint without disk {}, which the last one holds",
                disk.name
            )));
        }
        let is_left_out = |disk: &ReplicaDisk| left_out.iter().any(|d| std::ptr::eq(&**d, disk));
        let disks = session.disks.taking_part.only(|disk| !is_left_out(disk));
        match disks.is_empty() {
            true => Err(Error::failed("a checkpoint of no disk")),
            false => Ok(disks),
        }
    }

    /// Adds a disk. The primary may add it from now on; the checkpoint holds it when everything has
    /// been copied. Returns whether it was not there before.
    ///
    /// # Errors
    /// Refused, or the file cannot be used; nothing was changed.
    pub(super) async fn add_disk(self: &Arc<Self>, config: DiskConfig) -> Result<bool> {
        // One that has just gone may have had this name, or this file.
        let _transition = self.side.closing.lock_without(&config, &self.transition).await?;
        let configs = self.disk_configs();
        daemon::check_disks(std::slice::from_ref(&config))?;
        if let Some(known) = configs.iter().find(|disk| disk.name == config.name) {
            return match known.path == config.path {
                true => Ok(false),
                false => Err(Error::refused(format!(
                    "disk {}: it is part of the group, with the file {}",
                    config.name,
                    known.path.display()
                ))),
            };
        }
        let all = [configs.as_slice(), std::slice::from_ref(&config)].concat();
        daemon::check_disks(&all)?;
        daemon::check_images(&self.config.state_dir, &all)?;
        self.check_change()?;
        let record = self.record();
        let known = joining(&config, &record);
        let disk = open_disk(&self.config, &config, known.as_ref(), &record, false).await?;
        self.update_record(|record| {
            record.add_disk(&config);
            if !record.secondary.disks.is_empty() {
                record.secondary.disks.push(disk.record());
            }
        })?;
        self.note_added(&config);
        self.guest.add_door(disk.gate().door());
        self.replicas.add(Arc::new(disk));
        if let Ok(service) = self.service() {
            service.add_disk(&config.name).await;
        }
        self.secure_record().await?;
        self.tell_disks();
        tracing::info!(disk = config.name, "the disk is part of the group");
        Ok(true)
    }

    /// Takes a disk out of the group that no checkpoint holds yet; with `force` any. Returns whether
    /// it was there.
    ///
    /// # Errors
    /// Refused; nothing was changed.
    pub(super) async fn remove_disk(self: &Arc<Self>, name: &str, force: bool) -> Result<bool> {
        let transition = self.transition.lock().await;
        let disks = self.disks();
        let Some(disk) = disks.iter().find(|disk| disk.name == name) else {
            return match self.record().has_removed(name) {
                true => Ok(false),
                false => Err(Error::usage(format!("there is no disk {name:?}"))),
            };
        };
        self.check_change()?;
        let has_others = disks.iter().any(|other| other.name != name && other.joining().is_none());
        if disks.len() == 1 || disk.joining().is_none() && !has_others {
            return Err(Error::refused(format!(
                "disk {name} is the last one of the group that is not just being added: stop this \
                 side instead"
            )));
        }
        let session = self.session();
        if session.is_some_and(|s| s.disks.taking_part.has(disk)) {
            return Err(Error::refused(format!(
                "disk {name} is replicated: run brep disk remove {name} on the primary; this side \
                 follows with the next checkpoint"
            )));
        }
        if disk.joining().is_none() && self.record().has_checkpoint() && !force {
            return Err(Error::refused(format!(
                "the last checkpoint holds disk {name}: run brep disk remove {name} on the primary, \
                 and this side follows; or, to take it out of the checkpoint, --force"
            )));
        }
        self.update_record(|record| record.remove_disk(name))?;
        // At once: whatever is recorded meanwhile knows it no more.
        let closing = self.part_with(disk);
        let secured = self.secure_record().await;
        self.take_out(disk, closing, &secured);
        secured?;
        self.tell_disks();
        drop(transition);
        if let Err(error) = self.side.closing.ended(Some(&disk.config)).await {
            tracing::warn!(%error, "the disk is out of the group all the same");
        }
        Ok(true)
    }

    /// Whether disks can come and go at present.
    fn check_change(&self) -> Result<()> {
        if self.plain.is_some() {
            return Err(Error::refused(
                "the primary is a plain NBD client, which says nothing of its disks: stop both \
                 sides, and start them with the disks that there shall be",
            ));
        }
        if self.has_open_test() {
            return Err(Error::refused(
                "a view of the last checkpoint is open, with the disks that it has: end it first, brep \
                 failover --test-end",
            ));
        }
        if self.is_promoted() {
            return Err(Error::refused("this side has been promoted: it is the disk now"));
        }
        Ok(())
    }

    /// Opens a disk that comes to this side after it was promoted and merged: its file is the disk.
    pub(crate) async fn open_promoted(
        &self,
        config: &DiskConfig,
    ) -> Result<(Arc<ReplicaDisk>, Arc<dyn BlockDevice>)> {
        let disk = open_disk(&self.config, config, None, &self.record(), false).await?;
        disk.promote_onto(None, Target::Latest);
        let device = disk.promoted().ok_or_else(|| Error::failed("not promoted"))?;
        Ok((Arc::new(disk), device))
    }

    /// Such a disk is part of the group: guests find `device` in its place.
    pub(crate) fn adopt(&self, disk: Arc<ReplicaDisk>, device: Arc<dyn BlockDevice>) {
        disk.gate().replace(device);
        self.guest.add_door(disk.gate().door());
        self.replicas.add(disk);
    }

    /// A disk of this side since it was promoted.
    pub(crate) fn find_promoted(&self, name: &str) -> Option<Arc<ReplicaDisk>> {
        self.disks().iter().find(|disk| disk.name == name).cloned()
    }

    /// Whoever replicates to here learns which disks there are.
    fn tell_disks(&self) {
        if let Some(session) = self.session() {
            // One that takes nothing more is told in its next hello.
            session.try_send(Message::Disks { disks: self.describe_disks() });
        }
    }

    /// Disks that no checkpoint holds have no part in a promotion: as long as the result is not
    /// [`LeftOut::gone`], they come back.
    pub(super) fn leave_out_joining(self: &Arc<Self>) -> LeftOut {
        let disks: Vec<_> = self.disks().into_iter().filter(|d| d.joining().is_some()).collect();
        disks.iter().for_each(|disk| self.replicas.remove(disk));
        LeftOut { group: Arc::clone(self), disks }
    }

    /// The table of disks does not have this one any more, which is about to be
    /// [taken out](Self::take_out): until then, and until it is closed, none of its name is added.
    pub(crate) fn part_with(&self, disk: &Arc<ReplicaDisk>) -> DropGuard {
        self.replicas.remove(disk);
        self.side.closing.begin(&disk.config)
    }

    /// A disk that neither the record nor the table of disks has any more goes; its file stays what
    /// it is. It is closed beside whoever calls this: neither a commit nor a failover waits for
    /// storage that nobody wants any more.
    ///
    /// What belongs to it in the state directory stays if that cannot be written (`secured`): the next
    /// start may find an older record.
    pub(crate) fn take_out(
        &self,
        disk: &Arc<ReplicaDisk>,
        closing: DropGuard,
        secured: &Result<()>,
    ) {
        self.note_removed(&disk.name);
        if let Ok(service) = self.service() {
            service.forget_disk(&disk.name);
        }
        self.core().own_maps.remove(&disk.name);
        disk.gate().open();
        self.guest.remove_door(disk.gate().door());
        tracing::info!(disk = disk.name, "the disk is not part of the group any more");
        let (state_dir, record) = (self.config.state_dir.clone(), self.record());
        let (disk, is_secured) = (Arc::clone(disk), secured.is_ok());
        tokio::spawn(async move {
            let closed = async {
                if !is_secured {
                    return disk.close().await;
                }
                disk.drop_buffers().await?;
                disk.close().await?;
                disk.pool.remove_files()?;
                maps_of(&state_dir, &record, &disk.name, disk.size()).remove_all()
            };
            let (closed, name) = (closed.await, disk.name.clone());
            // Its files are nobody's when the others hear of it.
            drop(disk);
            if let Err(error) = closed {
                tracing::warn!(disk = name, %error, "a disk that was removed was not closed cleanly");
            }
            drop(closing);
        });
    }
}

/// Disks that are left out of a promotion.
pub(super) struct LeftOut {
    group: Arc<Group>,
    disks: Vec<Arc<ReplicaDisk>>,
}

impl LeftOut {
    pub(super) fn configs(&self) -> Vec<DiskConfig> {
        self.disks.iter().map(|disk| disk.config.clone()).collect()
    }

    /// The record does not name them any more.
    pub(super) fn gone(mut self) {
        for disk in std::mem::take(&mut self.disks) {
            tracing::warn!(disk = disk.name, "left out: it was not copied completely");
            let closing = self.group.side.closing.begin(&disk.config);
            self.group.take_out(&disk, closing, &Ok(()));
        }
    }
}

impl Drop for LeftOut {
    fn drop(&mut self) {
        self.disks.drain(..).for_each(|disk| self.group.replicas.add(disk));
    }
}
