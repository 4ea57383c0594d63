//! The power of one machine goes under any operation of its: a piece of a pair's life, again and
//! again, with another operation each time.
//!
//! Random histories meet most of these moments at some time; here none is left out, and what has to
//! be there afterwards is known exactly.

mod pieces;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, CacheMode, FlushLevel, WriteFlags, ZeroFlags};
use brep_nbd::client::{ConnectOptions, Connection};
use brep_replication::config::{DiskConfig, DiskFormat, Durability, Role, SideConfig};
use bytes::Bytes;
use serde_json::Value;
use tokio::time::Instant;

use crate::campaign::in_world;
use crate::file::SECTOR;
use crate::history::put_file;
use crate::model::{fill, stamps};
use crate::network::{GUEST_PORT, REPLICA_PORT, listen_at, reach};
use crate::side::{Process, disk_name, disk_path, next_life};
use crate::world::{A, B, DiskFaults, End, Life, Side, World, name};

const DISK_BYTES: u64 = 192 << 10;

/// What a disk holds, by sector.
type Contents = Vec<u64>;

/// What anybody waits for at most, in simulated time.
const PATIENCE: Duration = Duration::from_secs(60);

/// Whether the operation went under.
type Done<T = ()> = Result<T, String>;

/// How a side runs: each may be the primary.
fn config(life: Life, role: Role, durability: Durability, discard_local: bool) -> SideConfig {
    let disk = DiskConfig {
        name: disk_name(0),
        path: disk_path(life, 0),
        format: DiskFormat::Raw,
        cache: CacheMode::Writeback,
        buffers: None,
    };
    let state_dir = format!("/{life}/state").into();
    let guest_listen = (role == Role::Primary).then(|| listen_at(life, GUEST_PORT));
    SideConfig {
        peer_timeout: Duration::from_millis(500),
        checkpoint_interval: None,
        durability,
        allow_plaintext: true,
        peer: Some(reach(1 - life.side, Some(life), REPLICA_PORT).into()),
        listen: Some(listen_at(life, REPLICA_PORT)),
        guest_listen,
        discard_local,
        ..SideConfig::new(role, name(life.side), state_dir, vec![disk])
    }
}

/// A pair, and what its guest knows.
struct Pair {
    world: Arc<World>,
    durability: Durability,
    processes: [Option<Process>; 2],
    /// The operation of B under which its power goes, in its present process.
    armed: Option<u64>,
    guest: Option<Arc<Connection>>,
    stamp: u64,
    /// What the guest has written, whether or not it was answered.
    now: Contents,
    /// By sector: what it may hold if the power goes; nothing for a sector that was not flushed.
    safe: BTreeMap<u64, u64>,
    /// Contents at checkpoints that were asked for, the newest last, and how many of them were
    /// acknowledged.
    asked: Vec<Contents>,
    acknowledged: usize,
    /// The last command that changes roles was answered.
    answered: bool,
}

/// A piece of a life.
struct Piece {
    /// Up to here nothing goes wrong.
    before: AsyncStep,
    /// Somewhere in here it does.
    script: AsyncStep,
    /// What has to be true afterwards; B's machine is off.
    after: AsyncStep,
}

type AsyncStep = fn(&mut Pair) -> std::pin::Pin<Box<dyn Future<Output = Done> + '_>>;

impl Pair {
    fn new(world: &Arc<World>) -> Self {
        world.begin();
        let sectors = DISK_BYTES / SECTOR;
        let now: Contents = (0..sectors).map(|sector| sector % 3).collect();
        let data: Vec<u8> = (0..).zip(&now).flat_map(|(s, own)| fill(0, s, 1, *own)).collect();
        put_file(world, A, 0, &data);
        put_file(world, B, 0, &vec![0xEE; DISK_BYTES as usize]);
        Pair {
            world: Arc::clone(world),
            durability: Durability::Power,
            processes: [None, None],
            armed: None,
            guest: None,
            stamp: 100,
            safe: (0..).zip(now.iter().copied()).collect(),
            now,
            asked: Vec::new(),
            acknowledged: 0,
            answered: false,
        }
    }

    fn start(&mut self, side: Side, role: Role) {
        self.start_with(side, role, false);
    }

    fn start_with(&mut self, side: Side, role: Role, discard_local: bool) {
        let life = next_life(&self.world, side);
        let config = config(life, role, self.durability, discard_local);
        self.processes[side] = Some(Process::run(life, config));
        if side == B {
            self.world.lock().machines[B].ends_in = self.armed.map(|n| (n, End::PowerLoss));
        }
    }

    /// From now on the power of B goes under its `n`th operation.
    fn arm(&mut self, n: Option<u64>) {
        self.armed = n;
        self.world.lock().machines[B].ends_in = n.map(|n| (n, End::PowerLoss));
    }

    async fn end(&mut self, side: Side, end: End) {
        self.world.end(side, end);
        if let Some(mut process) = self.processes[side].take() {
            let _ = process.ended().await;
        }
    }

