//! Changes of roles: switchovers, and failovers after which the old primary returns.

use std::time::Duration;

use brep_replication::config::{Ack, Role};
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::acts::{Lasting, wants_restart};
use crate::ending::{HEALED_WITHIN, PAUSED_WITHIN};
use crate::file::SECTOR;
use crate::guest::Guest;
use crate::history::{History, millis};
use crate::model::{Model, stamps};
use crate::second::Place;
use crate::seen::Seen;
use crate::watch::Contact;
use crate::world::{A, B, Side, name};

/// What the last requests of a guest that is going to move may take.
const MOVED_WITHIN: Duration = Duration::from_secs(5);

/// Why a side that has no checkpoint is not promoted.
const REFUSALS: [&str; 2] = ["no complete checkpoint", "(outdated)"];

/// How a secondary takes over.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Wanted {
    pub(crate) target: &'static str,
    /// It can be undone.
    pub(crate) hold: bool,
}

/// What became of a failover.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TakenOver {
    ForGood,
    /// The old primary is the primary again.
    Undone,
    /// There was no checkpoint.
    Not,
}

impl History {
    /// The other side becomes the primary.
    pub(crate) async fn change_roles(&mut self) -> Result<(), String> {
        if self.world.with_rng(|rng| rng.chance(500)) {
            return self.switch_over().await;
        }
        if self.fail_over().await? == TakenOver::ForGood {
            self.until_merged().await?;
            self.bring_back(1 - self.primary);
        }
        Ok(())
    }

    /// By plan: nothing is lost.
    async fn switch_over(&mut self) -> Result<(), String> {
        if self.world.with_rng(|rng| rng.chance(800)) {
            self.clear_faults().await;
            self.until_in_sync().await?;
        }
        // Its address is that of the secondary's guest afterwards.
        let moves = self.second.is_some() && self.primary == B;
        if moves && !self.guest.pace.pause(MOVED_WITHIN).await {
            self.guest.pace.resume();
            return Ok(());
        }
        if self.world.with_rng(|rng| rng.chance(500)) {
            let side = self.world.with_rng(|rng| rng.below(2)) as Side;
            self.arm(side, self.some_end(side), &[20, 200, 1000]);
        }
        self.world.saw(Seen::Switchover);
        let told = self.tell(self.primary, "switchover", &[("timeout-ms", json!(5000))]).await;
        if let Some(Ok(_)) = told {
            self.switched_over().await;
        }
        let settled = self.settle_roles().await;
        self.guest.pace.resume();
        settled
    }

    async fn switched_over(&mut self) {
        self.world.saw(Seen::SwitchedOver);
        // What the other side has told as a secondary.
        self.watch.look(&self.world, &self.processes, self.primary).await;
        self.second_guest_returns(self.primary);
        self.primary = 1 - self.primary;
        self.returning[self.primary] = false;
        self.world.note(|| format!("{} is the primary now", name(self.primary)));
        self.watch.roles_changed(false);
        self.guest.plug(self.guest_endpoint(self.primary));
    }

    /// After a switchover whose outcome may be unknown: who is the primary?
    async fn settle_roles(&mut self) -> Result<(), String> {
        let until = Instant::now() + HEALED_WITHIN;
        let mut undecided = 0;
        while Instant::now() < until {
            self.pass(millis(50)).await?;
            for side in [A, B] {
                self.repair(side);
                self.restart_if_ended(side).await;
            }
            let mut serves = [None; 2];
            for side in [A, B] {
                if let Some(status) = self.status(side).await {
                    serves[side] = Some(status["role"] != "secondary");
                }
            }
            match (serves[self.primary], serves[1 - self.primary]) {
                (Some(true), Some(false)) => return self.meet().await,
                (Some(false), Some(true)) => self.switched_over().await,
                (Some(true), Some(true)) => {
                    return Err("I11: two primaries after a switchover".to_owned());
                }
                (Some(false), Some(false)) => undecided += 1,
                _ => {}
            }
            // Either is as good as the other.
            if undecided == 100 {
                self.world.count("roles: two secondaries after a switchover");
                let side = self.world.with_rng(|rng| rng.below(2)) as Side;
                self.primary = 1 - side;
                let begun = self.world.tick();
                let wanted = Wanted { target: "checkpoint", hold: false };
                self.take_over(wanted, Some(begun)).await?;
                self.second_guest_returns(1 - self.primary);
                return self.meet().await;
            }
        }
        Err("liveness: nobody is the primary after a switchover".to_owned())
    }

