//! The primary: serves the guest and forwards its writes.
mod ages;
mod back_off;
mod commands;
mod copy;
mod disk;
mod epochs;
mod establish;
mod group;
mod hello;
mod link;
mod manager;
mod pace;
mod plain;
mod progress;
mod session;
mod status;

use std::sync::Arc;
use std::time::Duration;

use brep_hbitmap::MapSet;
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, OptionErrorCode,
};
use serde_json::json;
use tokio::sync::{mpsc, watch};

use self::back_off::{BackOff, Tried};
use self::commands::PrimaryCommands;
pub(crate) use self::disk::PrimaryDisk;
use self::establish::{Attempt, establish};
pub(crate) use self::group::{Group, MapsOf, Since, check_role, distrust};
use self::hello::Refusal;
use self::session::CheckpointRequest;
pub(crate) use self::session::RequestKind;
use crate::commands::{Opened, Service};
use crate::config::{PeerAddress, PeerKind};
use crate::link::{RefusalKind, Side as Introduction, StopReason};
use crate::secondary::Refused;
use crate::side::Side;
use crate::status::{Differences, LinkState};
use crate::{Error, Result};

/// The time in which requests in flight have to end at a clean stop.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Runs a primary whose disks are their images, until the side ends.
pub(crate) async fn run(side: &Arc<Side>) -> Result<()> {
    let address = side.guest_address()?;
    let group = Group::open(side).await?;
    side.note_group(&group);
    let exports = Arc::new(GuestExports(Arc::clone(&group)));
    let allowed = group.guest_allowed.clone();
    let service = Service::new(exports, allowed, side.config.exposure(), side.events.clone());
    service.serve(address, &group.disk_names()).await?;
    let primary = Primary::start(&group, &service);
    side.serve_control()?;
    tracing::info!(name = side.config.name, "primary ready");

    side.leaving().cancelled().await;
    group.guest.end();
    // Guests first: what they were told is replicated, if there is a peer.
    service.shut_down().await;
    primary.end().await.close(Ok(())).await
}

/// A primary at work: it keeps the pair together, and carries out commands.
pub(crate) struct Primary {
    group: Arc<Group>,
    replicating: tokio::task::JoinHandle<()>,
}

impl Primary {
    /// Connects to the peer, if there is one, and takes commands.
    pub(crate) fn start(group: &Arc<Group>, service: &Arc<Service>) -> Self {
        let was_connected = {
            let record = group.record();
            record.primary.had_peer && !record.primary.alone
        };
        if !was_connected {
            group.allow_guest(false);
        } else if group.config.force_lonely {
            tracing::warn!("the guest is served without the secondary, by --force-lonely");
            group.allow_guest(true);
        } else if group.config.peer_kind == PeerKind::Plain {
            // There is no hello to wait for: that nobody was promoted is the manager's to know.
            group.allow_guest(true);
        }
        let replicating = tokio::spawn(replicate(Arc::clone(group), group.take_requests()));
        group.commands(Some(Arc::new(PrimaryCommands::new(group, service))));
        Primary { group: Arc::clone(group), replicating }
    }

    /// Its disks.
    pub(crate) fn group(&self) -> &Arc<Group> {
        &self.group
    }

    /// What hello tells of this side.
    pub(crate) fn introduce(&self) -> Introduction {
        self.group.introduce()
    }

    /// Looks at the maps of a disk.
    pub(crate) fn with_maps<T>(&self, disk: usize, look: impl FnOnce(&MapSet) -> T) -> Option<T> {
        self.group.with_maps(disk, look)
    }

    /// Another primary came, and found that the two are no pair. While there is a session that
    /// concerns nobody here.
    pub(crate) fn refused_by(&self, peer: &str, refused: &Refused) {
        let here = self.group.written();
        let mut core = self.group.core();
        if core.link == LinkState::Connected || refused.kind != RefusalKind::SplitBrain {
            return;
        }
        core.link = LinkState::Refused;
        core.refusal = Some(Refusal {
            kind: refused.kind,
            differences: Some(Differences { here, there: refused.theirs.clone() }),
            ..Refusal::new(
                format!("{peer} says: {}", refused.reason),
                "to give this side's writes up: stop it, and start it with brep secondary \
                 --discard-local; to keep them: do the same on the other side",
            )
        });
    }

    /// Whether guests may be served: not before it is known that no other side is the disk now.
    pub(crate) fn serves_guests(&self) -> bool {
        self.group.guest_allowed.is_cancelled()
    }

    /// Ends the session, when everything that guests were told is replicated; they are gone.
    pub(crate) async fn end(self) -> Arc<Group> {
        // Bounded by the peer timeout, if not by this.
        let _ = tokio::time::timeout(STOP_GRACE, self.group.idle()).await;
        self.group.quiesced.cancel();
        let _ = self.replicating.await;
        self.group
    }
}

/// Keeps the pair together: connects, runs the session, and tries again when it ends.
async fn replicate(group: Arc<Group>, mut requests: mpsc::Receiver<CheckpointRequest>) {
    let mut back_off = BackOff::new(group.config.slow_peer_limit.unwrap_or_default());
    let mut peers = group.watch_peer();
    let leaving = group.leaving();
    while !leaving.is_cancelled() {
        let known = peers.borrow_and_update().clone();
        // What may be undone is nothing that a secondary could follow.
        let held = group.record().held().is_some();
        let Some(peer) = known.filter(|_| !held) else {
            group.allow_guest(true);
            tokio::select! {
                biased;
                _ = peers.changed() => continue,
                () = leaving.cancelled() => return,
                () = refuse_requests(&group, &mut requests, why_alone(held)) => return,
            }
        };
        tokio::select! {
            biased;
            () = group.until_stage(true) => {}
            _ = peers.changed() => continue,
            () = leaving.cancelled() => return,
            () = refuse_requests(&group, &mut requests, "replication has not been started") => {}
        }
        let tried = attempt(&group, &peer, &mut peers, &mut requests).await;
        if leaving.is_cancelled() {
            return;
        }
        let pause = back_off.next(tried, crate::random::fraction());
        tokio::select! {
            biased;
            () = tokio::time::sleep(pause) => {}
            () = group.wake.notified() => {}
            _ = peers.changed() => {}
            () = group.until_stage(false) => {}
            () = leaving.cancelled() => {}
            () = refuse_requests(&group, &mut requests, "the secondary is not connected") => {}
        }
    }
}

