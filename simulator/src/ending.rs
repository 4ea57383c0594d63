//! How histories end: healed and compared, or with a failover.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::Instant;

use crate::acts::wants_restart;
use crate::history::{History, millis};
use crate::names::File;
use crate::roles::TakenOver;
use crate::seen::Seen;
use crate::side::file_name;
use crate::world::{A, B, Side, name};

/// The time in which everything has to be in order again when nothing is wrong any more.
pub(crate) const HEALED_WITHIN: Duration = Duration::from_secs(120);

/// When an operator gives up waiting for an error to go away.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a guest's last requests may take.
pub(crate) const PAUSED_WITHIN: Duration = Duration::from_secs(60);

impl History {
    /// Everything is repaired; soon both sides must be equal.
    pub(crate) async fn heal(&mut self) -> Result<(), String> {
        self.clear_faults().await;
        self.until_in_sync().await?;
        if self.finish_growth().await {
            self.until_in_sync().await?;
        }
        if !self.guest.pace.pause(PAUSED_WITHIN).await {
            return Err("I8: requests of the guest do not end although nothing is wrong".to_owned());
        }
        if let Some(second) = self.second.clone() {
            if !second.pace.pause(PAUSED_WITHIN).await {
                return Err("I8: requests of the secondary's guest do not end".to_owned());
            }
            self.check_reads(second.reads())?;
        }
        self.final_checkpoint().await?;
        let now = self.world.tick();
        let contents = self.compare()?;
        self.guest
            .model()
            .check_cut(&contents, (now, now))
            .map_err(|why| format!("I1: the primary's disks at the end: {why}"))?;
        for side in [A, B] {
            if let Some(process) = self.processes[side].take() {
                let ended = process.stop(&self.world).await;
                ended.map_err(|why| format!("a clean stop of {}: {why}", name(side)))?;
            }
        }
        self.compare()?;
        self.world.saw(Seen::EndHealed);
        Ok(())
    }

    /// Does what an operator would, until the pair is in sync.
    pub(crate) async fn until_in_sync(&mut self) -> Result<(), String> {
        let until = Instant::now() + HEALED_WITHIN;
        let mut patience = Instant::now() + PATIENCE;
        let mut last = Value::Null;
        while Instant::now() < until {
            self.pass(millis(50)).await?;
            for side in [A, B] {
                self.restart_if_ended(side).await;
            }
            let Some(status) = self.status(self.primary).await else { continue };
            let in_sync = |disk: &Value| disk["state"] == "in-sync" && disk["merging"].is_null();
            let disks = status["disks"].as_array().cloned().unwrap_or_default();
            if disks.iter().all(in_sync) && self.guest.connection(0).await.is_some() {
                return Ok(());
            }
            self.follow_advice(&status).await;
            let told = [&status["errors"], &status["reason"]].map(ToString::to_string);
            let stuck = told.iter().any(|told| told.contains("failed before"));
            if stuck && Instant::now() >= patience {
                self.restart_secondary();
                patience = Instant::now() + PATIENCE;
            }
            last = status;
        }
        let other = self.status(1 - self.primary).await;
        Err(format!(
            "liveness: not in sync within {HEALED_WITHIN:?}: {last}; other side: {other:?}"
        ))
    }

    pub(crate) async fn status(&self, side: usize) -> Option<Value> {
        self.processes[side].as_ref()?.status().await
    }

    /// An image that has failed once fails until it is opened again.
    fn restart_secondary(&mut self) {
        self.world.count("operator: restart of the secondary");
        self.world.kill(1 - self.primary);
    }

    async fn follow_advice(&mut self, status: &Value) {
        let advice = status["advice"].as_str().unwrap_or_default();
        let reason = status["reason"].as_str().unwrap_or_default();
        let (primary, secondary) = (self.primary, 1 - self.primary);
        if advice.contains("resync --discard-local on the secondary") {
            self.world.count("advice: resync --discard-local");
            self.tell_and_obey(secondary, "resync", &[("discard-local", json!(true))]).await;
        } else if advice.starts_with("brep start; then") {
            self.world.count("advice: start");
            self.tell_and_obey(primary, "replication-start", &[]).await;
        } else if advice.contains("resync --full") {
            self.world.count("advice: resync --full");
            self.tell_and_obey(primary, "resync", &[("full", json!(true))]).await;
        } else if advice.contains("start brep secondary again") {
            self.world.count("advice: start the secondary again");
            self.world.kill(secondary);
        } else if advice.contains("brep start") {
            // "There" is the secondary.
            let side = if advice.contains("brep start, there") { secondary } else { primary };
            self.world.count("advice: start");
            self.tell_and_obey(side, "replication-start", &[]).await;
        } else if advice.contains("brep peer set") {
            self.world.count("advice: peer set");
            self.set_peer(primary).await;
        } else if advice.contains("brep disk add") {
            self.world.count("advice: disk add");
            self.add_where_it_lacks(advice).await;
        } else if advice.contains("with the same names and sizes") {
            self.world.count("advice: the same sizes");
            self.grow_to_others_size().await;
        } else if advice.contains("start it as this one's secondary") {
            self.world.count("advice: that side as a secondary");
            self.returning[secondary] = true;
            self.world.kill(secondary);
        } else if wants_restart(advice) || wants_restart(reason) {
            self.world.count("advice: restart");
            // The secondary's reason is shown on the primary too.
            let is_there = reason.contains(&format!("/{}.", name(secondary)));
            self.world.kill(if is_there { secondary } else { primary });
        }
    }

