//! Disks that come and go while the pair runs.

use std::collections::BTreeSet;

use serde_json::{Value, json};

use crate::acts::wants_restart;
use crate::file::SECTOR;
use crate::history::{History, put_file};
use crate::model::fill;
use crate::seen::Seen;
use crate::side::{disk_name, disk_number, disk_path};
use crate::world::{A, B, Side};

/// Checkpoints that begin after a disk has come or gone, and of which the second must know it: the
/// first may have been cut before.
const COMMITS_SURE: u64 = 2;

/// The disk that comes and goes: one at a time.
#[derive(Debug, Clone)]
pub(crate) struct Added {
    pub(crate) disk: usize,
    /// Its files have been made.
    is_made: bool,
    /// The primary's guest uses it.
    pub(crate) is_there: bool,
    /// The checkpoints of this line when the primary was known to have added or removed it.
    pub(crate) since: Option<u64>,
    /// What each side was told of at some time, and is started with.
    pub(crate) given: [BTreeSet<usize>; 2],
}

impl Added {
    pub(crate) fn new(disk: usize) -> Self {
        Added {
            disk,
            is_made: false,
            is_there: false,
            since: None,
            given: [BTreeSet::new(), BTreeSet::new()],
        }
    }
}

impl History {
    /// The disks that the primary's guest has.
    pub(crate) fn disks(&self) -> impl Iterator<Item = usize> + use<> {
        let added = self.added.is_there.then_some(self.added.disk);
        (0..self.setup.disks).chain(added)
    }

    /// The disks with which a side is started.
    pub(crate) fn given_disks(&self, side: Side) -> Vec<usize> {
        (0..self.setup.disks).chain(self.added.given[side].iter().copied()).collect()
    }

    /// A disk comes, or goes again.
    pub(crate) async fn change_disks(&mut self) {
        if self.added.is_there {
            return self.remove_disk().await;
        }
        self.make_disk();
        let disk = self.added.disk;
        // If not both take it, it may get into a checkpoint all the same.
        self.added.since = None;
        // One that only the primary has keeps the secondary out, until it is added there too.
        let first = if self.world.with_rng(|rng| rng.chance(800)) {
            1 - self.primary
        } else {
            self.primary
        };
        for side in [first, 1 - first] {
            if self.add_disk(side, disk).await.is_err() {
                return;
            }
        }
        self.world.saw(Seen::DiskAdded);
        self.added.is_there = true;
        self.added.since = Some(self.watch.checkpoints());
        self.guest.use_disk(disk);
    }

    /// Why a side does not have the disk now.
    async fn add_disk(&mut self, side: Side, disk: usize) -> Result<(), String> {
        let Some(life) = self.processes[side].as_ref().map(|process| process.life) else {
            return Err("there is no process".to_owned());
        };
        self.added.given[side].insert(disk);
        let file = disk_path(life, disk).display().to_string();
        let arguments =
            [("name", json!(disk_name(disk))), ("file", json!(file)), ("format", json!("raw"))];
        let told = self.tell(side, "disk-add", &arguments).await;
        told.unwrap_or_else(|| Err("no answer".to_owned())).map(drop)
    }

    /// Its files, on both machines.
    fn make_disk(&mut self) {
        if std::mem::replace(&mut self.added.is_made, true) {
            return;
        }
        let disk = self.added.disk;
        let sectors = self.setup.disk_bytes / SECTOR;
        let first = self.guest.take_stamps(sectors);
        let contents: Vec<u64> = (first..first + sectors)
            .map(|stamp| if self.world.with_rng(|rng| rng.chance(200)) { stamp } else { 0 })
            .collect();
        let data: Vec<u8> =
            (0..).zip(&contents).flat_map(|(sector, own)| fill(disk, sector, 1, *own)).collect();
        put_file(&self.world, self.primary, disk, &data);
        put_file(&self.world, 1 - self.primary, disk, &vec![0xEE; data.len()]);
        self.guest.model().add_disk(disk, &contents);
    }

