//! What a side of a pair is told when it starts.

use std::path::PathBuf;
use std::time::Duration;

use brep_block::CacheMode;
use brep_nbd::Endpoint;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use crate::reception::SharedListener;
pub use crate::state::Role;
use crate::tls::Exposure;
pub use crate::tls::TlsConfig;

/// The format of a disk image. Never guessed from contents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskFormat {
    /// Bytes as they are.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

/// One disk of the group.
#[derive(Debug, Clone)]
pub struct DiskConfig {
    /// Name of the disk and of its export, equal on both sides. Not empty, at most 64 bytes of
    /// letters, digits, `-`, `_` and `.`.
    pub name: String,
    /// The image file or block special file.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// How the file is read and written.
    pub cache: CacheMode,
    /// The files that a secondary uses as the first epoch's buffers; none: it makes them.
    pub buffers: Option<BufferFiles>,
}

/// The image files that an operator has named for the buffers of a disk's first epoch: qcow2, of
/// the disk's size, and empty. They carry later buffers no more; those lie in the state directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BufferFiles {
    /// What this side's guest writes.
    pub active: PathBuf,
    /// What the primary overwrites.
    pub hidden: PathBuf,
}

/// What a side keeps its promises against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Durability {
    /// The end of any process.
    Process,
    /// The loss of power too.
    #[default]
    Power,
}

impl Durability {
    /// The word that commands and records use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Durability::Process => "process",
            Durability::Power => "power",
        }
    }
}

/// When a guest write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ack {
    /// The local disk has it, and on the secondary pre-image and write are in their files.
    #[default]
    Sync,
    /// The local disk has it, and it is in the window.
    Async,
}

/// What a primary finds at its peer's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum PeerKind {
    /// A brep secondary.
    #[default]
    Brep,
    /// A stock NBD server with a writable export for each disk, such as QEMU's COLO secondary.
    /// There is no link: no identity, no heartbeats, and no checkpoints by this side; the manager
    /// takes them on the peer while the guest is stopped.
    Plain,
}

/// How fast a resync may go.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct ResyncLimits {
    /// Bytes a second at most; none: no fixed limit.
    pub rate: Option<u64>,
    /// The copy goes only so fast that the median of the guest's writes takes at most so many
    /// times as long as without it; at least 1. None: the guest's writes are not looked at.
    pub latency_factor: Option<f64>,
}

/// What a primary does when its secondary is lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnPeerLost {
    /// The guest goes on, and what the secondary lacks is kept track of.
    #[default]
    Degrade,
    /// The guest's writes are held until the secondary is back, or a command lets them go on.
    Suspend,
}

/// What a primary does with a secondary that is slow rather than dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OnSlowPeer {
    /// It counts as lost.
    #[default]
    Lost,
    /// It is left behind: the guest goes on without it in any case, and it is brought up again
    /// after a pause, which becomes longer while it stays slow.
    PullAhead,
}

/// What is made of a secondary's disks that were brought by other means than the first copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Seeded {
    /// They were not: everything is copied.
    #[default]
    No,
    /// Hashes are compared, and what differs is copied.
    Compare,
    /// They are taken for equal to this side's as they are at the first session. If they are not,
    /// nobody notices before a failover.
    Trust,
}

/// Where the other side is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerAddress {
    /// Where it listens.
    pub endpoint: Endpoint,
    /// Its group, where one address serves several.
    pub group: Option<String>,
}

impl PeerAddress {
    /// The name of a disk's export there.
    #[must_use]
    pub fn export(&self, disk: &str) -> String {
        match &self.group {
            Some(group) => format!("{group}/{disk}"),
            None => disk.to_owned(),
        }
    }
}

impl PeerAddress {
    /// The data of a private option: the group comes last, where there are several.
    pub(crate) fn option(&self, parts: &[&[u8]]) -> Bytes {
        let group = self.group.as_deref().unwrap_or_default();
        [parts, &[group.as_bytes()]].concat().concat().into()
    }
}

impl From<Endpoint> for PeerAddress {
    fn from(endpoint: Endpoint) -> Self {
        PeerAddress { endpoint, group: None }
    }
}

impl std::fmt::Display for PeerAddress {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.group {
            Some(group) => write!(f, "{}, group {group}", self.endpoint),
            None => self.endpoint.fmt(f),
        }
    }
}