    /// The primary is told where its secondary is.
    async fn meet(&mut self) -> Result<(), String> {
        self.learn_disks().await;
        if !self.peer_known[self.primary] {
            self.set_peer(self.primary).await;
        }
        Ok(())
    }

    /// The secondary takes over from a primary that is dead, cut off, or alive.
    pub(crate) async fn fail_over(&mut self) -> Result<TakenOver, String> {
        let old = self.primary;
        let (lost, repaired, latest) =
            self.world.with_rng(|rng| (rng.chance(700), rng.chance(500), rng.chance(300)));
        if lost {
            let end = self.some_end(old);
            self.world.note(|| format!("{} is lost: {end:?}", name(old)));
            self.world.end(old, end);
            // What it had sent may arrive, or not.
            let pause = self.world.with_rng(|rng| rng.range(0, 20));
            self.pass(millis(pause)).await?;
        }
        if repaired {
            self.clear_faults().await;
        } else {
            self.repair(1 - old);
        }
        // One that is being stopped is no secondary yet.
        if self.lasting.iter().any(|(_, what)| *what == Lasting::Stopping(1 - old)) {
            self.world.kill(1 - old);
        }
        self.restart_if_ended(1 - old).await;
        self.pass(millis(50)).await?;
        let target = if latest { "latest" } else { "checkpoint" };
        if self.features.held && self.world.with_rng(|rng| rng.chance(700)) {
            return self.fail_over_held(target).await;
        }
        self.take_over(Wanted { target, hold: false }, None).await
    }

    /// The secondary is promoted; what it serves is checked, and its guest goes on. `all_from`:
    /// everything that was answered before this is there.
    pub(crate) async fn take_over(
        &mut self,
        wanted: Wanted,
        all_from: Option<u64>,
    ) -> Result<TakenOver, String> {
        let new = 1 - self.primary;
        let Some((report, begun)) = self.promote(new, wanted).await? else {
            return Ok(TakenOver::Not);
        };
        self.second_guest_ends(new).await?;
        let now = self.world.tick();
        let model = self.check_promoted(new, &report, (all_from.unwrap_or(begun), now), all_from);
        let model = model.await?;
        self.world.saw(match report["target"] == "latest" {
            true => Seen::PromotedToLatest,
            false => Seen::PromotedToCheckpoint,
        });
        self.promotions += 1;
        self.promoted_to_latest = report["target"] == "latest";
        self.merging = wanted.hold || !self.promoted_to_latest;
        if self.promotions > 1 {
            self.world.saw(Seen::SecondPromotion);
        }
        // What it has told as a secondary.
        self.watch.look(&self.world, &self.processes, self.primary).await;
        self.primary = new;
        self.returning[new] = false;
        self.watch.roles_changed(true);
        if !wanted.hold {
            self.second.iter().for_each(|second| second.forget());
        }
        // A primary that lives goes on alone, or finds that it is the primary no more.
        let disks: Vec<_> = (0..).zip(model.sizes()).filter(|(_, size)| *size > 0).collect();
        let disks: Vec<_> = disks.into_iter().map(|(disk, _)| disk).collect();
        self.left = Some(self.guest.replace(self.guest_endpoint(new), model));
        self.note_disks(&disks);
        Ok(TakenOver::ForGood)
    }

    /// What a side says of itself, when it does.
    async fn until_answered(&mut self, side: Side) -> Result<Value, String> {
        for _ in 0..40 {
            if let Some(status) = self.status(side).await {
                return Ok(status);
            }
            self.pass(millis(100)).await?;
            self.restart_if_ended(side).await;
        }
        Err(format!("liveness: {} does not answer", name(side)))
    }