    /// An image may be larger than its disk after a `resize` that failed and could not be undone:
    /// its operator repeats it.
    async fn finish_growth(&mut self) -> bool {
        let Some(status) = self.status(self.primary).await else { return false };
        let mut grown = false;
        for disk in 0..self.setup.disks {
            let bytes = self.file_bytes(self.primary, disk);
            if status["disks"][disk]["size"].as_u64() < bytes
                && let Some(bytes) = bytes
            {
                self.world.count("operator: resize again");
                self.resize(disk, bytes).await;
                grown = true;
            }
        }
        grown
    }

    fn file_bytes(&self, side: Side, disk: usize) -> Option<u64> {
        let file = self.world.lock().machines[side].names.get(&file_name(disk)).cloned()?;
        Some(file.lock().expect("one thread").data.len() as u64)
    }

    /// A secondary's disks have grown when it was the primary: this one's grow too. Those of a blank
    /// one are made as large by its operator.
    async fn grow_to_others_size(&mut self) {
        let (primary, secondary) = (self.primary, 1 - self.primary);
        for disk in 0..self.setup.disks {
            let file =
                |side: usize| self.world.lock().machines[side].names.get(&file_name(disk)).cloned();
            let (Some(mine), Some(theirs)) = (file(primary), file(secondary)) else { continue };
            let size = |file: &File| file.lock().expect("one thread").data.len() as u64;
            let (mine, there) = (size(&mine), size(&theirs));
            if there > mine {
                self.resize(disk, there).await;
            } else if there < mine {
                self.world.kill(secondary);
                let mut file = theirs.lock().expect("one thread");
                file.truncate(mine);
                file.sync();
            }
        }
    }

    async fn final_checkpoint(&mut self) -> Result<(), String> {
        let mut last = None;
        for attempt in 0..60 {
            match self.tell(self.primary, "checkpoint", &[]).await {
                Some(Ok(_)) => return Ok(()),
                other => last = other,
            }
            if attempt == 20 {
                self.restart_secondary();
                self.until_in_sync().await?;
            }
            self.pass(millis(200)).await?;
        }
        Err(format!("liveness: no checkpoint although all is well: {last:?}"))
    }

    /// Both sides' disks; they are equal.
    fn compare(&self) -> Result<Vec<Vec<u64>>, String> {
        let (primary, secondary) = (self.primary, 1 - self.primary);
        let mut contents = Vec::new();
        for disk in self.disks() {
            let mine = self.file_stamps(primary, disk);
            let mine = mine.map_err(|why| format!("I1: primary: {why}"))?;
            let theirs = self.file_stamps(secondary, disk);
            let theirs = theirs.map_err(|why| format!("I7: secondary: {why}"))?;
            if mine.len() != theirs.len() {
                let (mine, theirs) = (mine.len(), theirs.len());
                return Err(format!("I7: disk {disk}: {mine} and {theirs} sectors"));
            }
            if let Some(sector) = (0..mine.len()).find(|at| mine[*at] != theirs[*at]) {
                return Err(format!(
                    "I7: the disks differ: disk {disk} sector {sector}: {} and {}",
                    mine[sector], theirs[sector]
                ));
            }
            contents.resize(disk, Vec::new());
            contents.push(mine);
        }
        Ok(contents)
    }

    /// The secondary takes over, and in the end its files alone count.
    pub(crate) async fn end_promoted(&mut self) -> Result<(), String> {
        match self.fail_over().await? {
            TakenOver::ForGood => {}
            TakenOver::Undone => return self.heal().await,
            TakenOver::Not => return Ok(()),
        }
        self.until_merged().await?;
        if !self.guest.pace.pause(PAUSED_WITHIN).await {
            return Err("I8: requests of the promoted side's guest do not end".to_owned());
        }
        let now = self.world.tick();
        let mut contents = Vec::new();
        for disk in self.disks() {
            let held = self.file_stamps(self.primary, disk);
            contents.resize(disk, Vec::new());
            contents.push(held.map_err(|why| format!("I16: merged: {why}"))?);
        }
        self.guest
            .model()
            .check_cut(&contents, (now, now))
            .map_err(|why| format!("I16: the merged disks: {why}"))?;
        self.world.saw(Seen::EndPromoted);
        Ok(())
    }
}
