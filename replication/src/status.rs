//! What `query-status` answers: the state of a side, for people and programs.

use brep_nbd::tls::TlsPeer;
use serde::{Deserialize, Serialize};

use crate::node::Stage;

/// The state of one side of a pair.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Number of the last event that is contained in this status.
    #[serde(default)]
    pub sequence: u64,
    /// Name of this side.
    pub name: String,
    /// What this side is now.
    pub role: Role,
    /// How far replication has come on this side.
    pub replication: Stage,
    /// The process id of the daemon.
    pub pid: u32,
    /// Identity of the set of disks; absent on a blank secondary.
    pub set: Option<String>,
    /// The line of writes that this side is on.
    pub cur: Option<String>,
    /// The running epoch (primary), or the one being received (secondary).
    pub epoch: u64,
    /// The last committed checkpoint's epoch.
    pub checkpoint: Option<u64>,
    /// Milliseconds since that checkpoint was committed, as far as this process knows.
    pub checkpoint_age_ms: Option<u64>,
    /// The address of the other side, as far as it is known.
    pub peer: Option<String>,
    /// What the connection to the other side is doing.
    pub link: LinkState,
    /// How the connection to the other side is encrypted; absent if it is not, or there is none.
    #[serde(default)]
    pub tls: Option<TlsStatus>,
    /// Milliseconds since the other side was last heard of.
    pub last_contact_ms: Option<u64>,
    /// Why the state is not healthy; absent if it is.
    pub reason: Option<String>,
    /// The command that gets out of a state that is not healthy.
    pub advice: Option<String>,
    /// After a refusal: what each side has that the other lacks, as far as it is known.
    #[serde(default)]
    pub differences: Option<Differences>,
    /// `sync` or `async` (primary).
    pub ack: Option<String>,
    /// `process` or `power`: what this side keeps its promises against.
    pub durability: String,
    /// The same of the other side, as it has said last. The weaker one of both decides what
    /// survives.
    pub peer_durability: Option<String>,
    /// True if the secondary can be promoted to its last checkpoint (secondary).
    pub promotable: Option<bool>,
    /// True if `failover --to latest` is possible (secondary).
    pub latest_ok: Option<bool>,
    /// What is not promised although it usually is, because the other side is no brep.
    #[serde(default)]
    pub lapsed: Vec<String>,
    /// The guest's requests are held: `stop` was said, and not yet `cont`.
    pub guest_stopped: bool,
    /// Writes of the guest that are held because the secondary is lost; absent: they are not held
    /// (primary).
    pub held_writes: Option<u64>,
    /// The failover, while it can still be undone (promoted).
    #[serde(default)]
    pub held: Option<HeldStatus>,
    /// The test view, while one is open, or the last one, if it has ended by itself (secondary).
    #[serde(default)]
    pub test: Option<TestStatus>,
    /// The copy to the secondary, while one runs (primary).
    pub resync: Option<ResyncStatus>,
    /// One entry a disk.
    pub disks: Vec<DiskStatus>,
    /// Failures that no guest was told of, the newest last; at most 32.
    pub errors: Vec<ErrorStatus>,
    /// Totals since the process started.
    pub counters: Counters,
}

/// What of a status changes with what happens, and not with time or amounts: the data of the event
/// `BREP_STATE`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct State {
    /// As in [`Status`], here and below.
    pub role: Role,
    /// See `role`.
    pub replication: Stage,
    /// See `role`.
    pub link: LinkState,
    /// See `role`.
    pub peer: Option<String>,
    /// See `role`.
    pub promotable: Option<bool>,
    /// See `role`.
    pub latest_ok: Option<bool>,
    /// See `role`.
    pub guest_stopped: bool,
    /// Writes of the guest are held because the secondary is lost.
    pub writes_held: bool,
    /// See `role`.
    pub reason: Option<String>,
    /// See `role`.
    pub advice: Option<String>,
    /// One entry a disk.
    pub disks: Vec<StateOfDisk>,
}

/// One disk in a [`State`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct StateOfDisk {
    /// Its name.
    pub name: String,
    /// Its state.
    pub state: DiskState,
    /// Size in bytes.
    pub size: u64,
}