/// Why there is no session, and no attempt at one.
fn why_alone(held: bool) -> &'static str {
    if held {
        "the failover is held: brep failover --commit, or --rollback"
    } else {
        "there is no peer"
    }
}

/// Tries to connect, and runs the session if that works.
async fn attempt(
    group: &Arc<Group>,
    peer: &PeerAddress,
    peers: &mut watch::Receiver<Option<PeerAddress>>,
    requests: &mut mpsc::Receiver<CheckpointRequest>,
) -> Tried {
    let leaving = group.leaving();
    let connecting = tokio::select! {
        // A stop first: once it has been answered the peer gets nothing more.
        biased;
        () = group.until_stage(false) => return Tried::Failed,
        () = leaving.cancelled() => return Tried::Failed,
        // Nor does one that is not the peer any more get anything.
        _ = peers.changed() => {
            peers.mark_changed();
            return Tried::Failed;
        }
        attempt = establish(group, peer) => attempt,
    };
    match connecting {
        Attempt::Session(session) => {
            group.allow_guest(false);
            tracing::info!(%peer, "session begun");
            group.events.emit("BREP_CONNECTED", json!({ "peer": peer.to_string() }));
            let stop = async {
                tokio::select! {
                    biased;
                    () = group.quiesced.cancelled() => StopReason::Shutdown,
                    () = group.until_stage(false) => StopReason::Stopped,
                }
            };
            let reason = session.run(requests, stop).await;
            if group.quiesced.is_cancelled() {
                // Both sides know of a clean end; this one is not alone.
                return Tried::Lost;
            }
            let left_behind = reason.left_behind;
            group.lose_peer(reason);
            if left_behind { Tried::LeftBehind } else { Tried::Lost }
        }
        Attempt::Refused(refusal) => {
            let known = group.core().refusal.as_ref() == Some(&refusal);
            if !known {
                tracing::warn!(reason = refusal.reason, "no session");
                group.events.emit("BREP_REFUSED", json!({ "reason": refusal.reason }));
            }
            if refusal.is_secondary {
                group.allow_guest(true);
            }
            let superseded = refusal.superseded;
            {
                let mut core = group.core();
                core.link = LinkState::Refused;
                core.refusal = Some(refusal);
            }
            // Nobody may let go on what is held here: `resume --lonely` would make two that write.
            if superseded && group.held_writes().is_some() && !group.is_superseded() {
                group.takeover_ends(true);
            }
            Tried::Failed
        }
        Attempt::Unreachable(error) => {
            let mut core = group.core();
            core.link = LinkState::Disconnected;
            core.reason = Some(error.to_string());
            // Who was promoted is so still when nobody hears of it.
            core.refusal.take_if(|refusal| !refusal.superseded);
            Tried::Failed
        }
    }
}

/// Answers checkpoint commands while there is no session.
async fn refuse_requests(
    group: &Group,
    requests: &mut mpsc::Receiver<CheckpointRequest>,
    why: &str,
) {
    let leaving = group.leaving();
    loop {
        tokio::select! {
            biased;
            () = leaving.cancelled() => return,
            request = requests.recv() => match request {
                Some(request) => {
                    let _ = request.answer.send(Err(Error::refused(format!(
                        "no checkpoint: {why} (see brep status)"
                    ))));
                }
                None => return std::future::pending().await,
            },
        }
    }
}

/// The answer to a guest that comes too early.
pub(crate) fn not_served() -> OptionError {
    OptionError::new(
        OptionErrorCode::Policy,
        "not served yet: the other side may be the disk now (see brep status)",
    )
}

/// What guests find.
#[derive(Debug)]
struct GuestExports(Arc<Group>);

impl Exports for GuestExports {
    fn list(&self) -> Vec<ExportDescription> {
        let describe = |d: &Arc<group::DiskPart>| ExportDescription {
            name: d.name.clone(),
            description: "replicated disk".to_owned(),
        };
        self.0.disks().iter().map(describe).collect()
    }

    fn open(&self, name: &str, _: &Arc<Connection>) -> Opened {
        let disks = self.0.disks();
        let index = match name {
            "" if disks.len() == 1 => Some(0),
            name => disks.iter().position(|d| d.name == name),
        };
        if self.0.is_superseded() {
            return Err(OptionError::new(
                OptionErrorCode::Policy,
                "the other side has been promoted: it is the disk now (see brep status)",
            ));
        }
        let Some(index) = index else {
            let names: Vec<_> = disks.iter().map(|d| d.name.as_str()).collect();
            return Err(OptionError::new(
                OptionErrorCode::Unknown,
                format!("no export {name:?}; there is {}", names.join(", ")),
            ));
        };
        let disk = PrimaryDisk::new(&self.0, Arc::clone(&disks[index]));
        let mut export = Export::new(disks[index].name.clone(), Arc::new(disk));
        // One device behind all connections: a flush covers what any of them was told.
        export.multi_conn = true;
        Ok(export)
    }
}