    /// Every operation takes some time, in which others begin.
    fn slow_disks(&self, side: Side) {
        self.world.lock().machines[side].faults =
            DiskFaults { slow: 1000, slow_ms_max: 4, ..DiskFaults::default() };
    }

    async fn command(&self, side: Side, command: &str, arguments: &[(&str, Value)]) -> Done<Value> {
        let process = self.processes[side].as_ref().ok_or("it does not run")?;
        let answer = process.command(command, arguments);
        let answer = tokio::time::timeout(PATIENCE, answer).await.map_err(|_| "no answer")?;
        answer.map_err(|error| format!("{command} on {}: {error}", name(side)))
    }

    /// Waits until the status of a side fits.
    async fn until(
        &mut self,
        side: Side,
        what: &str,
        fits: impl Fn(&Value) -> bool,
    ) -> Done<Value> {
        let until = Instant::now() + PATIENCE;
        let mut last = Value::Null;
        while Instant::now() < until {
            let process = self.processes[side].as_mut().ok_or("it does not run")?;
            if process.has_ended(&self.world) {
                let ended = process.ended().await;
                self.processes[side] = None;
                return Err(format!("{what}: {} has ended: {ended:?}", name(side)));
            }
            if let Some(status) = process.status().await {
                if fits(&status) {
                    return Ok(status);
                }
                last = status;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Err(format!("{what}: not within {PATIENCE:?}: {last}"))
    }

    async fn until_in_sync(&mut self, side: Side) -> Done {
        let in_sync = |status: &Value| {
            status["disks"][0]["state"] == "in-sync" && !status["checkpoint-age-ms"].is_null()
        };
        self.until(side, "in sync", in_sync).await.map(drop)
    }

    async fn until_merged(&mut self, side: Side) -> Done {
        let merged = |status: &Value| {
            status["role"] != "secondary"
                && status["disks"][0]["merging"].is_null()
                && status["disks"][0]["progress"].is_null()
        };
        self.until(side, "merged", merged).await.map(drop)
    }

    /// The guest's disk is on this side from now on.
    async fn plug(&mut self, side: Side, port: u16) -> Done {
        let until = Instant::now() + PATIENCE;
        loop {
            let options = ConnectOptions {
                connect_timeout: Duration::from_millis(200),
                request_timeout: Duration::from_secs(10),
                ..ConnectOptions::new(reach(side, None, port), disk_name(0))
            };
            match Connection::connect(&options).await {
                Ok(connection) => {
                    self.guest = Some(connection);
                    return Ok(());
                }
                Err(error) if Instant::now() >= until => return Err(error.to_string()),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn guest(&self) -> Done<Arc<Connection>> {
        self.guest.clone().ok_or_else(|| "no guest".to_owned())
    }

    async fn write(&mut self, first: u64, count: u64, fua: bool) -> Done {
        self.stamp += 1;
        let stamp = self.stamp;
        self.change(first, count, stamp);
        let data = Bytes::from(fill(0, first, count, stamp));
        let written = self.guest()?.write(first * SECTOR, data, WriteFlags { fua }).await;
        written.map_err(|error| error.to_string())?;
        if fua {
            self.safe.extend((first..first + count).map(|sector| (sector, stamp)));
        }
        Ok(())
    }

    async fn zero(&mut self, first: u64, count: u64) -> Done {
        self.change(first, count, 0);
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        let zeroed = self.guest()?.write_zeroes(first * SECTOR, count * SECTOR, flags).await;
        zeroed.map_err(|error| error.to_string())
    }

    fn change(&mut self, first: u64, count: u64, stamp: u64) {
        for sector in first..first + count {
            self.now[sector as usize] = stamp;
            self.safe.remove(&sector);
        }
    }

    async fn flush(&mut self) -> Done {
        self.guest()?.flush(FlushLevel::Durable).await.map_err(|error| error.to_string())?;
        self.safe = (0..).zip(self.now.iter().copied()).collect();
        Ok(())
    }

    async fn checkpoint(&mut self, primary: Side) -> Done {
        self.asked.push(self.now.clone());
        self.command(primary, "checkpoint", &[]).await?;
        self.acknowledged = self.asked.len();
        Ok(())
    }

    /// What a side's file holds.
    fn file(&self, side: Side) -> Done<Contents> {
        let name = format!("{}.raw", disk_name(0));
        let file = self.world.lock().machines[side].names.get(&name).cloned();
        let file = file.ok_or("the disk is gone")?;
        let file = file.lock().expect("one thread");
        Ok(stamps(0, &file.data))
    }

    /// What a side has become is the newest checkpoint that was acknowledged, or one that was asked
    /// for since.
    fn check_checkpoint(&self, side: Side) -> Done {
        let file = self.file(side)?;
        let first = self.acknowledged.saturating_sub(1);
        if self.asked[first..].contains(&file) {
            return Ok(());
        }
        let sectors = |contents: &Contents| -> Vec<usize> {
            (0..file.len()).filter(|sector| file[*sector] != contents[*sector]).collect()
        };
        Err(format!(
            "I3: it is not checkpoint {first} of {}, in sectors {:?}",
            self.asked.len(),
            sectors(&self.asked[first])
        ))
    }

    /// What was flushed is there.
    fn check_flushed(&self, side: Side) -> Done {
        let name = format!("{}.raw", disk_name(0));
        let file = self.world.lock().machines[side].names.get(&name).cloned();
        let file = file.ok_or("the disk is gone")?;
        let file = file.lock().expect("one thread");
        for (sector, stamp) in &self.safe {
            let found = &file.data[(sector * SECTOR) as usize..][..SECTOR as usize];
            if found != fill(0, *sector, 1, *stamp) {
                return Err(format!("I1: sector {sector} is not what was flushed, {stamp}"));
            }
        }
        Ok(())
    }
}

/// Until the power is gone, or the script has ended.
async fn live(pair: &mut Pair, script: AsyncStep) -> Done {
    let world = Arc::clone(&pair.world);
    let life = world.lock().machines[B].life;
    let was_alive = world.lock().machines[B].alive;
    let gone = async {
        loop {
            {
                let machine = &world.lock().machines[B];
                if !machine.alive && (was_alive || machine.life > life) {
                    return;
                }
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    tokio::select! {
        biased;
        () = gone => Ok(()),
        done = script(pair) => done,
    }
}

/// Lives through a piece; returns the operations that B made in it.
fn run(piece: &Piece, n: Option<u64>, seed: u64) -> Result<u64, String> {
    let world = World::new(seed, 0);
    let shared = Arc::clone(&world);
    let lived = in_world(&world, seed, None, async {
        let mut pair = Pair::new(&shared);
        (piece.before)(&mut pair).await.map_err(|why| format!("before: {why}"))?;
        let operations = || shared.lock().machines[B].operations;
        let begun = operations();
        pair.arm(n);
        let ended = live(&mut pair, piece.script).await;
        let (count, alive) = (operations() - begun, shared.lock().machines[B].alive);
        if alive || n.is_none() {
            ended.map_err(|why| format!("the script: {why}"))?;
        }
        pair.arm(None);
        pair.end(B, End::PowerLoss).await;
        pair.guest = None;
        (piece.after)(&mut pair).await.map_err(|why| format!("after: {why}"))?;
        for side in [A, B] {
            pair.end(side, End::Kill).await;
        }
        Ok(count)
    });
    lived.map_err(|why| {
        let last = world.last_events();
        let last = last[last.len().saturating_sub(40)..].join("\n");
        format!("{last}\noperation {n:?} of B, seed {seed}: {why}")
    })
}

/// Every operation, or some of them, spread over the piece.
fn every_operation(test: &str, piece: &Piece, some: usize) {
    if let Some(part) = Part::given() {
        return part.run(piece);
    }
    let total = run(piece, None, 1).unwrap_or_else(|why| panic!("{why}"));
    assert!(total > 50, "only {total} operations");
    if std::env::var_os("BREP_LONG").is_none() {
        let step = (total as usize).div_ceil(some);
        let seed = 1;
        return (0..total).step_by(step).for_each(|n| Part { seed, from: n, to: n + 1 }.run(piece));
    }
    for seed in 1..=SEEDS {
        for from in (0..total).step_by(PART_OPERATIONS as usize) {
            let to = total.min(from + PART_OPERATIONS);
            Part { seed, from, to }.run_apart(test);
        }
    }
}

/// How often each operation is met in the long form: each time other sectors are lost.
const SEEDS: u64 = 3;

/// Runs of one process: what a process of the pair leaves behind when it is killed is memory here.
const PART_OPERATIONS: u64 = 40;

/// The variable that tells a process its part.
const PART: &str = "BREP_POWER_POINTS";

/// Some operations, one after the other.
#[derive(Debug, Clone, Copy)]
struct Part {
    seed: u64,
    from: u64,
    to: u64,
}

impl Part {
    /// What this process was started for.
    fn given() -> Option<Self> {
        let text = std::env::var(PART).ok()?;
        let numbers: Vec<u64> = text.split(',').filter_map(|n| n.parse().ok()).collect();
        let [seed, from, to] = numbers[..] else { panic!("{PART}={text}") };
        Some(Part { seed, from, to })
    }

    fn run(self, piece: &Piece) {
        for n in self.from..self.to {
            let seed = self.seed * 1_000_003 + n;
            run(piece, Some(n), seed).unwrap_or_else(|why| panic!("{why}"));
        }
    }

    fn run_apart(self, test: &str) {
        let Part { seed, from, to } = self;
        let process = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args([&format!("power_points::pieces::{test}"), "--exact", "--nocapture"])
            .env(PART, format!("{seed},{from},{to}"))
            .output()
            .expect("a test can be run again");
        assert!(
            process.status.success(),
            "{PART}={seed},{from},{to}:\n{}",
            String::from_utf8_lossy(&process.stderr)
        );
    }
}
