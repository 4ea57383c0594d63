//! One history: a pair, its guest, and what happens to them.

use std::sync::Arc;
use std::time::Duration;

use brep_nbd::Endpoint;
use brep_replication::config::{Ack, Durability, OnPeerLost, OnSlowPeer, Role};
use tokio::time::Instant;

use crate::acts::Lasting;
use crate::added::Added;
use crate::features::Features;
use crate::file::SECTOR;
use crate::guest::Guest;
use crate::model::{Model, fill, stamps};
use crate::names::File;
use crate::network::{GUEST_PORT, REPLICA_PORT, reach};
use crate::quorum;
use crate::rng::Rng;
use crate::second::{Read, SecondGuest};
use crate::seen::Seen;
use crate::side::{Process, Setup, Start, file_name};
use crate::test_view::TestView;
use crate::watch::Watch;
use crate::world::{A, B, DiskFaults, Side, World, name};

/// What a history has at least.
const REQUESTS_MIN: u64 = 200;
const CHECKPOINTS_MIN: u64 = 5;
const FAULTS_MIN: u64 = 3;

/// Steps in which it has to have had all that. From then on faults and checkpoints are asked for
/// until it has.
const STEPS_MAX: u64 = 2000;

/// Steps with nothing but what is missing.
const STEPS_MORE: u64 = 2000;

