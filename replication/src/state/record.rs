use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{AddedDisk, RemovedDisk};
use crate::config::{DiskConfig, Durability};
use crate::{Commit, Epoch, Generation, SetId};

/// What a side remembers between two runs. One per group of disks; a change is one atomic write.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Record {
    /// Name of the side that wrote it.
    pub name: String,
    /// Identity of the set of disks; none on a side that never met a peer.
    pub set: Option<SetId>,
    /// The line of writes.
    pub cur: Option<Generation>,
    /// Where this line left the one before: that line and its last epoch in common.
    pub fork: Option<Commit>,
    /// The last committed checkpoint.
    pub com: Option<Commit>,
    /// No epoch up to this one is used again.
    pub epoch: Epoch,
    /// Earlier lines with their forks, the newest last; bounded by [`Record::HISTORY_MAX`].
    pub history: Vec<Commit>,
    /// What this side is to its peer.
    pub role: Role,
    /// The last session that this side has begun in its role, by its token.
    pub session: Option<Uuid>,
    /// Where the other side listens, as a URI, if that was set by command.
    pub peer: Option<String>,
    /// Disks that were added by command.
    pub added: Vec<AddedDisk>,
    /// Disks that were taken out of the group, by name: a command line that has them is not
    /// followed.
    pub removed: Vec<RemovedDisk>,
    /// What it remembers as a primary.
    pub primary: PrimaryRecord,
    /// What it remembers as a secondary. A promoted one keeps its buffers until they are merged.
    pub secondary: SecondaryRecord,
    /// The last run ended by itself.
    pub clean: bool,
    /// The kernel's boot id during the last run: another one, and a run that did not end by
    /// itself, mean that power was lost.
    pub boot: Option<String>,
    /// What the last run kept its promises against.
    pub durability: Durability,
    /// A durable flush has failed in the last run: what was written before it may be lost, as if
    /// the power were.
    pub flush_failed: bool,
}

/// What a side is to its peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// A primary, from the start or by a promotion.
    Primary,
    /// A secondary, blank or replicating.
    Secondary,
}

/// What a primary remembers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct PrimaryRecord {
    /// A secondary has been connected at some time.
    pub had_peer: bool,
    /// This primary has declared its peer lost and goes on alone: a restart may serve the guest
    /// at once, and the secondary lacks something.
    pub alone: bool,
    /// Names and sizes of the disks.
    pub disks: Vec<(String, u64)>,
    /// Disks that the secondary's checkpoint lacked at the last session's begin, with the id under
    /// which the secondary had added each: the maps tell what is missing of that copy.
    pub joins: Vec<(String, Uuid)>,
}

/// What a secondary remembers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct SecondaryRecord {
    /// A first full copy, or one that gave the checkpoint up, is going on: the disks hold a
    /// mixture, and there is nothing to be promoted to.
    pub inconsistent: bool,
    /// Everything that was acknowledged to the guest while the sides were in contact is here:
    /// `failover --to latest` is possible.
    pub latest_ok: bool,
    /// The failover by which this side became the primary; none on one that never was promoted, or
    /// that is a secondary again.
    pub promotion: Option<Promotion>,
    /// The disks with their buffers.
    pub disks: Vec<DiskRecord>,
    /// No buffer with a sequence number up to this one is created again.
    pub buffer_seq: u64,
    /// Power was lost since the last session began: the disks may lack what was acknowledged.
    pub power_lost: bool,
    /// This side was a primary, and has not been brought to the line of another one since: its
    /// maps tell what it wrote. There is nothing to be promoted to. Once a copy has begun it is
    /// `inconsistent` too, until the copy's commit.
    pub outdated: bool,
    /// This side was a primary and has made room in a switchover, and nobody knows yet whether the
    /// other one has taken over. Both have the same checkpoint.
    pub made_room: bool,
    /// The operator gives up what this side has and its primary lacks; until the next commit.
    pub discard_local: bool,
}