/// How a side of a pair is run.
#[derive(Debug, Clone)]
pub struct SideConfig {
    /// What the side is if its state directory is new. Afterwards the state record says it.
    pub role: Role,
    /// Name of this side, different from the peer's.
    pub name: String,
    /// The disks, cut and committed together, with the same names and sizes on both sides.
    pub disks: Vec<DiskConfig>,
    /// Directory of the state record, the maps and the buffers; made with mode 0700 if it is
    /// missing.
    pub state_dir: PathBuf,
    /// Where the other side listens: a primary replicates to there. None: what was set by command,
    /// if anything.
    pub peer: Option<PeerAddress>,
    /// What listens there.
    pub peer_kind: PeerKind,
    /// Where the other side connects: data and control link. Without `guest_listen` guests are
    /// served here too, by a primary. A secondary needs it.
    pub listen: Option<Endpoint>,
    /// The place among several groups that `listen` is shared with. None: it is this group's alone.
    pub shared: Option<SharedListener>,
    /// Where guests connect. On a side that is a secondary from the start a guest of its own is
    /// served here; a manager then decides when checkpoints are taken.
    pub guest_listen: Option<Endpoint>,
    /// The primary is a plain NBD client, such as QEMU's replication driver. It is then the only
    /// one that may write, brep primaries are refused, and checkpoints are the manager's.
    pub plain_primary: bool,
    /// This side was a primary, and what it has and its new primary lacks is given up.
    pub discard_local: bool,
    /// Replication begins at once; if not, on command.
    pub start: bool,
    /// The control socket; by default `control.sock` in the state directory.
    pub control: Option<PathBuf>,
    /// When a guest write is acknowledged.
    pub ack: Ack,
    /// What acknowledged flushes, checkpoints, maps and record are safe against.
    pub durability: Durability,
    /// No guest request waits longer for the peer, and a peer that is silent for longer is lost.
    /// Default 5 s.
    pub peer_timeout: Duration,
    /// Bytes of pre-images that a secondary keeps at most, of all disks together; none: as many as
    /// the file system of the state directory has room for.
    pub buffer_limit: Option<u64>,
    /// What becomes of the guest's writes when the secondary is lost.
    pub on_peer_lost: OnPeerLost,
    /// A secondary is too slow if the window has been full for so long; none: it may be.
    pub slow_peer_limit: Option<Duration>,
    /// What becomes of one that is too slow.
    pub on_slow_peer: OnSlowPeer,
    /// Bound of the bytes that are on their way to the secondary. Default 64 MiB.
    pub window_bytes: u64,
    /// Bound of the requests that are on their way to the secondary. Default 4096.
    pub window_requests: usize,
    /// Bytes that one bit of the maps stands for: a power of two from 4096 to 16 MiB. None: 64 KiB,
    /// or more for a disk so large that its maps would take more than 64 MiB of memory.
    pub granularity: Option<u64>,
    /// Time between two checkpoints; none: only on command. Default 1 s.
    pub checkpoint_interval: Option<Duration>,
    /// Whether the secondary's disks were copied by other means.
    pub seeded: Seeded,
    /// How fast a resync may go; can be changed while it runs.
    pub resync_limits: ResyncLimits,
    /// Every resync compares hashes before it sends.
    pub resync_compare: bool,
    /// The guest is served at once, without the secondary, although that may have been promoted
    /// since this side was connected to it.
    pub force_lonely: bool,
    /// Guests and peers beyond loopback may be served in clear text.
    pub allow_plaintext: bool,
    /// TLS with guests and with the other side.
    pub tls: Option<TlsConfig>,
}

impl SideConfig {
    pub(crate) fn exposure(&self) -> Exposure {
        Exposure {
            allow_plaintext: self.allow_plaintext,
            tls: self.tls.clone(),
            shared: self.shared.clone(),
        }
    }

    /// Everything at its default. A primary needs `guest_listen` or `listen`, a secondary `listen`.
    #[must_use]
    pub fn new(role: Role, name: &str, state_dir: PathBuf, disks: Vec<DiskConfig>) -> Self {
        SideConfig {
            role,
            name: name.to_owned(),
            disks,
            state_dir,
            peer: None,
            peer_kind: PeerKind::Brep,
            listen: None,
            shared: None,
            guest_listen: None,
            plain_primary: false,
            start: true,
            control: None,
            ack: Ack::Sync,
            durability: Durability::default(),
            peer_timeout: Duration::from_secs(5),
            on_peer_lost: OnPeerLost::Degrade,
            slow_peer_limit: None,
            on_slow_peer: OnSlowPeer::Lost,
            buffer_limit: None,
            window_bytes: 64 << 20,
            window_requests: 4096,
            granularity: None,
            checkpoint_interval: Some(Duration::from_secs(1)),
            seeded: Seeded::No,
            resync_limits: ResyncLimits::default(),
            resync_compare: false,
            force_lonely: false,
            discard_local: false,
            allow_plaintext: false,
            tls: None,
        }
    }
}
