//! What happens to a pair: faults, and commands of its operator.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};
use tokio::time::Instant;

use crate::history::{History, millis};
use crate::network::{REPLICA_PORT, reach};
use crate::seen::Seen;
use crate::side::{Process, disk_name};
use crate::world::{A, B, DiskFaults, End, Side, name};

/// A fault, or something that a command has begun, that ends at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lasting {
    LinkDown,
    SlowLink,
    Stalled(Side),
    Disk(Side),
    Dead(Side),
    Stopping(Side),
    Stopped,
    GuestStopped,
    PeerCleared,
    Slowed,
    Child,
}

/// The longest that anybody waits for a command.
const COMMAND_LIMIT: Duration = Duration::from_secs(20);

/// By how much a disk grows.
const GROWTH_BYTES: u64 = 64 << 10;

type Weighed = (u64, fn(&mut History, Side));

/// What happens by itself.
const FAULTS: [Weighed; 10] = [
    (10, |history, _| history.link_cut()),
    (10, |history, _| history.link_down()),
    (12, |history, side| history.one_way_loss(side)),
    (6, |history, _| history.slow_link()),
    (12, |history, side| history.kill(side)),
    (18, |history, side| history.end_in_operation(side)),
    (10, |history, side| history.lose_power(side)),
    (9, |history, side| history.failing_disk(side)),
    (8, |history, side| history.hanging_disk(side)),
    (6, |history, side| history.full_disk(side)),
];

/// Whether a reason or an advice asks for a restart of the side that gives it.
pub(crate) fn wants_restart(text: &str) -> bool {
    ["restart brep", "restart this side", "start this side again"]
        .iter()
        .any(|ask| text.contains(ask))
}

impl History {
    pub(crate) fn lasts(&mut self, what: Lasting, ms_max: u64) {
        let ms = self.world.with_rng(|rng| rng.range(1, ms_max));
        self.lasting.push((Instant::now() + millis(ms), what));
    }

    pub(crate) fn fault(&mut self, what: Seen) {
        self.faults += 1;
        self.world.saw(what);
        self.world.note(|| what.name().to_owned());
    }

    /// Something happens.
    pub(crate) async fn act(&mut self) {
        if self.features.tests && self.world.with_rng(|rng| rng.chance(60)) {
            return self.open_test().await;
        }
        if self.features.disks && self.world.with_rng(|rng| rng.chance(60)) {
            return self.change_disks().await;
        }
        if self.features.quorum && self.world.with_rng(|rng| rng.chance(100)) {
            return self.bad_child();
        }
        let (choice, side) = self.world.with_rng(|rng| (rng.below(1000), rng.below(2) as Side));
        match choice {
            0..250 => self.ask_for_checkpoint(side),
            250..720 => self.some_fault(side),
            _ => self.command(side).await,
        }
    }

    /// A fault, by weight.
    pub(crate) fn some_fault(&mut self, side: Side) {
        let total = FAULTS.iter().map(|(weight, _)| weight).sum();
        let mut left = self.world.with_rng(|rng| rng.below(total));
        for (weight, fault) in FAULTS {
            match left.checked_sub(weight) {
                Some(rest) => left = rest,
                None => return fault(self, side),
            }
        }
    }

    fn link_cut(&mut self) {
        self.fault(Seen::LinkCut);
        self.world.cut_link();
    }

    fn link_down(&mut self) {
        self.fault(Seen::LinkDown);
        self.world.cut_link();
        self.world.set_link(|link| link.down = true);
        self.lasts(Lasting::LinkDown, 800);
    }

    fn one_way_loss(&mut self, side: Side) {
        self.fault(Seen::OneWayLoss);
        self.world.set_link(|link| link.stalled[side] = true);
        self.lasts(Lasting::Stalled(side), 2000);
    }

    fn slow_link(&mut self) {
        self.fault(Seen::SlowLink);
        let delay = self.world.with_rng(|rng| rng.pick(&[20, 100, 400]));
        self.world.set_link(|link| link.delay_ms_max = delay);
        self.lasts(Lasting::SlowLink, 1500);
    }