/// One disk of a secondary, with the buffers that make its checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct DiskRecord {
    /// Name of the disk.
    pub name: String,
    /// Size in bytes.
    pub size: u64,
    /// It is not part of the checkpoint yet; the id under which it was added.
    pub joining: Option<Uuid>,
    /// The hidden disks that make the last checkpoint, the oldest first. The view at the
    /// checkpoint is the first that has a range, else the secondary disk.
    pub chain: Vec<BufferRef>,
    /// The hidden disk that the next cut switches to; empty when it was named.
    pub next: Option<BufferRef>,
    /// Where this side's guest writes.
    pub active: Option<BufferRef>,
    /// The layer that takes all writes since the promotion.
    pub top: Option<BufferRef>,
}

/// A buffer: a file in the state directory that carries the same sequence number in its tag.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BufferRef {
    /// Its sequence number, never used twice.
    pub seq: u64,
}

/// A failover.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Promotion {
    /// What the disks became.
    pub target: Target,
    /// The merge has ended: the disk files alone are the disks.
    pub merged: bool,
    /// Bytes by which `latest` and the checkpoint differed, as far as the pre-images tell.
    pub dropped_bytes: u64,
    /// It can be undone: nothing is merged yet, and there is no peer. None: it is final.
    pub held: Option<Held>,
}

/// What this side was before a failover that can be undone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct Held {
    /// Seconds since 1970 when it was promoted.
    pub since_s: u64,
    /// [`Record::cur`] before.
    pub cur: Option<Generation>,
    /// [`Record::fork`] before.
    pub fork: Option<Commit>,
    /// [`Record::history`] before.
    pub history: Vec<Commit>,
    /// [`Record::epoch`] before.
    pub epoch: Epoch,
    /// [`SecondaryRecord::made_room`] before.
    pub made_room: bool,
    /// Disks that were just being added, and have no part in it.
    pub left_out: Vec<AddedDisk>,
}

/// What a failover makes of the disks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// The last committed checkpoint, plus what this side's guest wrote since.
    Checkpoint,
    /// Everything that was received.
    Latest,
}

impl Target {
    /// The word that commands and records use.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Target::Checkpoint => "checkpoint",
            Target::Latest => "latest",
        }
    }
}

impl Record {
    /// Most lines that the history keeps.
    pub const HISTORY_MAX: usize = 64;

    /// The record of a side that has never met anybody.
    #[must_use]
    pub fn blank(name: &str, role: Role) -> Self {
        Record {
            name: name.to_owned(),
            set: None,
            cur: None,
            fork: None,
            com: None,
            epoch: Epoch(0),
            history: Vec::new(),
            role,
            session: None,
            peer: None,
            added: Vec::new(),
            removed: Vec::new(),
            primary: PrimaryRecord::default(),
            // Nothing to be promoted to before the first commit.
            secondary: SecondaryRecord {
                inconsistent: role == Role::Secondary,
                ..SecondaryRecord::default()
            },
            clean: false,
            boot: None,
            durability: Durability::Process,
            flush_failed: false,
        }
    }

    /// Whether the machine went down under the last run, or a flush failed: then what had not
    /// reached stable storage is lost, and nobody knows what that was.
    #[must_use]
    pub fn lost_power(&self, boot: Option<&str>) -> bool {
        let other_boot = self.boot.is_some() && (boot.is_none() || self.boot.as_deref() != boot);
        !self.clean && (other_boot || self.flush_failed)
    }

    /// A run begins, under this boot id if there is one that tells. Returns whether the machine
    /// [lost its power](Self::lost_power) under the last one.
    pub fn begin_run(&mut self, boot: Option<String>, durability: Durability) -> bool {
        let lost = self.lost_power(boot.as_deref());
        let kept = self.durability == Durability::Power;
        self.clean = false;
        self.flush_failed = false;
        // Nothing that is found next time equals what nobody could tell.
        self.boot = Some(boot.unwrap_or_default());
        self.durability = durability;
        // A failover that may be undone leaves a secondary.
        if lost && (self.role == Role::Secondary || self.held().is_some()) {
            // Where nothing was flushed, pre-images and what they belong to are of different
            // moments now.
            self.secondary.inconsistent |= !kept && !self.secondary.outdated;
            self.secondary.latest_ok = false;
            self.secondary.power_lost = true;
        }
        lost
    }

