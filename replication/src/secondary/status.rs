use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::disk::ReplicaDisk;
use super::durable::START_AGAIN;
use super::group::{Core, Group};
use super::plain::LAPSED;
use super::rejoin::Refused;
use crate::link::RefusalKind;
use crate::node::Stage;
use crate::state::{Record, SecondaryRecord};
use crate::status::{
    Counters, Differences, DiskState, DiskStatus, LinkState, Role, Status, TlsStatus,
};

impl Group {
    /// The state of this side; never waits for a disk or a peer.
    pub(crate) fn status(&self) -> Status {
        // First: what comes meanwhile may be in the status already, and is told again.
        let sequence = self.events.sequence();
        let record = self.record();
        let secondary = record.secondary.clone();
        let replication = self.stage();
        let core = self.core();
        let has_checkpoint = record.has_checkpoint();
        let explained = self.explain_record().or_else(|| self.explain_plain(has_checkpoint));
        let (reason, advice) = match explained {
            Some((reason, advice)) => (Some(reason), Some(advice)),
            None => match self.broken() {
                Some(reason) => (Some(reason), Some(START_AGAIN.to_owned())),
                None => explain(&record, &core, replication),
            },
        };
        let differences = core.refused.as_ref().filter(|r| r.kind != RefusalKind::Other);
        let differences = differences.map(|refused| Differences {
            here: core.own_maps.show(self.disks().iter().map(|d| &*d.name)),
            there: refused.theirs.clone(),
        });
        Status {
            sequence,
            name: self.config.name.clone(),
            role: Role::Secondary,
            replication,
            pid: std::process::id(),
            set: record.set.map(|s| s.to_string()),
            cur: record.cur.map(|c| c.to_string()),
            epoch: core.receiving.0,
            checkpoint: record.com.map(|c| c.epoch.0),
            checkpoint_age_ms: core.last_commit.map(elapsed_ms),
            peer: core.peer.clone(),
            link: core.link,
            tls: tls(&core),
            last_contact_ms: core.last_contact.map(elapsed_ms),
            reason,
            advice,
            differences,
            ack: core.session_is_sync().map(|s| if s { "sync" } else { "async" }.to_owned()),
            durability: self.side.config.durability.as_str().to_owned(),
            peer_durability: core.peer_durability.map(|d| d.as_str().to_owned()),
            promotable: Some(has_checkpoint),
            latest_ok: Some(secondary.latest_ok),
            lapsed: match self.config.plain_primary {
                true => LAPSED.iter().map(|text| (*text).to_owned()).collect(),
                false => Vec::new(),
            },
            guest_stopped: self.guest.is_stopped(),
            held_writes: None,
            held: None,
            test: self.test_status(core.test.as_ref()),
            resync: None,
            disks: self.disks().iter().map(|d| disk_status(d, &secondary, &core)).collect(),
            errors: self.errors.list(),
            counters: Counters {
                replicated_writes: self.counters.writes.load(Ordering::Relaxed),
                replicated_bytes: self.counters.write_bytes.load(Ordering::Relaxed),
                checkpoints: self.counters.checkpoints.load(Ordering::Relaxed),
                last_pause_us: self.counters.last_pause_us.load(Ordering::Relaxed),
                preimage_bytes: self.disks().iter().map(|d| d.preimage_bytes()).sum(),
                ..Counters::default()
            },
        }
    }
}

/// How the link is encrypted, while there is one.
fn tls(core: &Core) -> Option<TlsStatus> {
    let peer = core.link_tls.as_ref().filter(|_| core.link == LinkState::Connected)?;
    Some(TlsStatus::from(&**peer))
}

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn disk_status(disk: &ReplicaDisk, secondary: &SecondaryRecord, core: &Core) -> DiskStatus {
    let split = core.refused.as_ref().is_some_and(|r| r.kind == RefusalKind::SplitBrain);
    let incomplete = secondary.inconsistent || secondary.outdated;
    let state = match (incomplete, core.link) {
        (_, LinkState::Refused) if split => DiskState::SplitBrain,
        (true, LinkState::Connected) => DiskState::Resyncing,
        _ if disk.joining().is_some() => DiskState::Joining,
        (true, _) if secondary.outdated => DiskState::Outdated,
        (true, _) => DiskState::Inconsistent,
        (false, LinkState::Connected) if core.copying => DiskState::Resyncing,
        (false, LinkState::Connected) => DiskState::InSync,
        (false, _) => DiskState::Disconnected,
    };
    DiskStatus {
        name: disk.name.clone(),
        file: disk.file.clone(),
        size: disk.size(),
        state,
        bytes_behind: 0,
        progress: None,
        merging: None,
        hidden_bytes: Some(disk.hidden_bytes()),
        guest_wrote: Some(disk.guest_wrote()),
    }
}