    fn kill(&mut self, side: Side) {
        self.fault(Seen::Kill);
        self.world.note(|| format!("{} is killed", name(side)));
        self.world.kill(side);
    }

    fn lose_power(&mut self, side: Side) {
        if !self.setup.loses_power(side) {
            return self.kill(side);
        }
        self.fault(Seen::PowerLoss);
        self.world.end(side, End::PowerLoss);
    }

    fn end_in_operation(&mut self, side: Side) {
        let end = self.some_end(side);
        self.fault(match end {
            End::Kill => Seen::KillInOperation,
            End::PowerLoss => Seen::PowerLossInOperation,
        });
        self.arm(side, end, &[10, 100, 1000]);
    }

    /// How a process ends in this history.
    pub(crate) fn some_end(&self, side: Side) -> End {
        let power = self.setup.loses_power(side) && self.world.with_rng(|rng| rng.chance(500));
        if power { End::PowerLoss } else { End::Kill }
    }

    /// The same of one whose disk is not merged. Where a guest has written to a buffer, what a later
    /// one did not flush may read as that after a loss of power.
    pub(crate) fn end_of_promoted(&self) -> End {
        if self.second.is_some() { End::Kill } else { self.some_end(self.primary) }
    }

    /// A process ends in one of its next operations.
    pub(crate) fn arm(&self, side: Side, end: End, most: &[u64]) {
        let operations = self.world.with_rng(|rng| {
            let most = rng.pick(most);
            rng.below(most)
        });
        self.world.lock().machines[side].ends_in = Some((operations, end));
    }

    fn failing_disk(&mut self, side: Side) {
        self.fault(Seen::FailingDisk);
        let failing = self.world.with_rng(|rng| rng.pick(&[5, 30, 200, 1000]));
        self.world.lock().machines[side].faults.failing = failing;
        self.lasts(Lasting::Disk(side), 200);
    }

    fn hanging_disk(&mut self, side: Side) {
        self.fault(Seen::HangingDisk);
        self.world.lock().machines[side].faults.hanging = true;
        self.lasts(Lasting::Disk(side), 2500);
    }

    fn full_disk(&mut self, side: Side) {
        self.fault(Seen::FullDisk);
        self.world.lock().machines[side].faults.full = true;
        self.lasts(Lasting::Disk(side), 1000);
    }

    async fn command(&mut self, side: Side) {
        let choice = self.world.with_rng(|rng| rng.below(100));
        let primary = self.primary;
        match choice {
            0..20 => self.stop_cleanly(side),
            20..30 => self.stop_replication().await,
            30..38 => {
                self.world.saw(Seen::ResyncFull);
                self.tell(primary, "resync", &[("full", Value::Bool(true))]).await;
            }
            38..46 => {
                self.world.saw(Seen::ResyncCompare);
                self.tell(primary, "resync", &[("compare", Value::Bool(true))]).await;
            }
            46..54 => {
                self.world.saw(Seen::ResyncRate);
                let rate = self.world.with_rng(|rng| rng.pick(&[100_000, 1_000_000, 0]));
                self.tell(primary, "resync", &[("rate", json!(rate))]).await;
                self.lasts(Lasting::Slowed, 2000);
            }
            54..57 => {
                self.world.saw(Seen::DiscardCheckpoint);
                // It may be carried out and not answered.
                self.watch.checkpoint_discarded();
                let discard = [("discard-checkpoint", Value::Bool(true))];
                let told = self.tell(1 - primary, "replication-stop", &discard).await;
                if let Some(Ok(_)) = told {
                    // What was committed before it was carried out went with the others.
                    self.watch.look(&self.world, &self.processes, primary).await;
                    self.watch.checkpoint_discarded();
                }
            }
            57..66 => {
                self.world.saw(Seen::StopAndContGuest);
                self.tell(primary, "stop", &[]).await;
                self.lasts(Lasting::GuestStopped, 300);
            }
            66..74 => {
                self.world.saw(Seen::Yank);
                self.yank().await;
            }
            74..82 => {
                self.world.saw(Seen::PeerClear);
                if let Some(Ok(_)) = self.tell(primary, "peer-clear", &[]).await {
                    self.peer_known[primary] = false;
                }
                self.lasts(Lasting::PeerCleared, 500);
            }
            82..90 => self.grow().await,
            _ => {
                self.world.saw(Seen::ResumeLonely);
                self.tell(primary, "resume", &[("lonely", Value::Bool(true))]).await;
            }
        }
    }

