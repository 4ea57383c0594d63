use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::group::{Core, Group};
use super::hello::Refusal;
use super::plain::LAPSED;
use crate::config::{Ack, PeerKind};
use crate::link::RefusalKind;
use crate::node::Stage;
use crate::state::{RESTART, Record};
use crate::status::{Counters, DiskState, DiskStatus, LinkState, Role, Status};

impl Group {
    /// The state of this side; never waits for a disk or a peer.
    pub(crate) fn status(&self) -> Status {
        // First: what comes meanwhile may be in the status already, and is told again.
        let sequence = self.events.sequence();
        let behind = self.all_bytes_behind();
        let held = self.promoted.as_ref().and_then(|s| s.held_status(behind.iter().sum()));
        let resync = self.resync_status();
        let record = self.record();
        let core = self.core();
        // A promoted side is called so until it has had a peer.
        let promoted = record.secondary.promotion.is_some() && record.session.is_none();
        let merges = self.promoted.as_ref().map(|secondary| secondary.merges());
        let parts = self.disks();
        let disks = parts.iter().enumerate().map(|(index, disk)| {
            // At the end of a role there are no maps any more.
            let behind = behind.get(index).copied().unwrap_or_default();
            let merging = merges.as_ref().and_then(|merges| *merges.get(index)?);
            let merging = merging.filter(|_| held.is_none());
            let joins = core.is_joining(disk.number);
            let is_copied = core.copying || joins;
            DiskStatus {
                name: disk.name.clone(),
                file: disk.file.clone(),
                size: disk.size(),
                state: match held {
                    Some(_) => DiskState::Held,
                    None if joins => DiskState::Joining,
                    None => disk_state(&core, &record, merging.is_some(), promoted),
                },
                bytes_behind: if promoted { 0 } else { behind },
                progress: core.copy_progress(index, behind).filter(|_| is_copied).or(merging),
                merging,
                hidden_bytes: None,
                guest_wrote: None,
            }
        });
        let disks = disks.collect();
        let (reason, advice) = self.explain(&core);
        Status {
            sequence,
            name: self.config.name.clone(),
            role: if promoted { Role::Promoted } else { Role::Primary },
            replication: self.overall_stage(),
            pid: std::process::id(),
            set: record.set.map(|s| s.to_string()),
            cur: record.cur.map(|c| c.to_string()),
            epoch: core.epoch().0,
            checkpoint: record.com.map(|c| c.epoch.0),
            checkpoint_age_ms: core.last_commit.map(elapsed_ms),
            peer: core.peer.clone(),
            link: core.link,
            tls: core.peer_tls(),
            last_contact_ms: core.last_contact.map(elapsed_ms),
            reason,
            advice,
            differences: core.refusal.as_ref().and_then(|r| r.differences.clone()),
            ack: Some(
                match self.config.ack {
                    Ack::Sync => "sync",
                    Ack::Async => "async",
                }
                .to_owned(),
            ),
            durability: self.config.durability.as_str().to_owned(),
            peer_durability: core.peer_durability.map(|d| d.as_str().to_owned()),
            promotable: promoted.then_some(true),
            latest_ok: promoted.then_some(false),
            lapsed: match self.config.peer_kind {
                PeerKind::Brep => Vec::new(),
                PeerKind::Plain => LAPSED.iter().map(|text| (*text).to_owned()).collect(),
            },
            guest_stopped: self.guest.is_stopped(),
            held_writes: self.held_writes(),
            held,
            test: None,
            resync,
            disks,
            errors: self.errors.list(),
            counters: Counters {
                guest_writes: self.counters.guest_writes.load(Ordering::Relaxed),
                guest_write_bytes: self.counters.guest_write_bytes.load(Ordering::Relaxed),
                replicated_writes: self.counters.replicated_writes.load(Ordering::Relaxed),
                replicated_bytes: self.counters.replicated_bytes.load(Ordering::Relaxed),
                checkpoints: self.counters.checkpoints.load(Ordering::Relaxed),
                last_pause_us: self.counters.last_pause_us.load(Ordering::Relaxed),
                preimage_bytes: 0,
                compared_bytes: self.counters.compared_bytes.load(Ordering::Relaxed),
                differing_bytes: self.counters.differing_bytes.load(Ordering::Relaxed),
            },
        }
    }