    /// The secondary's guest is the only one from now on: here another one, which knows nothing.
    async fn second_guest_ends(&mut self, side: Side) -> Result<(), String> {
        let Some(second) = self.second.clone().filter(|_| side == B) else { return Ok(()) };
        match second.pace.pause(PAUSED_WITHIN).await {
            true => Ok(()),
            false => Err("I8: requests of the secondary's guest do not end".to_owned()),
        }
    }

    pub(crate) fn second_guest_returns(&self, side: Side) {
        self.second.iter().filter(|_| side == B).for_each(|second| second.pace.resume());
    }

    /// The report, and the tick of the command; none if it was refused for a good reason.
    async fn promote(
        &mut self,
        side: Side,
        wanted: Wanted,
    ) -> Result<Option<(Value, u64)>, String> {
        let Wanted { mut target, hold } = wanted;
        self.world.saw(match target {
            "latest" => Seen::FailoverToLatest,
            _ => Seen::FailoverToCheckpoint,
        });
        for _ in 0..40 {
            let begun = self.world.tick();
            let arguments = [("to", json!(target)), ("hold", json!(hold))];
            match self.tell(side, "failover", &arguments).await {
                Some(Ok(report)) => return Ok(Some((report, begun))),
                Some(Err(why)) if why.contains("--to checkpoint") && target == "latest" => {
                    self.world.count("refused: failover --to latest");
                    target = "checkpoint";
                }
                Some(Err(why)) if REFUSALS.iter().any(|refusal| why.contains(refusal)) => {
                    if self.watch.is_promotable() {
                        return Err(format!("I3: there was a checkpoint, and it is lost: {why}"));
                    }
                    self.world.count("refused: failover without a checkpoint");
                    return Ok(None);
                }
                Some(Err(why)) if wants_restart(&why) => {
                    self.world.count("advice: restart");
                    self.world.kill(side);
                }
                // It made room for the other one, which says so: whoever wants it all the same stops that.
                Some(Err(why)) if why.contains("the other side has taken over") => {
                    self.world.count("refused: failover beside a primary that answers");
                    self.world.kill(1 - side);
                }
                _ => {}
            }
            self.pass(millis(250)).await?;
            self.restart_if_ended(side).await;
        }
        Err("I3: the secondary cannot be promoted although nothing is wrong with it".to_owned())
    }

    /// What is served is the checkpoint, or the newest state.
    async fn check_promoted(
        &mut self,
        side: Side,
        report: &Value,
        (begun, now): (u64, u64),
        all_from: Option<u64>,
    ) -> Result<Model, String> {
        let epoch = report["epoch"].as_u64().unwrap_or_default();
        let latest = report["target"] == "latest";
        if report["left-out"].as_array().is_some_and(|disks| !disks.is_empty()) {
            self.world.saw(Seen::LeftOut);
        }
        let disks = self.guest.model().sizes().len();
        let reader = Guest::new(&self.world, disks, Model::blank(disks, SECTOR), 0);
        reader.plug(self.guest_endpoint(side));
        let second = self.second.clone().filter(|_| side == B);
        if let Some(second) = &second {
            self.write_again(&reader, side, second.lost_at(epoch)).await?;
        }
        let mut contents = Vec::new();
        let disks = match self.features.disks {
            true => {
                let status = self.until_answered(side).await?;
                self.check_promoted_disks(&status)?
            }
            false => self.disks().collect(),
        };
        for disk in disks {
            contents.resize(disk, Vec::new());
            let data = self.read_promoted(&reader, side, disk).await?;
            contents.push(stamps(disk, &data));
        }
        if let Some(newest) = self.watch.newest()
            && epoch < newest
        {
            return Err(format!("I3: promoted to {epoch}, and {newest} was committed"));
        }
        let moments = match (all_from, latest, self.watch.contact, self.setup.ack[self.primary]) {
            (Some(from), ..) => (from, now),
            (None, false, ..) => self.watch.moments(epoch, now),
            (None, true, Contact::Lost(tick), Ack::Sync) => (tick, now),
            (None, true, ..) => (begun, now),
        };
        let checked = match &second {
            None => self.guest.model().check_cut(&contents, moments),
            Some(second) => {
                let of_checkpoint = second.check_promoted((epoch, latest), &contents)?;
                self.check_reads(second.reads())?;
                self.guest.model().check_moment(of_checkpoint.into_iter(), moments)
            }
        };
        checked
            .map_err(|why| format!("I2, I3: promoted to {epoch} {report}, {moments:?}: {why}"))?;
        Ok(Model::new(&contents))
    }

