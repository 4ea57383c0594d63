use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::config::Durability;
use crate::state::RemovedDisk;
use crate::status::Written;
use crate::{Commit, Epoch, Generation, SetId};

/// The version of the messages; a side that gets another refuses and says so.
pub const LINK_VERSION: u32 = 4;

/// Most ranges in one message.
pub const RANGES_MAX: usize = 4096;

/// Longest frame, in bytes.
pub const FRAME_LEN_MAX: u32 = 1 << 20;

/// A message of the link. On the wire: a big-endian u32 with the length of what follows, then a
/// JSON object whose `type` names the message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "type", deny_unknown_fields)]
pub enum Message {
    /// Primary: who I am and what I have. The first message.
    Hello(Box<Hello>),
    /// Secondary: who I am and what I have. The answer, unless it is [`Message::Refuse`].
    HelloAnswer(Box<HelloAnswer>),
    /// Either: no session, and why; the connection ends.
    Refuse {
        /// What the operator has to know.
        reason: String,
        /// The command that resolves it.
        advice: Option<String>,
        /// What it means for this side's disks.
        kind: RefusalKind,
        /// What the sender has written that this side lacks, where both have something; one entry
        /// a disk.
        written: Vec<Written>,
    },
    /// Primary, between hello and start: which ranges of a disk have you written, from `offset` on?
    RangesRequest {
        /// Index of the disk in hello's order.
        disk: u32,
        /// First byte that is of interest.
        offset: u64,
    },
    /// Secondary: the answer, in ascending order, at most [`RANGES_MAX`].
    Ranges {
        /// As in the request.
        disk: u32,
        /// First byte and number of bytes of each range.
        ranges: Vec<(u64, u64)>,
        /// Where the next request begins; none: these were the last.
        next: Option<u64>,
    },
    /// Primary: the session begins on these terms.
    Start {
        /// Identity of the set; a blank secondary takes it over.
        set: SetId,
        /// The line of writes.
        cur: Generation,
        /// The epoch of the first write. Above every epoch of either hello.
        epoch: Epoch,
        /// What the primary is going to copy.
        copy: CopyMode,
        /// Guest writes are acknowledged only when the secondary has them.
        sync: bool,
        /// The secondary gives its last checkpoint up, and keeps no pre-images before the next.
        discard_checkpoint: bool,
    },
    /// Secondary: ready for data connections that present this token.
    Started {
        /// Binds data connections to this session.
        token: Uuid,
    },
    /// Primary: a copy begins in the middle of a session; every session begins with one.
    CopyBegun,
    /// Primary: the copy is complete; the next commit makes the secondary promotable.
    CopyDone,
    /// Primary: every write of `epoch` has been acknowledged by you; nothing is in flight.
    Cut {
        /// The epoch that ends.
        epoch: Epoch,
        /// Disks that join, by their indices in hello's order: their first copy has not ended, and
        /// they are no part of this checkpoint.
        without: Vec<u32>,
    },
    /// Secondary: pre-images of the next epoch go to the next buffer; it may flow.
    CutDone {
        /// The epoch that has ended.
        epoch: Epoch,
    },
    /// Secondary: the checkpoint is persistent.
    Committed {
        /// The epoch that it ends with.
        epoch: Epoch,
    },
    /// Secondary: the cut was not made, and the epoch goes on.
    CutFailed {
        /// The epoch that goes on.
        epoch: Epoch,
        /// Why.
        reason: String,
    },
    /// Primary: send me the hashes of these chunks.
    HashRequest {
        /// Index of the disk in hello's order.
        disk: u32,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
        /// Bytes a hash; the last chunk may be shorter.
        chunk: u32,
    },
    /// Secondary: the SHA-256 of each chunk, as hexadecimal digits, or why there are none.
    HashAnswer {
        /// As in the request.
        disk: u32,
        /// As in the request.
        offset: u64,
        /// One a chunk.
        hashes: Vec<String>,
        /// The read failed.
        error: Option<String>,
    },
    /// Secondary: its operator asks for a checkpoint.
    CheckpointRequest {
        /// Echoed in the answer.
        id: u64,
    },
    /// Primary: what became of it.
    CheckpointAnswer {
        /// Of the request.
        id: u64,
        /// The epoch that was committed.
        epoch: Option<Epoch>,
        /// Why none was.
        error: Option<String>,
        /// The state forbade it: nothing was tried.
        refused: bool,
    },
    /// Secondary: its operator asks for a switchover. The answer is [`Message::CheckpointAnswer`] if
    /// there is none, else [`Message::TakeOver`].
    SwitchoverWish {
        /// Echoed in the answer.
        id: u64,
        /// It is not begun later than so many milliseconds from now.
        limit_ms: u64,
    },
    /// Primary: could you take over now?
    SwitchoverRequest,
    /// Secondary: yes, or why not.
    SwitchoverAnswer {
        /// Why not.
        refusal: Option<String>,
    },
    /// Primary: take over. My record says that I am a secondary, and nothing is in flight.
    TakeOver {
        /// The checkpoint that holds everything.
        epoch: Epoch,
    },
    /// Secondary: these are my disks now; one has come or gone.
    Disks {
        /// As in hello.
        disks: Vec<DiskInfo>,
    },
    /// Secondary: I am about to be promoted; acknowledge nothing more for the moment.
    Promoting,
    /// Primary: nothing more is acknowledged for the moment.
    Holding,
    /// Secondary: I was not promoted; go on.
    NotPromoted,
    /// Either: I am alive.
    Heartbeat,
    /// Either: I am going away.
    Stop {
        /// Why.
        reason: StopReason,
    },
}