impl Status {
    /// What of it is worth an event when it changes.
    pub fn state(&self) -> State {
        let disk = |disk: &DiskStatus| StateOfDisk {
            name: disk.name.clone(),
            state: disk.state,
            size: disk.size,
        };
        State {
            role: self.role,
            replication: self.replication,
            link: self.link,
            peer: self.peer.clone(),
            promotable: self.promotable,
            latest_ok: self.latest_ok,
            guest_stopped: self.guest_stopped,
            writes_held: self.held_writes.is_some(),
            reason: self.reason.clone(),
            advice: self.advice.clone(),
            disks: self.disks.iter().map(disk).collect(),
        }
    }
}

/// A connection inside TLS.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TlsStatus {
    /// Version of the protocol, such as `TLS 1.3`.
    pub version: String,
    /// The subject of the other side's certificate, such as `CN=beta`.
    pub subject: String,
}

impl From<&TlsPeer> for TlsStatus {
    fn from(peer: &TlsPeer) -> Self {
        TlsStatus { version: peer.version.to_owned(), subject: peer.subject.clone() }
    }
}

/// What a side is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Serves the guest and forwards its writes.
    Primary,
    /// Receives the writes of a primary.
    Secondary,
    /// Was a secondary and has taken over; a primary once it has had a peer.
    Promoted,
}

/// What the connection to the other side is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LinkState {
    /// No peer is configured.
    None,
    /// Nobody is connected; being tried or waited for.
    Disconnected,
    /// The other side was reached and refused, or was refused.
    Refused,
    /// Connected.
    Connected,
}

/// The state of a disk as an operator sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskState {
    /// Both sides have the same writes.
    InSync,
    /// Contents are being copied.
    Resyncing,
    /// The peer is not there and lacks `bytes-behind`.
    Disconnected,
    /// Cannot be promoted: there is no complete copy yet.
    Inconsistent,
    /// Is being added: no checkpoint holds it yet, and a failover leaves it out.
    Joining,
    /// Taken over and served; the merge runs behind.
    Promoting,
    /// Taken over and served; nothing is merged, so that it can be undone.
    Held,
    /// Taken over; the disk file alone is the disk.
    Promoted,
    /// No peer is configured, or none was ever seen.
    Alone,
    /// Was a primary, and lacks what the other side has written since; or is older than the other
    /// side. Not promotable.
    Outdated,
    /// Both sides have written what the other lacks.
    SplitBrain,
    /// Something was not understood; see the reason.
    Failed,
}

/// One disk.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskStatus {
    /// Its name.
    pub name: String,
    /// The file that holds it.
    pub file: String,
    /// Size in bytes.
    pub size: u64,
    /// Its state.
    pub state: DiskState,
    /// Bytes that the peer is not known to have (primary), by granules.
    pub bytes_behind: u64,
    /// Bytes copied, and to be copied, by a resync or merge that runs.
    pub progress: Option<Progress>,
    /// Bytes merged, and to be merged, after a failover; a resync may run meanwhile.
    #[serde(default)]
    pub merging: Option<Progress>,
    /// Bytes of pre-images kept since the last checkpoint (secondary).
    pub hidden_bytes: Option<u64>,
    /// True if the secondary's guest has written since the last checkpoint.
    pub guest_wrote: Option<bool>,
}

/// What one side has written of a disk, and the other lacks.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Written {
    /// Name of the disk.
    pub disk: String,
    /// Bytes, by granules: at most so many; none: not known.
    pub bytes: Option<u64>,
    /// First byte and number of bytes of each range, ascending; at most
    /// [`SHOWN_MAX`](Written::SHOWN_MAX).
    pub ranges: Vec<(u64, u64)>,
    /// These are all.
    pub complete: bool,
}

impl Written {
    /// Most ranges that are shown of a disk.
    pub const SHOWN_MAX: usize = 256;
}

/// What the sides of a refused pair have that the other lacks.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Differences {
    /// Written here, lacking there. One entry a disk.
    pub here: Vec<Written>,
    /// Written there, lacking here.
    pub there: Vec<Written>,
}