    /// What was written and not flushed before a loss of power is written once more.
    async fn write_again(
        &mut self,
        reader: &Guest,
        side: Side,
        mut places: Vec<Place>,
    ) -> Result<(), String> {
        for _ in 0..20 {
            while let Some((disk, sector)) = places.last().copied() {
                if reader.zero_sector(disk, sector as u64).await.is_err() {
                    break;
                }
                places.pop();
            }
            if places.is_empty() {
                return Ok(());
            }
            self.pass(millis(100)).await?;
            self.restart_if_ended(side).await;
        }
        Err("I3: the promoted disk cannot be written to".to_owned())
    }

    /// Everything on a promoted disk; its process may have ended meanwhile.
    async fn read_promoted(
        &mut self,
        reader: &Guest,
        side: Side,
        disk: usize,
    ) -> Result<Vec<u8>, String> {
        let mut last = String::new();
        for _ in 0..20 {
            match reader.read_all(disk).await {
                Ok(data) => return Ok(data),
                Err(why) => last = why,
            }
            self.world.note(|| format!("the promoted disk cannot be read: {last}"));
            self.pass(millis(100)).await?;
            self.restart_if_ended(side).await;
        }
        Err(format!("I3: the promoted disk cannot be read: {last}"))
    }

    /// The promoted disk is used while it is merged, and its process ends meanwhile.
    pub(crate) async fn until_merged(&mut self) -> Result<(), String> {
        let ends = self.world.with_rng(|rng| rng.below(3));
        for _ in 0..ends {
            self.world.saw(Seen::EndInMerge);
            self.arm(self.primary, self.end_of_promoted(), &[10, 100, 400]);
            let pause = self.world.with_rng(|rng| rng.range(1, 100));
            self.pass(millis(pause)).await?;
            self.restart_if_ended(self.primary).await;
        }
        self.repair(self.primary);
        let until = Instant::now() + HEALED_WITHIN;
        let mut last = None;
        while Instant::now() < until {
            self.pass(millis(50)).await?;
            self.restart_if_ended(self.primary).await;
            last = self.status(self.primary).await;
            if last.as_ref().is_some_and(is_merged) {
                self.merging = false;
                return Ok(());
            }
        }
        Err(format!("liveness: not merged within {HEALED_WITHIN:?}: {last:?}"))
    }

    /// The old primary is stopped, one way or the other, and returns as a secondary.
    fn bring_back(&mut self, old: Side) {
        self.world.saw(Seen::Returned);
        self.second_guest_returns(old);
        self.roles[old] = Role::Secondary;
        self.returning[old] = true;
        let ended = self.processes[old].as_ref().is_none_or(|p| p.has_ended(&self.world));
        if !ended && self.world.with_rng(|rng| rng.chance(500)) {
            self.processes[old].as_ref().inspect(|process| process.ask_to_stop());
            self.lasts(Lasting::Stopping(old), 3000);
        } else {
            self.world.kill(old);
        }
        self.peer_known[self.primary] |= self.processes[self.primary].is_none();
        if !self.peer_known[self.primary] {
            self.lasts(Lasting::PeerCleared, 100);
        }
    }

    /// Why a side did not start, and what its operator does about it.
    pub(crate) fn read_refusal(&mut self, side: Side, why: &str) {
        if why.contains("nothing is to be discarded here")
            || why.contains("the merge has not ended")
        {
            self.returning[side] = false;
        }
        self.forget_given(side, why);
    }
}

/// Whether no disk is to be merged any more.
fn is_merged(status: &Value) -> bool {
    let merged = |disk: &Value| disk["merging"].is_null() && disk["state"] != "promoting";
    status["disks"].as_array().is_some_and(|disks| disks.iter().all(merged))
}
