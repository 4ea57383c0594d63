use std::collections::HashSet;
use std::path::PathBuf;
use std::time::Duration;

use brep_nbd::NbdUri;
use brep_replication::config::{
    Ack, DiskConfig, Durability, OnPeerLost, OnSlowPeer, PeerKind, ResyncLimits, Role, Seeded,
    SideConfig, TlsConfig,
};
use clap::{Args, ValueEnum};

use super::address::peer_address;
use super::disk::DiskArg;
use super::drive::{self, Drives};
use super::security::{ServerTls, TlsFlags};
use crate::exit::Failure;
use crate::units::{
    Factor, Interval, Limit, Rate, parse_duration, parse_factor, parse_granularity, parse_interval,
    parse_limit, parse_rate, parse_size,
};

/// What both sides of a pair take.
#[derive(Debug, Args)]
pub(crate) struct SideArgs {
    /// A disk of the group: NAME=FILE[,format=raw|qcow2][,cache=writeback|none]
    ///
    /// May be given several times: all disks are cut and committed together. NAME is the name of
    /// the export and the same on both sides. The format is taken from .raw, .img or .qcow2, and
    /// has to be given for any other name. A comma in FILE is written twice.
    #[arg(long = "disk", value_name = "NAME=FILE", required_unless_present = "drives")]
    disks: Vec<DiskArg>,

    /// A disk of the group as QEMU's block replication writes it, instead of --disk
    ///
    /// On a primary driver=quorum,...; on a secondary two for each disk: if=none,id=... and
    /// driver=qcow2+colo,.... A comma in a value is written twice.
    #[arg(long = "drive", value_name = "OPTIONS", conflicts_with = "disks")]
    drives: Vec<String>,

    /// Directory for the state record and the buffers; made with mode 0700 if it is missing
    ///
    /// With --drive FILE.brep if it is not given: on a secondary FILE is the first active disk, on
    /// a primary the first local disk.
    #[arg(long, value_name = "DIR", required_unless_present = "drives")]
    state_dir: Option<PathBuf>,

    /// Control socket [default: STATE_DIR/control.sock]
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,

    /// Name of this side, different from the peer's [default: the host name]
    #[arg(long)]
    name: Option<String>,

    /// How long the other side may be silent before it counts as lost
    #[arg(long, value_name = "DURATION", default_value = "5s", value_parser = parse_duration)]
    peer_timeout: Duration,

    /// What checkpoints, and what a guest has flushed, survive
    #[arg(long, value_name = "LEVEL", default_value = "power")]
    durability: DurabilityArg,

    /// Wait with replication for `brep start`, or the control socket's command
    #[arg(long)]
    no_start: bool,

    #[command(flatten)]
    tls: TlsFlags,

    /// The subject that the other side's certificate has to have, such as CN=beta
    #[arg(long, value_name = "SUBJECT", requires = "tls_dir")]
    tls_peer: Option<String>,