/// A failover that can still be undone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct HeldStatus {
    /// Seconds since 1970 when this side was promoted.
    pub since_s: u64,
    /// Milliseconds since then.
    pub age_ms: u64,
    /// What would be lost if it were undone: at most so many bytes, by granules, of all disks.
    pub written_bytes: u64,
    /// Bytes that the file system of the state directory has left for more, as far as it says.
    pub space_bytes: Option<u64>,
}

/// A writable scratch view of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TestStatus {
    /// Its name.
    pub name: String,
    /// The checkpoint that it shows.
    pub checkpoint: Option<u64>,
    /// Milliseconds since it was opened; absent if it has ended.
    pub age_ms: Option<u64>,
    /// Where its disks are found.
    pub uris: Vec<String>,
    /// Bytes of pre-images that are kept for it alone, of all disks.
    pub kept_bytes: u64,
    /// Bytes that were written to it, of all disks; at most so many.
    pub written_bytes: u64,
    /// Why it has ended by itself; absent while it is open.
    pub ended: Option<String>,
}

/// How far a background activity has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Progress {
    /// Bytes done.
    pub done: u64,
    /// Bytes in all.
    pub total: u64,
}

/// A copy to the secondary that runs, over all disks.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ResyncStatus {
    /// Bytes that have been copied, or found equal.
    pub done: u64,
    /// Bytes that there were to look at.
    pub total: u64,
    /// Bytes a second in the last seconds.
    pub rate: u64,
    /// Seconds that the rest takes at this rate; absent while nothing moves.
    pub left_s: Option<u64>,
    /// The fixed limit in bytes a second, if there is one.
    pub rate_limit: Option<u64>,
    /// The guest's writes may take so many times as long as without the copy, if that is limited.
    pub latency_factor: Option<f64>,
    /// Bytes a second that both limits allow now; absent: as fast as it can.
    pub paced_rate: Option<u64>,
}

/// A failure that no guest was told of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ErrorStatus {
    /// Name of the disk; empty if it concerns the group.
    pub disk: String,
    /// What was being done.
    pub operation: String,
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
    /// Linux error number.
    pub errno: i32,
    /// In words.
    pub message: String,
    /// How often it was seen.
    pub count: u64,
    /// Seconds since the epoch, first and last time.
    pub first_s: u64,
    /// See `first_s`.
    pub last_s: u64,
}

/// Totals since the process started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Counters {
    /// Guest writes, zeroes and trims.
    pub guest_writes: u64,
    /// Bytes of them.
    pub guest_write_bytes: u64,
    /// Writes forwarded and confirmed (primary) or received and done (secondary).
    pub replicated_writes: u64,
    /// Bytes of them.
    pub replicated_bytes: u64,
    /// Checkpoints committed.
    pub checkpoints: u64,
    /// How long forwarding was held for the last cut, in microseconds.
    pub last_pause_us: u64,
    /// Bytes of pre-images written (secondary).
    pub preimage_bytes: u64,
    /// Bytes that copies have compared by hashes (primary).
    #[serde(default)]
    pub compared_bytes: u64,
    /// Bytes of them that differed, at most, and were sent.
    #[serde(default)]
    pub differing_bytes: u64,
}

/// Bytes as people read them: `0 B`, `512 B`, `64 KiB`, `1.5 GiB`.
pub fn size_text(count: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut unit = 0;
    let mut scale = 1u64;
    while unit + 1 < UNITS.len() && count / scale >= 1024 {
        unit += 1;
        scale <<= 10;
    }
    let name = UNITS[unit];
    if count.is_multiple_of(scale) {
        return format!("{} {name}", count / scale);
    }
    let tenths = u128::from(count) * 10 / u128::from(scale);
    format!("{}.{} {name}", tenths / 10, tenths % 10)
}

#[cfg(test)]
mod tests {
    use super::size_text;

    #[test]
    fn sizes_are_read_at_a_glance() {
        let table = [
            (0, "0 B"),
            (512, "512 B"),
            (1023, "1023 B"),
            (64 << 10, "64 KiB"),
            ((3 << 30) / 2, "1.5 GiB"),
            (u64::MAX, "15.9 EiB"),
        ];
        for (number, text) in table {
            assert_eq!(size_text(number), text);
        }
    }
}