    fn explain(&self, core: &Core) -> (Option<String>, Option<String>) {
        if let Some(fatal) = core.fatal() {
            return (Some(fatal.to_owned()), Some(RESTART.to_owned()));
        }
        if let Some((reason, advice)) = self.explain_record() {
            return (Some(reason), Some(advice));
        }
        if self.held_writes().is_some() {
            if let Some(refusal) = core.refusal.as_ref().filter(|refusal| refusal.superseded) {
                let reason = format!("the guest's writes are held for good: {}", refusal.reason);
                return (Some(reason), refusal.advice.clone());
            }
            let why = core.refusal.as_ref().map(|r| &r.reason).or(core.reason.as_ref());
            return (
                Some(format!(
                    "the guest's writes are held until the secondary is back{}",
                    why.map_or_else(String::new, |reason| format!(": {reason}"))
                )),
                Some(how_held_writes_go_on(core)),
            );
        }
        if self.record().held().is_some() {
            return (
                Some(
                    "the failover is held: nothing is merged, and there is no secondary".to_owned(),
                ),
                Some(
                    "brep failover --commit makes it final; brep failover --rollback undoes it"
                        .to_owned(),
                ),
            );
        }
        if let Some(refusal) = &core.refusal {
            let mut reason = refusal.reason.clone();
            if !self.guest_allowed.is_cancelled() {
                reason.push_str("; the guest is not served");
                if !refusal.superseded {
                    reason.push_str(": the secondary may be the disk now");
                }
            }
            let advice = match self.stage() {
                Stage::Running => refusal.advice.clone(),
                _ => refusal.advice.as_ref().map(|advice| format!("brep start; then: {advice}")),
            };
            return (Some(reason), advice);
        }
        if let Some(reason) = self.promoted.as_ref().and_then(|s| s.core().reason.clone()) {
            return (Some(reason), None);
        }
        match core.link {
            LinkState::None => (
                Some("there is no peer: writes are not replicated".to_owned()),
                Some("brep peer set URI, when a secondary listens there".to_owned()),
            ),
            LinkState::Disconnected if self.is_superseded() => {
                let Refusal { reason, advice, .. } = Refusal::superseded();
                (Some(reason), advice)
            }
            LinkState::Disconnected if !self.guest_allowed.is_cancelled() => (
                Some(format!(
                    "the guest is not served: this side was connected when it stopped, and the \
                     secondary may have been promoted since{}",
                    core.reason.as_ref().map_or_else(String::new, |r| format!(" ({r})"))
                )),
                Some(match self.stage() {
                    Stage::Running => "start the secondary, or make it reachable".to_owned(),
                    _ => "brep start, with the secondary running and reachable".to_owned(),
                }),
            ),
            LinkState::Disconnected if self.stage() != Stage::Running => (
                Some(match self.stage() {
                    Stage::None => "replication has not been started".to_owned(),
                    _ => "replication was stopped here".to_owned(),
                }),
                Some("brep start".to_owned()),
            ),
            LinkState::Disconnected => (
                Some(core.reason.clone().unwrap_or_else(|| "not connected yet".to_owned())),
                Some("start brep secondary, or make it reachable".to_owned()),
            ),
            LinkState::Connected if core.copying => (Some("copying".to_owned()), None),
            LinkState::Connected if core.is_copying() && core.reason.is_none() => {
                let joining = self.names_of(&core.joining_disks());
                let text = format!("checkpoints leave out what joins: {}", joining.join(", "));
                (Some(text), None)
            }
            LinkState::Connected | LinkState::Refused => (core.reason.clone(), None),
        }
    }
}

/// A secondary that is there and was refused is not brought back by waiting.
fn how_held_writes_go_on(core: &Core) -> String {
    let back = core.refusal.as_ref().and_then(|refusal| refusal.advice.as_deref());
    let back = back.unwrap_or("bring the secondary back");
    format!("{back}; or, to go on without it: brep resume --lonely")
}

fn disk_state(core: &Core, record: &Record, merging: bool, promoted: bool) -> DiskState {
    match core.link {
        _ if core.fatal().is_some() => DiskState::Failed,
        // From the command to the checkpoint that makes the secondary promotable: somebody may wait.
        LinkState::Connected if core.copying || core.settling || core.again.is_some() => {
            DiskState::Resyncing
        }
        LinkState::Connected => DiskState::InSync,
        _ if merging => DiskState::Promoting,
        _ if core.is_refused(RefusalKind::SplitBrain) => DiskState::SplitBrain,
        _ if core.is_refused(RefusalKind::StalePrimary) => DiskState::Outdated,
        _ if promoted => DiskState::Promoted,
        _ if record.primary.had_peer => DiskState::Disconnected,
        _ => DiskState::Alone,
    }
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}
