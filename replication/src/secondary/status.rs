use std::sync::atomic::Ordering;

use tokio::time::Instant;

use super::disk::ReplicaDisk;
use super::group::Group;
use super::plain::LAPSED;
use crate::node::Stage;
use crate::state::{Record, SecondaryRecord};
use crate::status::{Counters, DiskState, DiskStatus, LinkState, Role, Status};

impl Group {
    /// The state of this side; never waits for a disk or a peer.
    pub(crate) fn status(&self) -> Status {
        let record = self.record();
        let secondary = record.secondary.clone();
        let replication = self.stage();
        let core = self.core();
        let promoted = secondary.promotion.is_some();
        let has_checkpoint = !secondary.inconsistent && record.com.is_some();
        let (reason, advice) = match self.explain_plain(has_checkpoint).filter(|_| !promoted) {
            Some((reason, advice)) => (Some(reason), Some(advice)),
            None => explain(&record, &secondary, core.link, replication, core.reason.clone()),
        };
        Status {
            name: self.config.name.clone(),
            role: if promoted { Role::Promoted } else { Role::Secondary },
            replication,
            pid: std::process::id(),
            set: record.set.map(|s| s.to_string()),
            cur: record.cur.map(|c| c.to_string()),
            epoch: core.receiving.0,
            checkpoint: record.com.map(|c| c.epoch.0),
            checkpoint_age_ms: core.last_commit.map(elapsed_ms),
            peer: core.peer.clone(),
            link: core.link,
            last_contact_ms: core.last_contact.map(elapsed_ms),
            reason,
            advice,
            ack: core.session_is_sync().map(|s| if s { "sync" } else { "async" }.to_owned()),
            durability: "process".to_owned(),
            promotable: Some(promoted || has_checkpoint),
            latest_ok: Some(secondary.latest_ok),
            lapsed: match self.config.plain_primary && !promoted {
                true => LAPSED.iter().map(|text| (*text).to_owned()).collect(),
                false => Vec::new(),
            },
            guest_stopped: self.guest.is_stopped(),
            disks: self
                .disks()
                .iter()
                .map(|d| disk_status(d, &secondary, core.link, core.copying))
                .collect(),
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

fn elapsed_ms(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

fn disk_status(
    disk: &ReplicaDisk,
    secondary: &SecondaryRecord,
    link: LinkState,
    copying: bool,
) -> DiskStatus {
    let progress = disk.promoted().and_then(|p| p.progress());
    let state = match (&secondary.promotion, secondary.inconsistent, link) {
        (Some(_), ..) if progress.is_some() => DiskState::Promoting,
        (Some(_), ..) => DiskState::Promoted,
        (None, true, LinkState::Connected) => DiskState::Resyncing,
        (None, true, _) => DiskState::Inconsistent,
        (None, false, LinkState::Connected) if copying => DiskState::Resyncing,
        (None, false, LinkState::Connected) => DiskState::InSync,
        (None, false, _) => DiskState::Disconnected,
    };
    DiskStatus {
        name: disk.name.clone(),
        file: disk.file.clone(),
        size: disk.size,
        state,
        bytes_behind: 0,
        progress,
        hidden_bytes: Some(disk.hidden_bytes()),
        guest_wrote: Some(disk.guest_wrote()),
    }
}

/// Why the state is not healthy, and what gets out of it.
fn explain(
    record: &Record,
    secondary: &SecondaryRecord,
    link: LinkState,
    stage: Stage,
    reason: Option<String>,
) -> (Option<String>, Option<String>) {
    if secondary.promotion.is_some() {
        return (reason, None);
    }
    if link == LinkState::Connected {
        return (reason, None);
    }
    let held = record.com.filter(|_| !secondary.inconsistent);
    let state = match held {
        Some(com) => format!("holds checkpoint {}", com.epoch),
        None if record.set.is_none() => "no primary has ever connected".to_owned(),
        None => "no complete copy yet, cannot be promoted".to_owned(),
    };
    let advice = match (stage == Stage::Running, held.is_some()) {
        (true, true) => {
            "if the primary is gone for good: brep failover; if it returns, what was missed is \
             copied"
        }
        (true, false) if record.set.is_none() => "start brep primary with --peer",
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