    /// Says a command, and does not wait for ever.
    pub(crate) async fn tell(
        &mut self,
        side: Side,
        command: &str,
        arguments: &[(&str, Value)],
    ) -> Option<Result<Value, String>> {
        // A process that has ended answers nobody, whatever is left of it here.
        let process = self.processes[side].as_ref().filter(|p| !p.has_ended(&self.world))?;
        let told = process.command(command, arguments);
        let told = tokio::time::timeout(COMMAND_LIMIT, told).await.ok()?;
        let short = match &told {
            Ok(value) => value.to_string().chars().take(100).collect(),
            Err(error) => error.clone(),
        };
        self.world.note(|| format!("{}: {command}: {short}", name(side)));
        Some(told)
    }

    /// The same, by an operator who does what he is told.
    pub(crate) async fn tell_and_obey(
        &mut self,
        side: Side,
        command: &str,
        arguments: &[(&str, Value)],
    ) {
        let told = self.tell(side, command, arguments).await;
        if let Some(Err(why)) = told
            && wants_restart(&why)
        {
            self.world.count("advice: restart");
            self.world.kill(side);
        }
    }

    pub(crate) fn ask_for_checkpoint(&mut self, side: Side) {
        self.world.saw(match side == self.primary {
            true => Seen::CheckpointOnPrimary,
            false => Seen::CheckpointOnSecondary,
        });
        let process = self.processes[side].as_ref().filter(|p| !p.has_ended(&self.world));
        let Some(control) = process.and_then(Process::control) else { return };
        let (world, seen) = (Arc::clone(&self.world), self.watch.asked());
        tokio::spawn(async move {
            let asked = world.tick();
            let answer = control.handler.execute("checkpoint", Map::new()).await;
            if let Ok(answer) = answer
                && let Some(epoch) = answer["epoch"].as_u64()
            {
                world.note(|| format!("checkpoint {epoch}, asked for at {asked}"));
                seen.lock().expect("one thread").push((epoch, asked));
            }
        });
    }

    fn stop_cleanly(&mut self, side: Side) {
        self.world.saw(match side == self.primary {
            true => Seen::CleanStopOfPrimary,
            false => Seen::CleanStopOfSecondary,
        });
        let Some(process) = &self.processes[side] else { return };
        self.world.note(|| format!("{} is stopped", name(side)));
        process.ask_to_stop();
        self.lasts(Lasting::Stopping(side), 2000);
    }

    async fn stop_replication(&mut self) {
        self.world.saw(Seen::StopAndStart);
        let off = [("enable", Value::Bool(false)), ("primary", Value::Bool(true))];
        self.tell(self.primary, "xen-set-replication", &off).await;
        self.lasts(Lasting::Stopped, 500);
    }

    async fn yank(&mut self) {
        let Some(Ok(instances)) = self.tell(self.primary, "query-yank", &[]).await else { return };
        self.tell(self.primary, "yank", &[("instances", instances)]).await;
    }

    async fn grow(&mut self) {
        if self.features.quorum {
            // A quorum does not.
            return;
        }
        self.world.saw(Seen::Resize);
        let disk = self.world.with_rng(|rng| rng.below(self.setup.disks as u64)) as usize;
        let bytes = self.guest.disk_bytes(disk) + GROWTH_BYTES;
        self.resize(disk, bytes).await;
    }

