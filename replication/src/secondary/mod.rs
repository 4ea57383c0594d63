//! The secondary: receives the writes of a primary, keeps what they overwrite since the last
//! checkpoint, and can become the disk.
mod buffers;
mod commands;
mod disk;
mod exports;
mod failover;
mod group;
mod link;
mod manager;
mod named;
mod opening;
mod plain;
mod rejoin;
mod session;
mod status;
mod tag;

use std::sync::Arc;
use std::time::Duration;

use brep_nbd::Endpoint;
use brep_nbd::server::{Exports, Server, ServerConfig};
use tokio_util::sync::CancellationToken;

use self::commands::SecondaryHandler;
use self::exports::{GuestExports, PeerExports};
use self::group::Group;
use crate::commands::Service;
use crate::config::SecondaryConfig;
use crate::control::EventBus;
use crate::daemon;
use crate::link::StopReason;
use crate::{Error, Result};

pub(crate) use link::{hash_hex, write_link};
pub use rejoin::{Discard, would_discard};

/// The time in which requests in flight have to end at a clean stop.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Runs a secondary until `shutdown` is cancelled or it is told to stop. To be called on a
/// current-thread runtime of its own thread: that thread is the data path. The control socket is
/// served on another thread.
///
/// # Errors
/// Whatever keeps it from starting, with the file or address and what to do; and what keeps it
/// from stopping cleanly.
pub async fn run(config: SecondaryConfig, shutdown: CancellationToken) -> Result<()> {
    daemon::prepare(&config.state_dir, &config.disks)?;
    let mut addresses = vec![&config.listen];
    addresses.extend(&config.guest_listen);
    daemon::check_plaintext(&addresses, config.allow_plaintext)?;
    let control = daemon::control_path(&config.control, &config.state_dir);
    let events = EventBus::new();
    let group = Group::open(config, events.clone(), shutdown.clone()).await?;

    let allowed = CancellationToken::new();
    allowed.cancel();
    let mut servers = Vec::new();
    let listen = group.config.listen.clone();
    let exports = Arc::new(PeerExports(Arc::clone(&group)));
    let service = Service::new(exports, allowed, group.config.allow_plaintext, events.clone());
    service.serve(&listen, &group.disk_names()).await?;
    if let Some(guest) = group.config.guest_listen.clone() {
        servers.push(serve(&guest, Arc::new(GuestExports(Arc::clone(&group)))).await?);
    }
    group.resume_promotion().await?;
    group.prepare_plain().await?;
    let handler = SecondaryHandler {
        group: Arc::clone(&group),
        data: tokio::runtime::Handle::current(),
        service: Arc::clone(&service),
    };
    let control = daemon::ControlThread::spawn(control, Arc::new(handler), events)?;
    tracing::info!(name = group.config.name, "secondary ready");

    shutdown.cancelled().await;
    group.guest.end();
    let mut result = group.end_session(StopReason::Shutdown).await;
    service.shut_down().await;
    for server in servers {
        server.shutdown(STOP_GRACE).await;
    }
    result = result.and(group.close().await);
    control.stop();
    result
}

async fn serve(endpoint: &Endpoint, exports: Arc<dyn Exports>) -> Result<Arc<Server>> {
    let server = Server::new(exports, ServerConfig::default());
    let listener = Server::bind(endpoint).await.map_err(|e| Error::failed(e.to_string()))?;
    let serving = Arc::clone(&server);
    tokio::spawn(async move { serving.serve(listener).await });
    Ok(server)
}