impl Message {
    /// No session, and nothing more than that.
    pub fn refusal(reason: String, advice: Option<&str>) -> Self {
        let advice = advice.map(str::to_owned);
        Message::Refuse { reason, advice, kind: RefusalKind::Other, written: Vec::new() }
    }
}

/// What a refusal means for the disks of the side that is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RefusalKind {
    /// Nothing: something has to be set right, or to be asked for.
    Other,
    /// The primary's data are older than the secondary's.
    StalePrimary,
    /// The secondary has to be brought to the primary's line of writes, and what it wrote itself is
    /// lost by that.
    StaleSecondary,
    /// Both sides have written what the other lacks.
    SplitBrain,
}

/// Why a side ends the session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StopReason {
    /// The process ends.
    Shutdown,
    /// Replication is stopped by command.
    Stopped,
    /// The secondary has been promoted.
    Promoted,
    /// The session is replaced by a newer one.
    Replaced,
}

/// What the primary is going to copy before checkpoints are taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyMode {
    /// Every byte.
    Full,
    /// What differs, found by comparing hashes.
    Compare,
    /// What was written since the last checkpoint, and what the secondary never had.
    Changed,
    /// What the secondary never had: it is the one of the last session, and has the rest.
    Missing,
}

/// What either side says of itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Side {
    /// Name of the side.
    pub name: String,
    /// A new one for every run of the process.
    pub run: Uuid,
    /// Identity of the set; none: blank.
    pub set: Option<SetId>,
    /// The line of writes.
    pub cur: Option<Generation>,
    /// Where it left the one before.
    pub fork: Option<Commit>,
    /// The last committed checkpoint, as far as this side knows.
    pub com: Option<Commit>,
    /// The highest epoch that was ever used.
    pub epoch: Epoch,
    /// Earlier lines with their forks.
    pub history: Vec<Commit>,
    /// A primary, or promoted.
    pub primary: bool,
    /// A secondary that has made room in a switchover, and does not know of any primary since.
    pub made_room: bool,
    /// The last session that this side has begun, by its token.
    pub session: Option<Uuid>,
    /// Names and sizes of the disks, in order.
    pub disks: Vec<DiskInfo>,
    /// Disks that were taken out of the group.
    pub removed: Vec<RemovedDisk>,
    /// What this side keeps its promises against.
    pub durability: Durability,
    /// What this side has written itself; none: it is not known.
    pub maps: Option<MapsInfo>,
}

impl Side {
    /// The lines that led to the session's, which may begin with it.
    pub fn history_before(&self, cur: Generation) -> Vec<Commit> {
        let left = self.cur.filter(|old| *old != cur);
        let left = left.map(|old| Commit { cur: old, epoch: self.epoch });
        self.history.iter().copied().chain(left).collect()
    }
}

/// What the maps of a side hold: every range in which its disks may differ from what they were at
/// some commit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct MapsInfo {
    /// The commit; none: from the beginning on.
    pub since: Option<Commit>,
    /// Bytes, by granules: at most so many were written since. One number a disk, in order.
    pub bytes: Vec<u64>,
}

/// One disk, as hello tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskInfo {
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size: u64,
    /// It can be made larger, as the primary's is.
    pub growable: bool,
    /// Secondary: it is not part of the checkpoint yet, and has not been since it was added under
    /// this id. Primary: what its maps say is true of the disk that was added under this id.
    pub joining: Option<Uuid>,
}

/// The primary's first message.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Hello {
    /// Version of the messages.
    pub version: u32,
    /// After so many milliseconds of silence the primary counts the secondary as lost.
    pub timeout_ms: u64,
    /// Who speaks.
    pub side: Side,
}

/// The secondary's answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct HelloAnswer {
    /// Version of the messages.
    pub version: u32,
    /// After so many milliseconds of silence the secondary counts the primary as lost.
    pub timeout_ms: u64,
    /// Who speaks.
    pub side: Side,
    /// There is a guest on the secondary: checkpoints are the manager's.
    pub guest: bool,
    /// The disks hold a mixture: there is no checkpoint.
    pub inconsistent: bool,
    /// The secondary's host lost power: what the disks hold is not what was acknowledged.
    pub power_lost: bool,
    /// It was a primary, and has not been brought to another one's line since.
    pub outdated: bool,
    /// Its operator gives up what it has and the primary lacks.
    pub discard_local: bool,
}
