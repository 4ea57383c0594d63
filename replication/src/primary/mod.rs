//! The primary: serves the guest and forwards its writes.
mod ages;
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

use brep_nbd::Endpoint;
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, OptionErrorCode,
};
use serde_json::json;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use self::commands::PrimaryHandler;
use self::disk::PrimaryDisk;
use self::establish::{Attempt, establish};
use self::group::Group;
pub(crate) use self::group::{MapsOf, Since};
use self::session::CheckpointRequest;
use crate::commands::Service;
use crate::config::{PeerKind, PrimaryConfig};
use crate::control::EventBus;
use crate::daemon;
use crate::link::StopReason;
use crate::state::PrimaryRecord;
use crate::status::LinkState;
use crate::{Error, Result};

/// The time in which requests in flight have to end at a clean stop.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Checkpoint commands that wait for their turn.
const REQUESTS_MAX: usize = 64;

/// Pauses between attempts to reach the secondary.
const RETRY_FIRST: Duration = Duration::from_millis(250);
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Runs a primary until `shutdown` is cancelled or it is told to stop. To be called on a
/// current-thread runtime of its own thread: that thread is the data path. The control socket is
/// served on another thread.
///
/// # Errors
/// Whatever keeps it from starting, with the file or address and what to do; and what keeps it
/// from stopping cleanly.
pub async fn run(config: PrimaryConfig, shutdown: CancellationToken) -> Result<()> {
    daemon::prepare(&config.state_dir, &config.disks)?;
    daemon::check_plaintext(&[&config.guest_listen], config.allow_plaintext)?;
    let control = daemon::control_path(&config.control, &config.state_dir);
    let events = EventBus::new();
    let group = Group::open(config, events.clone(), shutdown.clone()).await?;

    let exports = Arc::new(GuestExports(Arc::clone(&group)));
    let allowed = group.guest_allowed.clone();
    let service = Service::new(exports, allowed, group.config.allow_plaintext, events.clone());
    let disks: Vec<_> = group.disks().iter().map(|d| d.name.as_str()).collect();
    service.serve(&group.config.guest_listen, &disks).await?;

    let (requests, waiting) = mpsc::channel(REQUESTS_MAX);
    let replicating = tokio::spawn(replicate(Arc::clone(&group), waiting));
    let handler = PrimaryHandler {
        group: Arc::clone(&group),
        data: tokio::runtime::Handle::current(),
        requests,
        service: Arc::clone(&service),
        detached: Arc::default(),
    };
    let control = daemon::ControlThread::spawn(control, Arc::new(handler), events)?;
    tracing::info!(name = group.config.name, "primary ready");

    shutdown.cancelled().await;
    group.guest.end();
    // Guests first: what they were told is replicated, if there is a peer.
    service.shut_down().await;
    // Bounded by the peer timeout, if not by this.
    let _ = tokio::time::timeout(STOP_GRACE, group.idle()).await;
    group.quiesced.cancel();
    let _ = replicating.await;
    let result = close(&group).await;
    control.stop();
    result
}

async fn close(group: &Arc<Group>) -> Result<()> {
    let mut result = Ok(());
    for (index, disk) in group.disks().iter().enumerate() {
        let closed = disk.image.close().await;
        if closed.is_err() {
            group.distrust_maps(index);
        }
        result = result.and(closed);
    }
    result = result.and(group.close_maps());
    if result.is_ok() {
        group.update_record(|record| record.clean = true)?;
    }
    result
}

/// Keeps the pair together: connects, runs the session, and tries again when it ends.
async fn replicate(group: Arc<Group>, mut requests: mpsc::Receiver<CheckpointRequest>) {
    let PrimaryRecord { had_peer, alone, .. } = group.record().primary;
    let was_connected = had_peer && !alone;
    if !was_connected {
        group.allow_guest(false);
    } else if group.config.force_lonely {
        tracing::warn!("the guest is served without the secondary, by --force-lonely");
        group.allow_guest(true);
    } else if group.config.peer_kind == PeerKind::Plain {
        // There is no hello to wait for: that nobody was promoted is the manager's to know.
        group.allow_guest(true);
    }
    let Some(peer) = group.config.peer.clone() else {
        group.allow_guest(true);
        return refuse_requests(&group, &mut requests, "no --peer was given").await;
    };
    let mut pause = RETRY_FIRST;
    while !group.stopping.is_cancelled() {
        tokio::select! {
            biased;
            () = group.until_stage(true) => {}
            () = group.stopping.cancelled() => return,
            () = refuse_requests(&group, &mut requests, "replication has not been started") => {}
        }
        if attempt(&group, &peer, &mut requests).await {
            pause = RETRY_FIRST;
        }
        if group.stopping.is_cancelled() {
            return;
        }
        tokio::select! {
            biased;
            () = tokio::time::sleep(pause) => {}
            () = group.wake.notified() => {}
            () = group.until_stage(false) => {}
            () = group.stopping.cancelled() => {}
            () = refuse_requests(&group, &mut requests, "the secondary is not connected") => {}
        }
        pause = (pause * 2).min(RETRY_MAX);
    }
}

/// Tries to connect, and runs the session if that works. Returns whether it did.
async fn attempt(
    group: &Arc<Group>,
    peer: &Endpoint,
    requests: &mut mpsc::Receiver<CheckpointRequest>,
) -> bool {
    let connecting = tokio::select! {
        // A stop first: once it has been answered the peer gets nothing more.
        biased;
        () = group.until_stage(false) => return false,
        () = group.stopping.cancelled() => return false,
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
                return true;
            }
            group.lose_peer(&reason);
            true
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
            let mut core = group.core();
            core.link = LinkState::Refused;
            core.refusal = Some(refusal);
            false
        }
        Attempt::Unreachable(error) => {
            let mut core = group.core();
            core.link = LinkState::Disconnected;
            core.reason = Some(error.to_string());
            core.refusal = None;
            false
        }
    }
}

/// Answers checkpoint commands while there is no session.
async fn refuse_requests(
    group: &Group,
    requests: &mut mpsc::Receiver<CheckpointRequest>,
    why: &str,
) {
    loop {
        tokio::select! {
            biased;
            () = group.stopping.cancelled() => return,
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

/// What guests find.
#[derive(Debug)]
struct GuestExports(Arc<Group>);

impl Exports for GuestExports {
    fn list(&self) -> Vec<ExportDescription> {
        let describe = |d: &group::DiskPart| ExportDescription {
            name: d.name.clone(),
            description: "replicated disk".to_owned(),
        };
        self.0.disks().iter().map(describe).collect()
    }

    fn open(&self, name: &str, _: &Arc<Connection>) -> std::result::Result<Export, OptionError> {
        let disks = self.0.disks();
        let index = match name {
            "" if disks.len() == 1 => Some(0),
            name => disks.iter().position(|d| d.name == name),
        };
        let Some(index) = index else {
            let names: Vec<_> = disks.iter().map(|d| d.name.as_str()).collect();
            return Err(OptionError::new(
                OptionErrorCode::Unknown,
                format!("no export {name:?}; there is {}", names.join(", ")),
            ));
        };
        let device = Arc::clone(disks[index].image.device());
        let disk = PrimaryDisk { group: Arc::clone(&self.0), index, device };
        let mut export = Export::new(disks[index].name.clone(), Arc::new(disk));
        // One device behind all connections: a flush covers what any of them was told.
        export.multi_conn = true;
        Ok(export)
    }
}
