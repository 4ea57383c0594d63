//! One history: a pair, its guest, and what happens to them.

use std::sync::Arc;
use std::time::Duration;

use brep_replication::config::Ack;
use serde_json::Value;
use tokio::time::Instant;

use crate::file::SECTOR;
use crate::guest::Guest;
use crate::model::{Model, fill, stamps};
use crate::names::File;
use crate::network::{GUEST_PORT, reach};
use crate::rng::Rng;
use crate::side::{Process, Setup, disk_name};
use crate::watch::Watch;
use crate::world::{A, B, DiskFaults, End, Side, World, name};

/// What a history has at least.
const REQUESTS_MIN: u64 = 200;
const CHECKPOINTS_MIN: u64 = 5;
const FAULTS_MIN: u64 = 3;

/// Steps until it ends although it has not had all that.
const STEPS_MAX: u64 = 2000;

pub(crate) fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// A fault that ends at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lasting {
    LinkDown,
    Stalled(Side),
    Disk(Side),
    Dead(Side),
    Stopping(Side),
    Stopped,
}

/// What is going on.
pub(crate) struct History {
    pub(crate) world: Arc<World>,
    pub(crate) setup: Setup,
    pub(crate) guest: Arc<Guest>,
    pub(crate) processes: [Option<Process>; 2],
    pub(crate) watch: Watch,
    lasting: Vec<(Instant, Lasting)>,
    pub(crate) faults: u64,
    usual_delay_ms: u64,
    usual_disk: DiskFaults,
    /// Steps in a thousand at which something happens.
    unrest: u64,
}

fn setup(rng: &mut Rng) -> Setup {
    Setup {
        disks: if rng.chance(400) { 2 } else { 1 },
        disk_bytes: rng.pick(&[256 << 10, 512 << 10, 1 << 20]),
        ack: if rng.chance(600) { Ack::Sync } else { Ack::Async },
        peer_timeout: millis(rng.range(200, 1500)),
        checkpoint_interval: (!rng.chance(200)).then(|| millis(rng.range(10, 200))),
        window_bytes: rng.pick(&[64 << 10, 256 << 10, 4 << 20]),
        window_requests: rng.pick(&[4, 16, 256]),
    }
}

impl History {
    pub(crate) fn new(world: &Arc<World>) -> Self {
        world.begin();
        let (setup, usual_delay_ms, usual_disk) = world.with_rng(|rng| {
            let slow = rng.pick(&[0, 0, 20, 200]);
            let disk = DiskFaults { slow, slow_ms_max: rng.range(0, 6), ..DiskFaults::default() };
            (setup(rng), rng.pick(&[0, 0, 1, 4]), disk)
        });
        world.note(|| format!("{setup:?}, link {usual_delay_ms} ms, {usual_disk:?}"));
        let mut contents = Vec::new();
        let mut stamp = 0;
        for disk in 0..setup.disks {
            let sectors = setup.disk_bytes / SECTOR;
            let mut first = Vec::new();
            let mut data = Vec::new();
            for sector in 0..sectors {
                let filled = world.with_rng(|rng| rng.chance(200));
                stamp += u64::from(filled);
                let own = if filled { stamp } else { 0 };
                first.push(own);
                data.extend(fill(disk, sector, 1, own));
            }
            contents.push(first);
            put_file(world, A, disk, &data);
            // Whatever was there before.
            put_file(world, B, disk, &vec![0xEE; setup.disk_bytes as usize]);
        }
        let guest = Guest::new(world, &setup, Model::new(&contents), stamp);
        guest.plug(reach(A, None, GUEST_PORT));
        {
            let mut inner = world.lock();
            inner.link.delay_ms_max = usual_delay_ms;
            inner.machines[A].faults = usual_disk.clone();
            inner.machines[B].faults = usual_disk.clone();
        }
        History {
            world: Arc::clone(world),
            setup,
            guest,
            processes: [None, None],
            watch: Watch::default(),
            lasting: Vec::new(),
            faults: 0,
            usual_delay_ms,
            usual_disk,
            unrest: world.with_rng(|rng| rng.pick(&[100, 200, 300])),
        }
    }