    /// Begins a new line of writes that leaves the present one after `last`.
    pub fn begin_line(&mut self, cur: Generation, last: Epoch) {
        if let Some(old) = self.cur {
            let fork = Commit { cur: old, epoch: last };
            self.history.push(fork);
            self.fork = Some(fork);
            self.shorten_history();
        }
        self.cur = Some(cur);
    }

    /// Begins a new line of writes with the last checkpoint: what was received after it, on its
    /// line or on later ones, is none of this side's.
    pub fn begin_line_at_checkpoint(&mut self, cur: Generation) {
        if let Some(com) = self.com {
            if let Some(line) = self.history.iter().position(|fork| fork.cur == com.cur) {
                self.history.truncate(line);
            }
            let fork = Commit { epoch: self.last_epoch_after(com), ..com };
            self.history.push(fork);
            self.fork = Some(fork);
            self.shorten_history();
        }
        self.cur = Some(cur);
    }

    /// The last epoch of checkpoint `com`'s line that this side knows of. Nothing was written in the
    /// one after it if this side made room at that checkpoint; but its secondary counts that one.
    fn last_epoch_after(&self, com: Commit) -> Epoch {
        if self.secondary.made_room { com.epoch.next() } else { com.epoch }
    }

    /// Goes over to a primary's line: its way, which led it there, becomes this side's. One that
    /// does not pass this side's checkpoint is a way of its own, which begins now.
    pub fn follow_line(&mut self, cur: Generation, history: Vec<Commit>) {
        let passes = |com: Commit| com.cur == cur || history.iter().any(|f| f.cur == com.cur);
        if self.com.is_none_or(passes) {
            self.cur = Some(cur);
            self.fork = history.last().copied();
            self.history = history;
            self.shorten_history();
        } else if self.cur != Some(cur) {
            self.begin_line(cur, self.epoch);
        }
    }

    /// A run as a primary begins: also of a side that was promoted and has been merged, or that
    /// was to become a secondary and was not changed.
    pub fn become_primary(&mut self) {
        if let Some(com) = self.com {
            self.epoch = self.epoch.max(self.last_epoch_after(com));
        }
        self.role = Role::Primary;
        self.secondary.promotion = None;
        self.secondary.outdated = false;
        self.secondary.made_room = false;
        self.secondary.discard_local = false;
    }

    /// A primary returns as a secondary: its disks, those of its last run, stay what they are until
    /// its new primary copies.
    pub fn return_as_secondary(&mut self) {
        self.role = Role::Secondary;
        self.session = None;
        self.secondary.disks = self.disks_of_primary();
        self.secondary.promotion = None;
        self.secondary.latest_ok = false;
        self.secondary.outdated = true;
        self.secondary.discard_local = false;
    }

    /// What a failover that begins now, in seconds since 1970, and leaves disks out, would have to be
    /// undone to.
    #[must_use]
    pub fn before_failover(&self, now_s: u64, left_out: &[DiskConfig]) -> Held {
        Held {
            since_s: now_s,
            cur: self.cur,
            fork: self.fork,
            history: self.history.clone(),
            epoch: self.epoch,
            made_room: self.secondary.made_room,
            left_out: left_out.iter().map(AddedDisk::of).collect(),
        }
    }

    /// A failover that is held can be undone no more.
    pub fn commit_failover(&mut self) {
        if let Some(promotion) = &mut self.secondary.promotion {
            promotion.held = None;
        }
        // There is no checkpoint any more that could be one or not.
        self.secondary.inconsistent = false;
        self.secondary.latest_ok = false;
    }