pub(crate) fn millis(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

/// What is going on.
pub(crate) struct History {
    pub(crate) world: Arc<World>,
    pub(crate) features: Features,
    pub(crate) setup: Setup,
    pub(crate) guest: Arc<Guest>,
    pub(crate) added: Added,
    /// The guest of machine B while that is the secondary.
    pub(crate) second: Option<Arc<SecondGuest>>,
    /// The last view of a checkpoint that was opened.
    pub(crate) test: Option<TestView>,
    pub(crate) processes: [Option<Process>; 2],
    /// The side that its operator takes for the primary.
    pub(crate) primary: Side,
    /// As what each side is started.
    pub(crate) roles: [Role; 2],
    pub(crate) peer_known: [bool; 2],
    /// What a side wrote as a primary may be given up.
    pub(crate) returning: [bool; 2],
    /// The boot of each machine at the last start of a process.
    boots: [u32; 2],
    pub(crate) watch: Watch,
    pub(crate) lasting: Vec<(Instant, Lasting)>,
    pub(crate) faults: u64,
    pub(crate) promotions: u64,
    /// The guest's knowledge of the disk that it had before the last one.
    pub(crate) left: Option<Model>,
    /// The last one was to the newest state.
    pub(crate) promoted_to_latest: bool,
    /// What the guest writes goes to an image over the disk.
    pub(crate) merging: bool,
    pub(crate) usual_delay_ms: u64,
    pub(crate) usual_disk: DiskFaults,
    /// Steps in a thousand at which something happens.
    unrest: u64,
    /// When a manager takes its next checkpoint.
    next_checkpoint: Instant,
}

fn setup(rng: &mut Rng, features: Features) -> Setup {
    let mut setup = Setup {
        disks: if rng.chance(400) { 2 } else { 1 },
        disk_bytes: rng.pick(&[256 << 10, 256 << 10, 512 << 10, 1 << 20]),
        ack: [if rng.chance(600) { Ack::Sync } else { Ack::Async }; 2],
        peer_timeout: millis(rng.range(200, 1500)),
        checkpoint_interval: (!rng.chance(200)).then(|| millis(rng.range(10, 200))),
        window_bytes: rng.pick(&[64 << 10, 256 << 10, 4 << 20]),
        window_requests: rng.pick(&[4, 16, 256]),
        durability: [if rng.chance(700) { Durability::Power } else { Durability::Process }; 2],
        on_peer_lost: [if rng.chance(200) { OnPeerLost::Suspend } else { OnPeerLost::Degrade }; 2],
        on_slow_peer: if rng.chance(500) { OnSlowPeer::PullAhead } else { OnSlowPeer::Lost },
        slow_peer_limit: rng.chance(300).then(|| millis(rng.range(100, 1000))),
        second_guest: features.second_guest,
    };
    if features.mixed {
        setup.mix();
    }
    setup
}

impl History {
    pub(crate) fn new(world: &Arc<World>, seed: u64) -> Self {
        world.begin();
        let features = Features::of(seed);
        let (setup, usual_delay_ms, usual_disk) = world.with_rng(|rng| {
            let slow = rng.pick(&[0, 0, 20, 200]);
            let disk = DiskFaults { slow, slow_ms_max: rng.range(0, 6), ..DiskFaults::default() };
            (setup(rng, features), rng.pick(&[0, 0, 1, 4]), disk)
        });
        if features.mixed {
            world.saw(Seen::MixedSides);
        }
        world.note(|| format!("{features:?}, {setup:?}, link {usual_delay_ms} ms, {usual_disk:?}"));
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
            match features.quorum {
                true => quorum::children(&file_name(disk)).iter().for_each(|child| {
                    put_named(world, A, child, &data);
                }),
                false => put_file(world, A, disk, &data),
            }
            // Whatever was there before.
            put_file(world, B, disk, &vec![0xEE; setup.disk_bytes as usize]);
        }
        let guest = Guest::new(world, setup.disks, Model::new(&contents), stamp);
        guest.plug(reach(A, None, GUEST_PORT));
        let added = Added::new(setup.disks);
        let second = setup.second_guest.then(|| SecondGuest::new(world, &setup));
        {
            let mut inner = world.lock();
            inner.link.delay_ms_max = usual_delay_ms;
            inner.machines[A].faults = usual_disk.clone();
            inner.machines[B].faults = usual_disk.clone();
        }
        History {
            world: Arc::clone(world),
            features,
            setup,
            guest,
            added,
            second,
            test: None,
            processes: [None, None],
            primary: A,
            roles: [Role::Primary, Role::Secondary],
            peer_known: [true, world.with_rng(|rng| rng.chance(500))],
            returning: [false; 2],
            boots: [0; 2],
            watch: Watch::default(),
            lasting: Vec::new(),
            faults: 0,
            promotions: 0,
            left: None,
            promoted_to_latest: false,
            merging: false,
            usual_delay_ms,
            usual_disk,
            unrest: world.with_rng(|rng| rng.pick(&[100, 200, 300])),
            next_checkpoint: Instant::now(),
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
        if let Some(second) = &self.second {
            tokio::spawn(Arc::clone(second).work(pause_ms_max));
        }
        let outcome = self.live().await;
        self.guest.pace.end();
        self.second.iter().for_each(|second| second.pace.end());
        outcome
    }

    async fn live(&mut self) -> Result<(), String> {
        // One that has more costs more.
        let most = if self.features.any() { REQUESTS_MIN } else { REQUESTS_MIN * 3 / 2 };
        let wanted = self.world.with_rng(|rng| rng.range(REQUESTS_MIN, most));
        let changes = self.world.with_rng(|rng| rng.pick(&[0, 0, 0, 1, 1, 2, 3]));
        for change in 0..changes {
            let requests = wanted * (change + 1) / (changes + 1);
            self.until(requests, 0, 0).await?;
            self.change_roles().await?;
        }
        self.until(wanted, CHECKPOINTS_MIN, FAULTS_MIN).await?;
        let promote = self.world.with_rng(|rng| rng.chance(500));
        if promote { self.end_promoted().await } else { self.heal().await }
    }

    /// Until so much has happened.
    async fn until(&mut self, requests: u64, checkpoints: u64, faults: u64) -> Result<(), String> {
        for step in 0..STEPS_MAX + STEPS_MORE {
            let enough = [
                self.guest.requests() >= requests,
                self.watch.checkpoints() >= checkpoints,
                self.faults >= faults,
            ];
            if enough == [true; 3] {
                return Ok(());
            }
            let pause = self.world.with_rng(|rng| rng.range(1, 40));
            self.pass(millis(pause)).await?;
            self.end_lasting().await;
            self.manage()?;
            if step < STEPS_MAX {
                if self.world.with_rng(|rng| rng.chance(self.unrest)) {
                    self.act().await;
                }
                continue;
            }
            self.mend(enough, step).await?;
        }
        Err(format!(
            "history: only {} of {requests} requests, {} of {checkpoints} checkpoints, {} of \
             {faults} faults",
            self.guest.requests(),
            self.watch.checkpoints(),
            self.faults
        ))
    }

    /// Where a guest runs on the secondary, the primary takes no checkpoints by itself: a manager does.
    /// What was read of checkpoints is looked at.
    fn manage(&mut self) -> Result<(), String> {
        self.check_test()?;
        let Some(second) = &self.second else { return Ok(()) };
        let left = second.take_left();
        if let Some(pause) = self.setup.checkpoint_interval
            && Instant::now() >= self.next_checkpoint
        {
            self.next_checkpoint = Instant::now() + pause;
            self.ask_for_checkpoint(self.primary);
        }
        self.check_reads(left)
    }

    /// What the secondary's guest has read of a checkpoint is of one moment, and no later one.
    pub(crate) fn check_reads(&self, reads: Vec<Read>) -> Result<(), String> {
        for Read { epoch, until, sectors } in reads {
            let (from, to) = self.watch.moments(epoch, until);
            let checked =
                self.guest.model().check_moment(sectors.into_iter(), (from, to.min(until)));
            checked.map_err(|why| {
                format!("I2, I6: the secondary's guest, at checkpoint {epoch}: {why}")
            })?;
        }
        Ok(())
    }

    /// Sees to what a history lacks.
    async fn mend(&mut self, enough: [bool; 3], step: u64) -> Result<(), String> {
        if !enough[0] || !enough[1] {
            if step.is_multiple_of(200) {
                self.clear_faults().await;
                self.until_in_sync().await?;
            }
            if !enough[1] {
                self.tell(self.primary, "checkpoint", &[]).await;
            }
            return Ok(());
        }
        let side = self.world.with_rng(|rng| rng.below(2)) as Side;
        self.some_fault(side);
        Ok(())
    }

    /// Lets time pass; whatever is noticed meanwhile is taken down.
    pub(crate) async fn pass(&mut self, time: Duration) -> Result<(), String> {
        let until = Instant::now() + time;
        loop {
            self.watch.look(&self.world, &self.processes, self.primary).await;
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
        self.watch.forget(side, self.primary);
        let boot = self.world.lock().machines[side].boot;
        if std::mem::replace(&mut self.boots[side], boot) != boot {
            if side == self.primary {
                let now = self.world.tick();
                self.guest.model().power_lost(now, self.merging);
            }
            if side == B {
                self.second.iter().for_each(|second| second.power_lost());
            }
        }
        self.make_children_equal(side);
        let how = Start {
            role: self.roles[side],
            disks: self.given_disks(side),
            knows_peer: self.peer_known[side],
            discard_local: self.returning[side],
        };
        self.processes[side] = Some(Process::start(&self.world, &self.setup, side, how));
    }

    pub(crate) async fn restart_if_ended(&mut self, side: Side) {
        if let Some(process) = &self.processes[side]
            && !process.has_ended(&self.world)
        {
            return;
        }
        if let Some(mut process) = self.processes[side].take() {
            self.world.kill(side);
            if let Err(why) = process.ended().await {
                self.world.note(|| format!("{} had ended: {why}", name(side)));
                self.read_refusal(side, &why);
            }
        }
        self.world.count(&format!("restart of {}", name(side)));
        self.start(side);
    }

    /// Where the guests of a side that is the primary connect.
    pub(crate) fn guest_endpoint(&self, side: Side) -> Endpoint {
        let own = self.roles[side] == Role::Primary || self.setup.second_guest && side == B;
        reach(side, None, if own { GUEST_PORT } else { REPLICA_PORT })
    }

    /// What a disk's file holds, by sector.
    pub(crate) fn file_stamps(&self, side: Side, disk: usize) -> Result<Vec<u64>, String> {
        let name = file_name(disk);
        let file = self.world.lock().machines[side].names.get(&name).cloned();
        let file = file.map_or_else(|| self.good_child(side, disk), |file| Ok(Some(file)))?;
        let file = file.ok_or_else(|| format!("{name} is gone"))?;
        let file = file.lock().expect("one thread");
        Ok(stamps(disk, &file.data))
    }
}

pub(crate) fn put_file(world: &World, side: Side, disk: usize, data: &[u8]) {
    put_named(world, side, &file_name(disk), data);
}

fn put_named(world: &World, side: Side, name: &str, data: &[u8]) {
    let file = File::default();
    {
        let mut file = file.lock().expect("one thread");
        file.write(0, data);
        file.sync();
    }
    let names = &mut world.lock().machines[side].names;
    names.make(name, &file);
    names.sync("");
}
