//! How histories end: healed and compared, or with a failover.

use std::sync::Arc;
use std::time::Duration;

use brep_replication::config::Ack;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::guest::Guest;
use crate::history::{History, millis};
use crate::model::{Model, stamps};
use crate::network::{REPLICA_PORT, reach};
use crate::watch::Contact;
use crate::world::{A, B, End, name};

/// The time in which everything has to be in order again when nothing is wrong any more.
const HEALED_WITHIN: Duration = Duration::from_secs(120);

/// When an operator gives up waiting for an error to go away.
const PATIENCE: Duration = Duration::from_secs(10);

/// What a guest's last requests may take.
const PAUSED_WITHIN: Duration = Duration::from_secs(60);

impl History {
    /// Everything is repaired; soon both sides must be equal.
    pub(crate) async fn heal(&mut self) -> Result<(), String> {
        self.world.count("end: healed");
        self.clear_faults();
        self.until_in_sync().await?;
        if !self.guest.pause(PAUSED_WITHIN).await {
            return Err("I8: requests of the guest do not end although nothing is wrong".to_owned());
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
        self.compare().map(drop)
    }

    /// Does what an operator would, until the pair is in sync.
    async fn until_in_sync(&mut self) -> Result<(), String> {
        let until = Instant::now() + HEALED_WITHIN;
        let mut patience = Instant::now() + PATIENCE;
        let mut last = Value::Null;
        while Instant::now() < until {
            self.pass(millis(50)).await?;
            for side in [A, B] {
                self.restart_if_ended(side);
            }
            let Some(process) = &self.processes[A] else { continue };
            let Some(status) = process.status().await else { continue };
            let in_sync = |disk: &Value| disk["state"] == "in-sync";
            let disks = status["disks"].as_array().cloned().unwrap_or_default();
            if disks.iter().all(in_sync) && self.guest.connection(0).await.is_some() {
                return Ok(());
            }
            let advice = status["advice"].as_str().unwrap_or_default().to_owned();
            let reason = status["reason"].as_str().unwrap_or_default().to_owned();
            if advice.starts_with("brep start; then") {
                self.world.count("advice: start");
                self.tell(A, "replication-start", &[]).await;
            } else if advice.contains("resync --full") {
                self.world.count("advice: resync --full");
                self.tell(A, "resync", &[("full", Value::Bool(true))]).await;
            } else if advice.contains("start brep secondary again") {
                self.world.count("advice: start the secondary again");
                self.world.kill(B);
            } else if advice.contains("brep start") {
                // "There" is the secondary.
                let side = if advice.contains("brep start, there") { B } else { A };
                self.world.count("advice: start");
                self.tell(side, "replication-start", &[]).await;
            } else if advice.contains("restart this side") || reason.contains("restart brep") {
                self.world.count("advice: restart");
                // The secondary's reason is shown on the primary too.
                self.world.kill(if reason.contains("/b.") { B } else { A });
            }
            let stuck = status["errors"].to_string().contains("failed before");
            if stuck && Instant::now() >= patience {
                // An image that has failed once fails until it is opened again.
                self.world.count("operator: restart of b");
                self.world.kill(B);
                patience = Instant::now() + PATIENCE;
            }
            last = status;
        }
        Err(format!("liveness: not in sync within {HEALED_WITHIN:?}: {last}"))
    }

    async fn final_checkpoint(&mut self) -> Result<(), String> {
        let mut last = None;
        for attempt in 0..60 {
            match self.tell(A, "checkpoint", &[]).await {
                Some(Ok(_)) => return Ok(()),
                other => last = other,
            }
            if attempt == 20 {
                // An image that has failed once fails until it is opened again.
                self.world.count("operator: restart of b");
                self.world.kill(B);
                self.until_in_sync().await?;
            }
            self.pass(millis(200)).await?;
        }
        Err(format!("liveness: no checkpoint although all is well: {last:?}"))
    }

    /// Both sides' disks; they are equal.
    fn compare(&self) -> Result<Vec<Vec<u64>>, String> {
        let mut contents = Vec::new();
        for disk in 0..self.setup.disks {
            let mine = self.file_stamps(A, disk).map_err(|why| format!("I1: primary: {why}"))?;
            let theirs = self.file_stamps(B, disk).map_err(|e| format!("I7: secondary: {e}"))?;
            if let Some(sector) = (0..mine.len()).find(|at| mine[*at] != theirs[*at]) {
                return Err(format!(
                    "I7: the disks differ: disk {disk} sector {sector}: {} and {}",
                    mine[sector], theirs[sector]
                ));
            }
            contents.push(mine);
        }
        Ok(contents)
    }

    /// The secondary takes over.
    pub(crate) async fn fail_over(&mut self) -> Result<(), String> {
        let (lose_a, repaired, latest) =
            self.world.with_rng(|rng| (rng.chance(700), rng.chance(500), rng.chance(300)));
        if lose_a {
            self.world.note(|| "a is killed for good".to_owned());
            self.world.kill(A);
            // What it had sent may arrive, or not.
            let pause = self.world.with_rng(|rng| rng.range(0, 20));
            self.pass(millis(pause)).await?;
        }
        if repaired {
            self.clear_faults();
        } else {
            let healthy = Default::default();
            self.world.lock().machines[B].faults = healthy;
        }
        self.world.lock().machines[B].ends_in = None;
        self.restart_if_ended(B);
        self.pass(millis(50)).await?;
        let target = if latest { "latest" } else { "checkpoint" };
        let Some((report, begun)) = self.promote(target).await? else { return Ok(()) };
        let now = self.world.tick();
        // A primary that lives goes on alone, or finds that it is the primary no more.
        self.guest.end();
        let guest = self.check_promoted(&report, (begun, now)).await?;
        self.merge(guest).await
    }

    /// The report, and the tick of the command; none if it was refused for a good reason.
    async fn promote(&mut self, target: &str) -> Result<Option<(Value, u64)>, String> {
        self.world.count(&format!("command: failover --to {target}"));
        let mut wanted = target.to_owned();
        for _ in 0..40 {
            let begun = self.world.tick();
            match self.tell(B, "failover", &[("to", json!(wanted))]).await {
                Some(Ok(report)) => return Ok(Some((report, begun))),
                Some(Err(why)) if why.contains("--to checkpoint") && wanted == "latest" => {
                    self.world.count("refused: failover --to latest");
                    wanted = "checkpoint".to_owned();
                }
                Some(Err(why)) if why.contains("no complete checkpoint") => {
                    if self.watch.is_promotable() {
                        return Err(format!("I3: there was a checkpoint, and it is lost: {why}"));
                    }
                    self.world.count("refused: failover without a checkpoint");
                    return Ok(None);
                }
                Some(Err(why)) if why.contains("restart brep") => {
                    self.world.count("advice: restart");
                    self.world.kill(B);
                }
                _ => {}
            }
            self.pass(millis(250)).await?;
            self.restart_if_ended(B);
        }
        Err("I3: the secondary cannot be promoted although nothing is wrong with it".to_owned())
    }

    /// What is served is the checkpoint, or the newest state.
    async fn check_promoted(
        &mut self,
        report: &Value,
        (begun, now): (u64, u64),
    ) -> Result<Arc<Guest>, String> {
        let epoch = report["epoch"].as_u64().unwrap_or_default();
        let latest = report["target"] == "latest";
        let guest = Guest::new(
            &self.world,
            &self.setup,
            Model::blank(self.setup.disks, self.setup.disk_bytes),
            self.guest.last_stamp() + 1_000_000,
        );
        guest.plug(reach(B, None, REPLICA_PORT));
        let mut contents = Vec::new();
        for disk in 0..self.setup.disks {
            let data = guest.read_all(disk).await.ok_or("the promoted disk cannot be read")?;
            contents.push(stamps(disk, &data).map_err(|why| format!("I3: promoted: {why}"))?);
        }
        if let Some(newest) = self.watch.newest()
            && epoch < newest
        {
            return Err(format!("I3: promoted to {epoch}, and {newest} was committed"));
        }
        let moments = match (latest, self.watch.contact, self.setup.ack) {
            (false, _, _) => self.watch.moments(epoch, now),
            (true, Contact::Lost(tick), Ack::Sync) => (tick, now),
            (true, _, _) => (begun, now),
        };
        self.world.count(if latest { "promoted: latest" } else { "promoted: checkpoint" });
        self.guest
            .model()
            .check_cut(&contents, moments)
            .map_err(|why| format!("I2, I3: promoted to {epoch} {report}, {moments:?}: {why}"))?;
        *guest.model() = Model::new(&contents);
        Ok(guest)
    }

    /// The promoted disk is used while it is merged, and killed meanwhile.
    async fn merge(&mut self, guest: Arc<Guest>) -> Result<(), String> {
        tokio::spawn(Arc::clone(&guest).work(3));
        tokio::spawn(Arc::clone(&guest).work(3));
        let kills = self.world.with_rng(|rng| rng.below(3));
        for _ in 0..kills {
            let operations = self.world.with_rng(|rng| {
                let most = rng.pick(&[10, 100, 400]);
                rng.below(most)
            });
            self.world.count("fault: kill in a merge");
            self.world.lock().machines[B].ends_in = Some((operations, End::Kill));
            let pause = self.world.with_rng(|rng| rng.range(1, 100));
            self.pass(millis(pause)).await?;
            self.restart_if_ended(B);
        }
        self.world.lock().machines[B].ends_in = None;
        let until = Instant::now() + HEALED_WITHIN;
        loop {
            self.pass(millis(50)).await?;
            self.restart_if_ended(B);
            let status = match &self.processes[B] {
                Some(process) => process.status().await.unwrap_or_default(),
                None => Value::Null,
            };
            let merged =
                |disk: &Value| disk["state"] == "promoted" || disk["state"] == "split-brain";
            if status["disks"].as_array().is_some_and(|disks| disks.iter().all(merged)) {
                break;
            }
            if Instant::now() >= until {
                return Err(format!("liveness: not merged within {HEALED_WITHIN:?}: {status}"));
            }
        }
        self.world.count("end: promoted and merged");
        if !guest.pause(PAUSED_WITHIN).await {
            return Err("I8: requests of the promoted side's guest do not end".to_owned());
        }
        guest.end();
        let now = self.world.tick();
        let contents: Result<Vec<_>, _> =
            (0..self.setup.disks).map(|disk| self.file_stamps(B, disk)).collect();
        let contents = contents.map_err(|why| format!("I16: merged: {why}"))?;
        guest
            .model()
            .check_cut(&contents, (now, now))
            .map_err(|why| format!("I16: the merged disks: {why}"))
    }
}