    async fn remove_disk(&mut self) {
        let disk = self.added.disk;
        self.guest.leave_disk(disk);
        // Whether it was removed may be unknown: then it is added once more some time.
        self.added.is_there = false;
        self.added.since = None;
        let arguments = [("name", json!(disk_name(disk))), ("force", Value::Bool(true))];
        if let Some(Ok(_)) = self.tell(self.primary, "disk-remove", &arguments).await {
            self.world.saw(Seen::DiskRemoved);
            self.added.since = Some(self.watch.checkpoints());
        }
    }

    /// What a promoted side has: the disks of its last checkpoint.
    pub(crate) fn check_promoted_disks(&self, status: &Value) -> Result<Vec<usize>, String> {
        let disks = disks_of(status);
        let Added { disk, is_there, since, .. } = self.added;
        let missing = (0..self.setup.disks).find(|disk| !disks.contains(disk));
        if let Some(missing) = missing {
            return Err(format!("I3: disk {missing} has no part in the promotion"));
        }
        let is_sure = since.is_some_and(|since| self.watch.checkpoints() >= since + COMMITS_SURE);
        // One that is being copied comes with the first checkpoint behind that.
        let is_sure = is_sure && !self.watch.leaves_out(&disk_name(disk));
        if is_sure && disks.contains(&disk) != is_there {
            let part = if is_there { "no" } else { "a" };
            return Err(format!("I2: disk {disk} has {part} part in the promotion"));
        }
        if disks.contains(&disk) {
            self.world.saw(Seen::PromotedWithAdded);
        }
        // What one side alone was started with is nobody's to check.
        let is_known = |held: &usize| *held < self.setup.disks || *held == disk;
        Ok(disks.into_iter().filter(is_known).collect())
    }

    /// The roles have changed: the primary has these disks.
    pub(crate) fn note_disks(&mut self, disks: &[usize]) {
        let disk = self.added.disk;
        self.added.since = None;
        self.added.is_there = disks.contains(&disk);
        match self.added.is_there {
            true => self.guest.use_disk(disk),
            false if self.added.is_made => {
                // What is left of it on either side is not the same any more.
                self.guest.leave_disk(disk);
                self.added.disk += 1;
                self.added.is_made = false;
            }
            false => {}
        }
    }

    /// The same after a switchover: the other side has what this one had.
    pub(crate) async fn learn_disks(&mut self) {
        if let Some(status) = self.status(self.primary).await {
            self.note_disks(&disks_of(&status));
        }
    }

    /// What an advice says of a disk that only one side has.
    pub(crate) async fn add_where_it_lacks(&mut self, advice: &str) {
        let name = advice.split("brep disk add ").nth(1).and_then(|rest| rest.split('=').next());
        let Some(disk) = name.and_then(disk_number) else { return };
        let side =
            if advice.contains("on the secondary, with") { 1 - self.primary } else { self.primary };
        if let Err(why) = self.add_disk(side, disk).await
            && wants_restart(&why)
        {
            self.world.count("advice: restart");
            self.world.kill(side);
        }
    }

    /// A start was refused: a promoted or outdated side takes no disk that it did not have.
    pub(crate) fn forget_given(&mut self, side: Side, why: &str) {
        for disk in self.added.given[A].union(&self.added.given[B]).copied().collect::<Vec<_>>() {
            if why.contains(&format!("disk {}: it is not part", disk_name(disk))) {
                self.added.given[side].remove(&disk);
            }
        }
    }
}

/// The numbers of the disks that a side has.
pub(crate) fn disks_of(status: &Value) -> Vec<usize> {
    let disks = status["disks"].as_array().map_or(&[][..], Vec::as_slice);
    let held = disks.iter().filter(|disk| disk["state"] != "joining");
    held.filter_map(|disk| disk_number(disk["name"].as_str()?)).collect()
}