    /// Lives through it, and checks what is left at the end.
    pub(crate) async fn run(mut self) -> Result<(), String> {
        let first = self.world.with_rng(|rng| rng.below(2)) as Side;
        self.start(first);
        self.start(1 - first);
        let workers = self.world.with_rng(|rng| rng.range(2, 6));
        let pause_ms_max = self.world.with_rng(|rng| rng.pick(&[20, 60, 100]));
        for _ in 0..workers {
            tokio::spawn(Arc::clone(&self.guest).work(pause_ms_max));
        }
        let wanted = self.world.with_rng(|rng| rng.range(REQUESTS_MIN, REQUESTS_MIN * 3 / 2));
        for _ in 0..STEPS_MAX {
            let enough = self.guest.requests() >= wanted
                && self.watch.checkpoints() >= CHECKPOINTS_MIN
                && self.faults >= FAULTS_MIN;
            if enough {
                self.world.count("history: of full length");
                break;
            }
            self.step().await?;
        }
        let promote = self.world.with_rng(|rng| rng.chance(500));
        let outcome = if promote { self.fail_over().await } else { self.heal().await };
        self.guest.end();
        outcome
    }

    /// Time passes, and something may happen.
    async fn step(&mut self) -> Result<(), String> {
        let pause = self.world.with_rng(|rng| rng.range(1, 40));
        self.pass(millis(pause)).await?;
        self.end_lasting();
        let act = self.world.with_rng(|rng| rng.chance(self.unrest));
        if act {
            self.act().await;
        }
        Ok(())
    }

    /// Lets time pass; whatever is noticed meanwhile is taken down.
    pub(crate) async fn pass(&mut self, time: Duration) -> Result<(), String> {
        let until = Instant::now() + time;
        loop {
            self.watch.look(&self.world, &mut self.processes).await;
            if let Some(violation) = self.world.lock().violation.clone() {
                return Err(violation);
            }
            if Instant::now() >= until {
                return Ok(());
            }
            tokio::time::sleep(millis(3)).await;
        }
    }

    pub(crate) fn start(&mut self, side: Side) {
        self.watch.forget(side);
        self.processes[side] = Some(Process::start(&self.world, &self.setup, side));
    }

    fn lasts(&mut self, what: Lasting, ms_max: u64) {
        let ms = self.world.with_rng(|rng| rng.range(1, ms_max));
        self.lasting.push((Instant::now() + millis(ms), what));
    }

    fn fault(&mut self, what: &str) {
        self.faults += 1;
        self.world.count(&format!("fault: {what}"));
        self.world.note(|| format!("fault: {what}"));
    }