    /// Undoes a failover that is held: what was written since is given up, and this side is the
    /// secondary that it was, to which the disks are added again that were left out. The line that it
    /// had begun is never used again.
    pub fn roll_back(&mut self) {
        let Some(held) = self.held().cloned() else { return };
        self.secondary.promotion = None;
        self.role = Role::Secondary;
        self.session = None;
        (self.cur, self.fork, self.history) = (held.cur, held.fork, held.history);
        self.epoch = held.epoch;
        self.secondary.made_room = held.made_room;
        self.primary = PrimaryRecord::default();
        for disk in &mut self.secondary.disks {
            disk.top = None;
        }
        held.left_out.into_iter().for_each(|disk| self.add(disk));
    }

    /// A primary whose disks are its last checkpoint makes room for the other side.
    pub fn step_down(&mut self) {
        self.role = Role::Secondary;
        self.session = None;
        // Nothing was written in a later one: this side has gone no further on its line.
        self.epoch = self.com.map_or(self.epoch, |com| com.epoch);
        self.secondary = SecondaryRecord {
            disks: self.disks_of_primary(),
            buffer_seq: self.secondary.buffer_seq,
            made_room: true,
            ..SecondaryRecord::default()
        };
    }

    /// A primary's disks are their files alone.
    fn disks_of_primary(&self) -> Vec<DiskRecord> {
        self.primary.disks.iter().map(|(name, size)| DiskRecord::new(name, *size)).collect()
    }

    fn shorten_history(&mut self) {
        // The line of the last checkpoint stays: by it a secondary is measured that returns,
        // however often it was lost since.
        let com = self.com.map(|com| com.cur);
        while self.history.len() > Self::HISTORY_MAX {
            let oldest = self.history.iter().position(|fork| Some(fork.cur) != com);
            self.history.remove(oldest.unwrap_or(0));
        }
    }

    /// Whether there is a checkpoint that this side could be promoted to.
    #[must_use]
    pub fn has_checkpoint(&self) -> bool {
        self.com.is_some() && !self.secondary.inconsistent && !self.secondary.outdated
    }

    /// Whether this side is a primary, from the start or by a promotion.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        self.role == Role::Primary
    }

    /// The failover that can still be undone, if there is one.
    #[must_use]
    pub fn held(&self) -> Option<&Held> {
        self.secondary.promotion.as_ref()?.held.as_ref()
    }

    /// Whether a promotion, if there was one, has been merged.
    #[must_use]
    pub fn is_merged(&self) -> bool {
        self.secondary.promotion.as_ref().is_none_or(|p| p.merged)
    }

    /// Whether the disks are more than their files: a secondary's checkpoint, or a promotion that
    /// is not merged yet, needs the buffers.
    #[must_use]
    pub fn needs_buffers(&self) -> bool {
        match self.role {
            Role::Secondary => true,
            Role::Primary => self.secondary.promotion.as_ref().is_some_and(|p| !p.merged),
        }
    }
}

impl DiskRecord {
    /// A disk that has no buffers yet.
    #[must_use]
    pub fn new(name: &str, size: u64) -> Self {
        DiskRecord {
            name: name.to_owned(),
            size,
            joining: None,
            chain: Vec::new(),
            next: None,
            active: None,
            top: None,
        }
    }

    /// Every buffer that this record needs.
    pub fn buffers(&self) -> impl Iterator<Item = BufferRef> + '_ {
        self.chain.iter().copied().chain(self.next).chain(self.active).chain(self.top)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_of_the_last_checkpoint_is_never_forgotten() {
        let mut record = Record::blank("p", Role::Primary);
        record.cur = Some(Generation::random());
        record.begin_line(Generation::random(), Epoch(1));
        let line = record.cur.unwrap();
        record.com = Some(Commit { cur: line, epoch: Epoch(2) });
        for epoch in 3..200 {
            record.begin_line(Generation::random(), Epoch(epoch));
        }
        assert_eq!(record.history.len(), Record::HISTORY_MAX);
        assert_eq!(record.history[0], Commit { cur: line, epoch: Epoch(3) });
        assert_eq!(record.history.last(), record.fork.as_ref());
    }