    pub(crate) async fn resize(&mut self, disk: usize, bytes: u64) {
        let arguments = [("device", json!(disk_name(disk))), ("size", json!(bytes))];
        if let Some(Ok(_)) = self.tell(self.primary, "block_resize", &arguments).await {
            self.guest.grow(disk, bytes);
        }
    }

    /// Tells a side where the other one is.
    pub(crate) async fn set_peer(&mut self, side: Side) {
        // At the next start, if not now.
        self.peer_known[side] = true;
        let Some(life) = self.processes[side].as_ref().map(|process| process.life) else { return };
        self.world.saw(Seen::PeerSet);
        let uri = format!("nbd://{}", reach(1 - side, Some(life), REPLICA_PORT));
        self.tell_and_obey(side, "peer-set", &[("uri", json!(uri))]).await;
    }

    pub(crate) async fn end_lasting(&mut self) {
        let now = Instant::now();
        let over: Vec<_> = self.lasting.extract_if(.., |(end, _)| *end <= now).collect();
        for (_, what) in over {
            self.undo(what).await;
        }
        for side in [A, B] {
            let ended = self.processes[side].as_ref().is_none_or(|p| p.has_ended(&self.world));
            let known = self.lasting.iter().any(|(_, what)| *what == Lasting::Dead(side));
            if ended && !known {
                self.lasts(Lasting::Dead(side), 400);
            }
        }
    }

    async fn undo(&mut self, what: Lasting) {
        self.world.note(|| format!("over: {what:?}"));
        match what {
            Lasting::LinkDown => self.world.set_link(|link| link.down = false),
            Lasting::SlowLink => {
                let delay = self.usual_delay_ms;
                self.world.set_link(|link| link.delay_ms_max = delay);
            }
            Lasting::Stalled(side) => self.world.end_stall(side),
            Lasting::Disk(side) => {
                self.world.lock().machines[side].faults = self.usual_disk.clone();
            }
            Lasting::Child => self.world.lock().machines[A].failing_child = 0,
            Lasting::Dead(side) => self.restart_if_ended(side).await,
            // It may hang, with its disk or its peer.
            Lasting::Stopping(side) => self.world.kill(side),
            Lasting::Stopped => self.start_replication(self.primary),
            Lasting::GuestStopped => drop(self.tell(self.primary, "cont", &[]).await),
            Lasting::PeerCleared => self.set_peer(self.primary).await,
            Lasting::Slowed => {
                self.tell(self.primary, "resync", &[("rate", json!(0))]).await;
            }
        }
    }

    fn start_replication(&self, side: Side) {
        if let Some(control) = self.processes[side].as_ref().and_then(Process::control) {
            tokio::spawn(async move {
                let _ = control.handler.execute("replication-start", Map::new()).await;
            });
        }
    }

    /// Nothing is wrong any more but what has happened.
    pub(crate) async fn clear_faults(&mut self) {
        self.world.note(|| "everything is repaired".to_owned());
        let lasting = std::mem::take(&mut self.lasting);
        let delay = self.usual_delay_ms;
        self.world.set_link(|link| {
            link.stalled = [false; 2];
            link.down = false;
            link.delay_ms_max = delay;
        });
        {
            let mut world = self.world.lock();
            for machine in &mut world.machines {
                machine.faults = self.usual_disk.clone();
                machine.failing_child = 0;
                machine.ends_in = None;
            }
        }
        for (end, what) in lasting {
            match what {
                // What only a command ends.
                Lasting::GuestStopped
                | Lasting::PeerCleared
                | Lasting::Slowed
                | Lasting::Stopped => self.undo(what).await,
                // No fault: what is asked of that side has to wait for it.
                Lasting::Stopping(_) => self.lasting.push((end, what)),
                _ => {}
            }
        }
    }

    /// A machine works as it should.
    pub(crate) fn repair(&self, side: Side) {
        let machine = &mut self.world.lock().machines[side];
        machine.faults = DiskFaults::default();
        machine.ends_in = None;
    }
}