    async fn act(&mut self) {
        let (choice, side) = self.world.with_rng(|rng| (rng.below(100), rng.below(2) as Side));
        match choice {
            0..25 => self.ask_for_checkpoint(side),
            25..32 => {
                self.fault("link cut");
                self.world.cut_link();
            }
            32..39 => {
                self.fault("link down");
                self.world.cut_link();
                self.world.set_link(|link| link.down = true);
                self.lasts(Lasting::LinkDown, 800);
            }
            39..49 => {
                self.fault("one-way loss");
                self.world.set_link(|link| link.stalled[side] = true);
                self.lasts(Lasting::Stalled(side), 2000);
            }
            49..59 => {
                self.fault("kill");
                self.world.note(|| format!("{} is killed", name(side)));
                self.world.kill(side);
            }
            59..72 => {
                let operations = self.world.with_rng(|rng| {
                    let most = rng.pick(&[10, 100, 1000]);
                    rng.below(most)
                });
                self.fault("kill in an operation");
                self.world.lock().machines[side].ends_in = Some((operations, End::Kill));
            }
            72..77 => self.stop_cleanly(side),
            77..84 => {
                self.fault("failing disk");
                let failing = self.world.with_rng(|rng| rng.pick(&[5, 30, 200, 1000]));
                self.world.lock().machines[side].faults.failing = failing;
                self.lasts(Lasting::Disk(side), 200);
            }
            84..90 => {
                self.fault("hanging disk");
                self.world.lock().machines[side].faults.hanging = true;
                self.lasts(Lasting::Disk(side), 2500);
            }
            90..95 => {
                self.fault("full disk");
                self.world.lock().machines[side].faults.full = true;
                self.lasts(Lasting::Disk(side), 1000);
            }
            95..97 => self.stop_replication().await,
            97..99 => {
                self.world.count("command: resync --full");
                let full = [("full", Value::Bool(true))];
                self.tell(A, "resync", &full).await;
            }
            _ => {
                self.world.count("command: stop --discard-checkpoint");
                let discard = [("discard-checkpoint", Value::Bool(true))];
                self.watch.checkpoint_discarded();
                self.tell(B, "replication-stop", &discard).await;
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
        let process = self.processes[side].as_ref()?;
        let limit = millis(20_000);
        let told = tokio::time::timeout(limit, process.command(command, arguments)).await.ok()?;
        let short = match &told {
            Ok(value) => value.to_string().chars().take(100).collect(),
            Err(error) => error.clone(),
        };
        self.world.note(|| format!("{}: {command}: {short}", name(side)));
        Some(told)
    }

    fn ask_for_checkpoint(&mut self, side: Side) {
        self.world.count(&format!("command: checkpoint on {}", name(side)));
        let Some(control) = self.processes[side].as_ref().and_then(Process::control) else {
            return;
        };
        let (world, seen) = (Arc::clone(&self.world), self.watch.asked());
        tokio::spawn(async move {
            let asked = world.tick();
            let answer = control.handler.execute("checkpoint", serde_json::Map::new()).await;
            if let Ok(answer) = answer
                && let Some(epoch) = answer["epoch"].as_u64()
            {
                world.note(|| format!("checkpoint {epoch}, asked for at {asked}"));
                seen.lock().expect("one thread").push((epoch, asked));
            }
        });
    }

    fn stop_cleanly(&mut self, side: Side) {
        self.world.count(&format!("command: clean stop of {}", name(side)));
        let Some(process) = &self.processes[side] else { return };
        self.world.note(|| format!("{} is stopped", name(side)));
        process.ask_to_stop();
        self.lasts(Lasting::Stopping(side), 2000);
    }

    async fn stop_replication(&mut self) {
        self.world.count("command: stop and start");
        let off = [("enable", Value::Bool(false)), ("primary", Value::Bool(true))];
        self.tell(A, "xen-set-replication", &off).await;
        self.lasts(Lasting::Stopped, 500);
    }

    fn end_lasting(&mut self) {
        let now = Instant::now();
        let over: Vec<_> = self.lasting.extract_if(.., |(end, _)| *end <= now).collect();
        for (_, what) in over {
            self.undo(what);
        }
        for side in [A, B] {
            let ended = self.processes[side].as_ref().is_none_or(|p| p.has_ended(&self.world));
            let known = self.lasting.iter().any(|(_, what)| *what == Lasting::Dead(side));
            if ended && !known {
                self.lasts(Lasting::Dead(side), 400);
            }
        }
    }

    fn undo(&mut self, what: Lasting) {
        self.world.note(|| format!("over: {what:?}"));
        match what {
            Lasting::LinkDown => self.world.set_link(|link| link.down = false),
            Lasting::Stalled(side) => self.world.set_link(|link| link.stalled[side] = false),
            Lasting::Disk(side) => {
                self.world.lock().machines[side].faults = self.usual_disk.clone();
            }
            Lasting::Dead(side) => self.restart_if_ended(side),
            // It may hang, with its disk or its peer.
            Lasting::Stopping(side) => self.world.kill(side),
            Lasting::Stopped => self.start_replication(),
        }
    }

    pub(crate) fn restart_if_ended(&mut self, side: Side) {
        if let Some(process) = &self.processes[side]
            && !process.has_ended(&self.world)
        {
            return;
        }
        if self.processes[side].take().is_some() {
            self.world.kill(side);
        }
        self.world.count(&format!("restart of {}", name(side)));
        self.start(side);
    }

    fn start_replication(&mut self) {
        if let Some(control) = self.processes[A].as_ref().and_then(Process::control) {
            tokio::spawn(async move {
                let _ = control.handler.execute("replication-start", serde_json::Map::new()).await;
            });
        }
    }

    /// Nothing is wrong any more but what has happened.
    pub(crate) fn clear_faults(&mut self) {
        self.world.note(|| "everything is repaired".to_owned());
        self.lasting.clear();
        let delay = self.usual_delay_ms;
        self.world.set_link(|link| {
            link.stalled = [false; 2];
            link.down = false;
            link.delay_ms_max = delay;
        });
        let usual = self.usual_disk.clone();
        let mut world = self.world.lock();
        for machine in &mut world.machines {
            machine.faults = usual.clone();
            machine.ends_in = None;
        }
    }

    /// What a disk's file holds, by sector.
    pub(crate) fn file_stamps(&self, side: Side, disk: usize) -> Result<Vec<u64>, String> {
        let name = format!("{}.raw", disk_name(disk));
        let file = self.world.lock().machines[side].names.get(&name).cloned();
        let file = file.ok_or_else(|| format!("{name} is gone"))?;
        let file = file.lock().expect("one thread");
        stamps(disk, &file.data)
    }
}

pub(crate) fn put_file(world: &World, side: Side, disk: usize, data: &[u8]) {
    let file = File::default();
    {
        let mut file = file.lock().expect("one thread");
        file.write(0, data);
        file.sync();
    }
    let names = &mut world.lock().machines[side].names;
    names.make(&format!("{}.raw", disk_name(disk)), &file);
    names.sync("");
}