    #[test]
    fn a_failover_that_is_rolled_back_leaves_the_secondary_that_was_there() {
        let mut before = Record::blank("s", Role::Secondary);
        let line = Generation::random();
        before.follow_line(line, vec![Commit { cur: Generation::random(), epoch: Epoch(3) }]);
        before.com = Some(Commit { cur: line, epoch: Epoch(7) });
        before.epoch = Epoch(9);
        before.secondary.inconsistent = false;
        before.secondary.latest_ok = true;
        let chain = vec![BufferRef { seq: 5 }];
        before.secondary.disks = vec![DiskRecord { chain, ..DiskRecord::new("vda", 4096) }];
        before.secondary.made_room = true;
        let held = before.before_failover(1, &[]);
        let mut record = before.clone();
        record.begin_line_at_checkpoint(Generation::random());
        record.role = Role::Primary;
        record.primary.alone = true;
        record.epoch = Epoch(11);
        record.secondary.made_room = false;
        record.secondary.disks[0].top = Some(BufferRef { seq: 6 });
        record.secondary.promotion = Some(Promotion {
            target: Target::Checkpoint,
            merged: false,
            dropped_bytes: 0,
            held: Some(held),
        });
        let mut after = record.clone();
        after.roll_back();
        assert_eq!(after, before);
        record.secondary.inconsistent = true;
        record.commit_failover();
        assert!(!record.secondary.inconsistent, "it could not be a primary any more");
        let committed = record.clone();
        record.roll_back();
        assert_eq!(record, committed, "there is nothing to be undone any more");
        assert!(committed.held().is_none() && !committed.secondary.latest_ok);
    }

    #[test]
    fn a_primary_that_returns_has_the_disks_that_it_had_as_the_primary() {
        let mut record = Record::blank("s", Role::Secondary);
        // What the merge of an earlier promotion has left.
        let joining = Some(uuid::Uuid::from_u128(1));
        let removed = DiskRecord { joining, ..DiskRecord::new("vdc", 512) };
        record.secondary.disks = vec![DiskRecord::new("vda", 4096), removed];
        record.become_primary();
        record.primary.disks = vec![("vda".to_owned(), 8192), ("vdb".to_owned(), 512)];
        record.return_as_secondary();
        let disks = [DiskRecord::new("vda", 8192), DiskRecord::new("vdb", 512)];
        assert_eq!(record.secondary.disks, disks);
    }

    #[test]
    fn a_power_loss_is_told_from_a_kill_and_from_a_clean_stop() {
        let boot = |id: &str| Some(id.to_owned());
        for durability in [Durability::Process, Durability::Power] {
            let mut record = Record::blank("s", Role::Secondary);
            record.secondary = SecondaryRecord {
                inconsistent: false,
                latest_ok: true,
                ..SecondaryRecord::default()
            };
            assert!(!record.begin_run(boot("a"), durability), "the first run");
            assert!(!record.begin_run(boot("a"), durability), "killed");
            record.clean = true;
            assert!(!record.begin_run(boot("b"), durability), "stopped, and started elsewhere");
            assert!(record.secondary.latest_ok && !record.secondary.power_lost);
            // What the next run will promise says nothing of the last one.
            assert!(record.begin_run(boot("c"), Durability::Process), "the machine went down");
            assert_eq!(record.secondary.inconsistent, durability == Durability::Process);
            assert!(!record.secondary.latest_ok && record.secondary.power_lost);
        }
    }

    #[test]
    fn a_flush_that_failed_and_a_boot_that_is_not_told_count_as_power_losses() {
        let boot = Some("a".to_owned());
        let mut record = Record::blank("s", Role::Secondary);
        record.begin_run(boot.clone(), Durability::Power);
        record.flush_failed = true;
        assert!(record.begin_run(boot.clone(), Durability::Power));
        assert!(!record.begin_run(boot.clone(), Durability::Power), "it is told once");
        assert!(record.begin_run(None, Durability::Power), "the files have moved to a server");
        assert!(record.begin_run(None, Durability::Power), "the server may have lost its power");
        record.clean = true;
        assert!(!record.begin_run(None, Durability::Power));
    }
}