/// Why the state is not healthy, and what gets out of it.
fn explain(record: &Record, core: &Core, stage: Stage) -> (Option<String>, Option<String>) {
    let secondary = &record.secondary;
    if core.link == LinkState::Refused
        && let Some(refused) = &core.refused
    {
        return explain_refusal(record, refused);
    }
    let reason = core.reason.clone();
    if let Some(full) = core.full.clone() {
        return (
            Some(format!("no room for pre-images, and so nothing more is replicated: {full}")),
            Some(
                "make room beside the state directory, or give --buffer-limit more; to give the \
                 last checkpoint up for it: brep resync --discard-checkpoint, on the primary"
                    .to_owned(),
            ),
        );
    }
    if core.link == LinkState::Connected {
        return (reason, None);
    }
    let held = record.com.filter(|_| record.has_checkpoint());
    let state = match held {
        Some(com) => format!("holds checkpoint {}", com.epoch),
        None if secondary.outdated => {
            "was a primary, and lacks what the other side has written since: cannot be promoted"
                .to_owned()
        }
        None if record.set.is_none() => "no primary has ever connected".to_owned(),
        None => "no complete copy yet, cannot be promoted".to_owned(),
    };
    let advice = match (stage == Stage::Running, held.is_some()) {
        (true, true) => {
            "if the primary is gone for good: brep failover; if it returns, what was missed is \
             copied"
        }
        (true, false) if record.set.is_none() => "start brep primary with --peer",
        (true, false) if secondary.outdated => {
            "let the new primary connect; if this side's data are to be kept, stop it and start it \
             with brep primary"
        }
        (true, false) => "let the primary connect again: the copy begins anew",
        (false, true) => "brep start; or, if the primary is gone for good: brep failover",
        (false, false) => "brep start",
    };
    let reason = match stage {
        Stage::None => Some("replication has not been started".to_owned()),
        _ => reason,
    };
    let reason = match reason {
        Some(reason) => format!("{reason}; {state}"),
        None => state,
    };
    (Some(reason), Some(advice.to_owned()))
}

/// What the primary has said, and what can be done about it on this side.
fn explain_refusal(record: &Record, refused: &Refused) -> (Option<String>, Option<String>) {
    let reason = format!("the primary refused: {}", refused.reason);
    let given_up = record.secondary.discard_local;
    let advice = match refused.kind {
        RefusalKind::SplitBrain if record.is_primary() => Some(
            "to give this side's writes up: stop it, and start it with --discard-local; to keep \
             them: do the same on the other side",
        ),
        RefusalKind::StaleSecondary if record.is_primary() => Some(
            "stop this side, and start it as the other's secondary: brep secondary --discard-local",
        ),
        RefusalKind::StalePrimary if record.has_checkpoint() => Some(
            "this side has more: stop the primary, and brep failover here; or give up what it \
             lacks: brep resync --discard-local",
        ),
        RefusalKind::SplitBrain if record.has_checkpoint() && !given_up => Some(
            "to keep this side's checkpoint: stop the primary, and brep failover here; to give up \
             what the primary lacks: brep resync --discard-local (--dry-run only says what would be \
             lost)",
        ),
        RefusalKind::StalePrimary if record.is_primary() => None,
        RefusalKind::Other => refused.advice.as_deref(),
        _ if given_up => refused.advice.as_deref(),
        _ => Some(
            "to give up what the primary lacks: brep resync --discard-local (--dry-run only says \
             what would be lost); to keep it: stop this side and start it with brep primary",
        ),
    };
    (Some(reason), advice.map(str::to_owned))
}