    /// End, without a clean stop, when the process ends that has started this one
    #[arg(long, hide = true)]
    end_with_parent: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum DurabilityArg {
    /// The end of any process
    Process,
    /// The loss of power too
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnPeerLostArg {
    /// Go on alone, and keep track of what the secondary lacks
    Degrade,
    /// Hold the guest's writes until the secondary is back, or `brep resume --lonely`
    Suspend,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum OnSlowPeerArg {
    /// As one that is lost
    Lost,
    /// Go on without it, and bring it up again after a pause
    PullAhead,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PeerKindArg {
    /// A brep secondary
    Brep,
    /// A stock NBD server, such as QEMU's COLO secondary; checkpoints are the manager's
    Plain,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum SeededArg {
    /// Hashes are compared, and what differs is copied
    Compare,
    /// Nothing is compared
    Trust,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum AckArg {
    /// The secondary has it too
    Sync,
    /// It is on its way to the secondary
    Async,
}

/// How a side replicates while it is a primary: from the start, or once it has been promoted.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of a primary")]
pub(crate) struct ReplicateArgs {
    /// Where the other side listens; without it a primary runs alone until `brep peer set`
    #[arg(long, value_name = "URI", conflicts_with = "drives")]
    peer: Option<NbdUri>,

    /// What listens there
    #[arg(long, value_name = "KIND", default_value = "brep")]
    peer_kind: PeerKindArg,

    /// When a guest write is acknowledged
    #[arg(long, default_value = "sync")]
    ack: AckArg,

    /// Bytes that may be on their way to the secondary
    #[arg(long, value_name = "SIZE", default_value = "64M", value_parser = parse_size)]
    window_bytes: u64,

    /// Requests that may be on their way to the secondary
    #[arg(long, value_name = "COUNT", default_value = "4096",
        value_parser = clap::value_parser!(u32).range(1..=65536))]
    window_requests: u32,

    /// Bytes that are remembered as one when the secondary lacks any of them: a power of two from 4K
    /// to 16M; by default 64K, more for disks beyond 4 TiB
    #[arg(long, value_name = "SIZE", value_parser = parse_granularity)]
    granularity: Option<u64>,

    /// Time between two checkpoints, or off: only on command
    #[arg(long, value_name = "DURATION", default_value = "1s", value_parser = parse_interval)]
    checkpoint_interval: Interval,

    /// What to do when the secondary is lost
    #[arg(long, value_name = "POLICY", default_value = "degrade")]
    on_peer_lost: OnPeerLostArg,

    /// A secondary is too slow when the window has been full for so long; off: it may be
    #[arg(long, value_name = "DURATION", default_value = "off", value_parser = parse_interval)]
    slow_peer_limit: Interval,

    /// What to do with a secondary that is too slow
    #[arg(long, value_name = "POLICY", default_value = "lost")]
    on_slow_peer: OnSlowPeerArg,

    /// The secondary's disks are copies already: compare hashes, copy only what differs
    ///
    /// `--seeded=trust` copies and compares nothing: what then differs without your knowing comes to
    /// light after a failover.
    #[arg(long, value_name = "HOW", num_args = 0..=1, require_equals = true,
        default_missing_value = "compare")]
    seeded: Option<SeededArg>,

    /// Bytes a second that a resync copies at most, or off
    #[arg(long, value_name = "SIZE", default_value = "off", value_parser = parse_rate)]
    resync_rate: Rate,

    /// How many times as long the guest's writes may take during a resync as without, or off
    #[arg(long, value_name = "FACTOR", default_value = "off", value_parser = parse_factor)]
    resync_latency_factor: Factor,

    /// Compare hashes before a resync sends anything
    #[arg(long)]
    resync_compare: bool,

    /// Serve the guest at once, without the secondary
    ///
    /// A primary that was connected when it stopped waits for its secondary, which may have been
    /// promoted since. Only for those who know that it was not.
    #[arg(long)]
    force_lonely: bool,
}

/// Serve disks to guests and replicate what they write
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  brep primary --disk vda=disk.raw --state-dir state-a --peer nbd://127.0.0.1:10809 \\
      --guest-listen 'nbd+unix:///?socket=vda.sock'
  qemu-io -f raw -c 'write -P 1 0 1M' 'nbd+unix:///vda?socket=vda.sock'")]
pub(crate) struct PrimaryArgs {
    #[command(flatten)]
    side: SideArgs,

    /// Where guests connect; exports are the names of the disks
    #[arg(long, value_name = "URI")]
    guest_listen: NbdUri,

    /// Where this side listens for the other one, once that is the primary
    #[arg(long, value_name = "URI")]
    listen: Option<NbdUri>,

    // Last: its heading holds for everything after it.
    #[command(flatten)]
    primary: ReplicateArgs,
}

/// Receive the writes of a primary and keep what they overwrite, ready to take over
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  brep secondary --disk vda=replica.qcow2 --state-dir state-b --listen nbd://127.0.0.1:10809
  brep failover --control state-b/control.sock")]
pub(crate) struct SecondaryArgs {
    #[command(flatten)]
    side: SideArgs,

    /// Where the primary connects; after a failover, guests
    #[arg(long, value_name = "URI")]
    listen: NbdUri,

    /// Where this side's own guest connects; a manager then decides about checkpoints
    #[arg(long, value_name = "URI")]
    guest_listen: Option<NbdUri>,

    /// The primary is a plain NBD client, such as QEMU's replication driver
    ///
    /// It is then the only one that may write to the replica; a manager decides about checkpoints.
    #[arg(long)]
    plain_primary: bool,

    /// Bytes of pre-images that are kept at most, or off: as many as there is room for
    ///
    /// At half of it an early checkpoint is asked for. When it is reached replication stops, and
    /// the last checkpoint stays.
    #[arg(long, value_name = "SIZE", default_value = "off", value_parser = parse_limit)]
    buffer_limit: Limit,

    /// Give up what this side wrote as a primary and its new primary lacks
    ///
    /// Says what that is, and starts. To be given once, not kept in a service's command line.
    #[arg(long, conflicts_with = "plain_primary")]
    discard_local: bool,

    /// With --discard-local: only say what would be lost, and change nothing
    #[arg(long, requires = "discard_local")]
    dry_run: bool,

    /// With --dry-run: print it as JSON
    #[arg(long, requires = "dry_run")]
    json: bool,

    #[command(flatten)]
    primary: ReplicateArgs,
}

/// What is only said, and not done.
#[derive(Debug, Clone, Copy)]
pub(crate) struct DryRun {
    pub(crate) json: bool,
}

impl PrimaryArgs {
    /// What was typed, as what it means.
    pub(crate) fn resolve(self) -> Result<SideConfig, Failure> {
        let (mut config, tls) = self.side.resolve(Role::Primary, drive::primary)?;
        config.guest_listen = Some(tls.flags.listener("--guest-listen", self.guest_listen)?);
        if let Some(uri) = self.listen {
            config.listen = Some(tls.flags.listener("--listen", uri)?);
        }
        config.tls = tls.load(self.primary.peer.as_ref())?;
        self.primary.apply(&mut config)?;
        check_addresses(&config)?;
        Ok(config)
    }
}

impl SecondaryArgs {
    /// Whether it is only to be said what would be done.
    pub(crate) fn dry_run(&self) -> Option<DryRun> {
        self.dry_run.then_some(DryRun { json: self.json })
    }

    /// What was typed, as what it means.
    pub(crate) fn resolve(self) -> Result<SideConfig, Failure> {
        let (mut config, tls) = self.side.resolve(Role::Secondary, drive::secondary)?;
        config.listen = Some(tls.flags.listener("--listen", self.listen)?);
        if let Some(uri) = self.guest_listen {
            config.guest_listen = Some(tls.flags.listener("--guest-listen", uri)?);
        }
        config.tls = tls.load(self.primary.peer.as_ref())?;
        config.plain_primary = self.plain_primary;
        config.buffer_limit = self.buffer_limit.0;
        config.discard_local = self.discard_local;
        self.primary.apply(&mut config)?;
        check_addresses(&config)?;
        Ok(config)
    }
}

/// What was said about TLS.
struct SideTls {
    flags: TlsFlags,
    peer_subject: Option<String>,
}

impl SideTls {
    /// Reads what TLS needs; `peer` is where the other side listens, if that was given as a URI.
    fn load(self, peer: Option<&NbdUri>) -> Result<Option<TlsConfig>, Failure> {
        let client = peer.map(|uri| self.flags.client("--peer", uri)).transpose()?.flatten();
        let Some(ServerTls { server, required, allowed_clients }) = self.flags.server()? else {
            return Ok(None);
        };
        let client = match client {
            Some(client) => client,
            None => self.flags.any_client()?,
        };
        let peer_subject = self.peer_subject;
        Ok(Some(TlsConfig { server, client, required, allowed_clients, peer_subject }))
    }
}

fn check_addresses(config: &SideConfig) -> Result<(), Failure> {
    if config.listen.is_some() && config.listen == config.guest_listen {
        return Err(Failure::usage("--listen and --guest-listen must differ"));
    }
    if config.peer.is_none() && config.peer_kind == PeerKind::Plain {
        return Err(Failure::usage("--peer-kind plain: --peer is missing"));
    }
    Ok(())
}

impl ReplicateArgs {
    fn apply(self, config: &mut SideConfig) -> Result<(), Failure> {
        if self.window_bytes < 1 << 20 {
            return Err(Failure::usage("--window-bytes: at least 1M"));
        }
        if let Some(uri) = self.peer {
            config.peer = Some(peer_address("--peer", uri)?);
        }
        config.peer_kind = match self.peer_kind {
            PeerKindArg::Brep => PeerKind::Brep,
            PeerKindArg::Plain => PeerKind::Plain,
        };
        config.ack = match self.ack {
            AckArg::Sync => Ack::Sync,
            AckArg::Async => Ack::Async,
        };
        config.on_peer_lost = match self.on_peer_lost {
            OnPeerLostArg::Degrade => OnPeerLost::Degrade,
            OnPeerLostArg::Suspend => OnPeerLost::Suspend,
        };
        config.slow_peer_limit = self.slow_peer_limit.0;
        config.on_slow_peer = match self.on_slow_peer {
            OnSlowPeerArg::Lost => OnSlowPeer::Lost,
            OnSlowPeerArg::PullAhead => OnSlowPeer::PullAhead,
        };
        config.window_bytes = self.window_bytes;
        config.window_requests = self.window_requests as usize;
        config.granularity = self.granularity;
        config.checkpoint_interval = self.checkpoint_interval.0;
        config.seeded = match self.seeded {
            None => Seeded::No,
            Some(SeededArg::Compare) => Seeded::Compare,
            Some(SeededArg::Trust) => Seeded::Trust,
        };
        config.resync_limits =
            ResyncLimits { rate: self.resync_rate.0, latency_factor: self.resync_latency_factor.0 };
        config.resync_compare = self.resync_compare;
        config.force_lonely = self.force_lonely;
        Ok(())
    }
}

impl SideArgs {
    /// `drives` understands the options that --drive was given.
    fn resolve(
        self,
        role: Role,
        drives: impl FnOnce(&[String], Option<PathBuf>) -> Result<Drives, Failure>,
    ) -> Result<(SideConfig, SideTls), Failure> {
        if self.end_with_parent {
            let signal = Some(rustix::process::Signal::KILL);
            rustix::process::set_parent_process_death_signal(signal).map_err(Failure::failed)?;
        }
        let name = match self.name {
            Some(name) => name,
            None => rustix::system::uname().nodename().to_string_lossy().into_owned(),
        };
        if !(1..=64).contains(&name.len()) || name.chars().any(char::is_control) {
            return Err(Failure::usage("--name: 1 to 64 bytes, no control characters"));
        }
        // Last, because this looks at files too.
        let Drives { disks, peer, state_dir } = match self.state_dir {
            Some(state_dir) if self.drives.is_empty() => {
                Drives { disks: plain_disks(self.disks)?, peer: None, state_dir }
            }
            state_dir => drives(&self.drives, state_dir)?,
        };
        let state_dir = std::path::absolute(state_dir)?;
        let config = SideConfig {
            peer: peer.map(Into::into),
            start: !self.no_start,
            control: self.control.map(std::path::absolute).transpose()?,
            durability: match self.durability {
                DurabilityArg::Process => Durability::Process,
                DurabilityArg::Power => Durability::Power,
            },
            peer_timeout: self.peer_timeout,
            allow_plaintext: self.tls.allow_plaintext(),
            ..SideConfig::new(role, &name, state_dir, disks)
        };
        Ok((config, SideTls { flags: self.tls, peer_subject: self.tls_peer }))
    }
}

fn plain_disks(disks: Vec<DiskArg>) -> Result<Vec<DiskConfig>, Failure> {
    let (mut names, mut files) = (HashSet::new(), HashSet::new());
    for disk in &disks {
        if !names.insert(&disk.name) {
            return Err(Failure::usage(format!("--disk {}: the name is taken", disk.name)));
        }
        let file = std::fs::canonicalize(&disk.file).unwrap_or_else(|_| disk.file.clone());
        if !files.insert(file) {
            let file = disk.file.display();
            return Err(Failure::usage(format!("--disk {}: {file} given twice", disk.name)));
        }
    }
    Ok(disks.into_iter().map(DiskArg::into_config).collect())
}
