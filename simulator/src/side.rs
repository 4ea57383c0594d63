//! The processes: starting them, stopping them, telling them something.

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use brep_block::CacheMode;
use brep_replication::config::{
    Ack, DiskConfig, DiskFormat, Durability, OnPeerLost, OnSlowPeer, Role, SideConfig,
};
use brep_replication::simulation::{Control, control};
use serde_json::{Map, Value};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::network::{GUEST_PORT, REPLICA_PORT, listen_at, reach};
use crate::world::{A, B, Life, Side, World, name};

/// What does not change in a history.
#[derive(Debug, Clone)]
pub(crate) struct Setup {
    pub(crate) disks: usize,
    pub(crate) disk_bytes: u64,
    /// By side, as some of the following.
    pub(crate) ack: [Ack; 2],
    pub(crate) peer_timeout: Duration,
    pub(crate) checkpoint_interval: Option<Duration>,
    pub(crate) window_bytes: u64,
    pub(crate) window_requests: usize,
    pub(crate) durability: [Durability; 2],
    pub(crate) on_peer_lost: [OnPeerLost; 2],
    pub(crate) on_slow_peer: OnSlowPeer,
    pub(crate) slow_peer_limit: Option<Duration>,
    /// A guest runs on the secondary too, and a manager decides when checkpoints are taken.
    pub(crate) second_guest: bool,
}

impl Setup {
    /// Whether a machine loses its power: where that is promised to be survived.
    pub(crate) fn loses_power(&self, side: Side) -> bool {
        self.durability[side] == Durability::Power
    }

    /// The sides are not alike.
    pub(crate) fn mix(&mut self) {
        self.durability[B] = match self.durability[A] {
            Durability::Power => Durability::Process,
            Durability::Process => Durability::Power,
        };
        self.ack[B] = if self.ack[A] == Ack::Sync { Ack::Async } else { Ack::Sync };
        self.on_peer_lost[B] = match self.on_peer_lost[A] {
            OnPeerLost::Degrade => OnPeerLost::Suspend,
            OnPeerLost::Suspend => OnPeerLost::Degrade,
        };
    }
}

/// How a process is started.
#[derive(Debug)]
pub(crate) struct Start {
    pub(crate) role: Role,
    /// As its command line names them.
    pub(crate) disks: Vec<usize>,
    pub(crate) knows_peer: bool,
    /// What it wrote as a primary may be given up.
    pub(crate) discard_local: bool,
}

/// A process that was started.
pub(crate) struct Process {
    pub(crate) life: Life,
    control: PathBuf,
    known: RefCell<Option<Control>>,
    shutdown: CancellationToken,
    task: JoinHandle<Result<(), String>>,
}

pub(crate) fn disk_name(disk: usize) -> String {
    format!("d{disk}")
}

/// The disk of a name.
pub(crate) fn disk_number(name: &str) -> Option<usize> {
    name.strip_prefix('d')?.parse().ok()
}

/// The file of a disk, in the root of its machine.
pub(crate) fn file_name(disk: usize) -> String {
    format!("{}.raw", disk_name(disk))
}

pub(crate) fn disk_path(life: Life, disk: usize) -> PathBuf {
    PathBuf::from(format!("/{life}/{}.raw", disk_name(disk)))
}

/// A run of the process of a machine begins.
pub(crate) fn next_life(world: &World, side: Side) -> Life {
    let mut world = world.lock();
    let machine = &mut world.machines[side];
    machine.life += 1;
    machine.alive = true;
    machine.ends_in = None;
    let life = Life { side, number: machine.life };
    world.note(format!("{life} starts"));
    life
}

fn disks(disks: Vec<usize>, life: Life) -> Vec<DiskConfig> {
    let disk = |disk| DiskConfig {
        name: disk_name(disk),
        path: disk_path(life, disk),
        format: DiskFormat::Raw,
        cache: CacheMode::Writeback,
        buffers: None,
    };
    disks.into_iter().map(disk).collect()
}

impl Process {
    pub(crate) fn start(world: &Arc<World>, setup: &Setup, side: Side, how: Start) -> Self {
        let life = next_life(world, side);
        let state_dir = PathBuf::from(format!("/{life}/state"));
        let config = SideConfig::new(how.role, name(side), state_dir, disks(how.disks, life));
        let serves_guests = how.role == Role::Primary || setup.second_guest && side == B;
        let config = SideConfig {
            ack: setup.ack[side],
            peer_timeout: setup.peer_timeout,
            window_bytes: setup.window_bytes,
            window_requests: setup.window_requests,
            checkpoint_interval: setup.checkpoint_interval,
            durability: setup.durability[side],
            on_peer_lost: setup.on_peer_lost[side],
            on_slow_peer: setup.on_slow_peer,
            slow_peer_limit: setup.slow_peer_limit,
            discard_local: how.discard_local,
            allow_plaintext: true,
            peer: how.knows_peer.then(|| reach(1 - side, Some(life), REPLICA_PORT).into()),
            listen: Some(listen_at(life, REPLICA_PORT)),
            guest_listen: serves_guests.then(|| listen_at(life, GUEST_PORT)),
            ..config
        };
        Self::run(life, config)
    }

    /// Runs a side as it is configured.
    pub(crate) fn run(life: Life, config: SideConfig) -> Self {
        let control = config.state_dir.join("control.sock");
        let shutdown = CancellationToken::new();
        let token = shutdown.clone();
        let task = tokio::spawn(async move {
            brep_replication::run(config, token).await.map_err(|e| e.to_string())
        });
        Process { life, control, known: RefCell::default(), shutdown, task }
    }

    /// Whether it has ended by itself, or was killed.
    pub(crate) fn has_ended(&self, world: &World) -> bool {
        self.task.is_finished() || !world.is_alive(self.life)
    }

    pub(crate) fn control(&self) -> Option<Control> {
        let mut known = self.known.borrow_mut();
        if known.is_none() {
            *known = control(&self.control);
        }
        known.clone()
    }

    /// What SIGTERM does.
    pub(crate) fn ask_to_stop(&self) {
        self.shutdown.cancel();
    }

    /// Ends it as SIGTERM does.
    pub(crate) async fn stop(mut self, world: &World) -> Result<(), String> {
        self.ask_to_stop();
        let limit = Duration::from_secs(120);
        let mut waited = Duration::ZERO;
        let step = Duration::from_millis(5);
        while !self.task.is_finished() && world.is_alive(self.life) {
            if waited >= limit {
                return Err("a clean stop does not end".to_owned());
            }
            tokio::time::sleep(step).await;
            waited += step;
        }
        let ended = self.ended().await;
        world.kill(self.life.side);
        ended
    }

    /// How it ended, if it did.
    pub(crate) async fn ended(&mut self) -> Result<(), String> {
        if !self.task.is_finished() {
            self.task.abort();
            return Ok(());
        }
        match (&mut self.task).await {
            Ok(ended) => ended,
            Err(error) if error.is_panic() => Err(format!("panicked: {error}")),
            Err(_) => Ok(()),
        }
    }

    /// Carries a command out.
    pub(crate) async fn command(
        &self,
        command: &str,
        arguments: &[(&str, Value)],
    ) -> Result<Value, String> {
        let Some(control) = self.control() else { return Err("no control socket yet".to_owned()) };
        let arguments: Map<_, _> =
            arguments.iter().map(|(name, value)| ((*name).to_owned(), value.clone())).collect();
        control.handler.execute(command, arguments).await.map_err(|error| error.desc)
    }

    pub(crate) async fn status(&self) -> Option<Value> {
        self.command("query-status", &[]).await.ok()
    }
}
