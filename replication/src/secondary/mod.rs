//! The secondary: receives the writes of a primary, keeps what they overwrite since the last
//! checkpoint, and can become the disk.
mod buffers;
mod commands;
mod commit;
mod disk;
mod disks;
mod durable;
mod exports;
mod failover;
mod group;
mod growth;
mod held;
mod hold;
mod link;
mod manager;
mod named;
mod opening;
mod plain;
#[cfg(feature = "simulation")]
mod planted;
mod rejoin;
mod reserve;
mod room;
mod scratch;
mod session;
mod status;
mod tag;
mod test_view;
mod unfinished;

use std::sync::Arc;
use std::time::Duration;

use brep_nbd::Endpoint;
use brep_nbd::server::{Exports, Server};
use tokio_util::sync::CancellationToken;

pub(crate) use self::buffers::remove_buffers;
use self::commands::SecondaryCommands;
pub(crate) use self::disk::ReplicaDisk;
use self::exports::{GuestExports, PeerExports};
pub(crate) use self::failover::{Wanted, repeated};
pub(crate) use self::group::Group;
pub(crate) use self::hold::NOTHING_HELD;
pub(crate) use self::rejoin::{Refused, check as check_return};
use crate::commands::Service;
use crate::link::StopReason;
use crate::side::Side;
use crate::tls::Exposure;
use crate::{Error, Result};

pub(crate) use link::{hash_hex, write_link};
pub use rejoin::{Discard, would_discard};

/// The time in which requests in flight have to end at a clean stop.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Runs a secondary, or one that was promoted and whose merge has not ended, until the side ends.
pub(crate) async fn run(side: &Arc<Side>) -> Result<()> {
    let listen = side.listen_address()?;
    let group = Group::open(side).await?;
    side.note_group(&group);

    let allowed = CancellationToken::new();
    let exports = Arc::new(PeerExports(Arc::clone(&group)));
    let exposure = side.config.exposure();
    let service = Service::new(exports, allowed.clone(), exposure.clone(), side.events.clone());
    group.serve_with(&service);
    group.reserve_room().await;
    side.commands(Some(Arc::new(SecondaryCommands::new(&group, &service))));
    // Before a guest can connect: its writes are to be counted.
    group.resume_promotion().await?;
    service.serve(listen, &group.disk_names()).await?;
    let guests = match &side.config.guest_listen {
        Some(address) => {
            let exports = Arc::new(GuestExports(Arc::clone(&group)));
            Some(serve(address, exports, &exposure).await?)
        }
        None => None,
    };
    group.prepare_plain().await?;
    tokio::spawn(Arc::clone(&group).finish_switchover());
    side.serve_control()?;
    // Nobody is served before all is ready: a plain primary that went away again would be missed.
    allowed.cancel();
    tracing::info!(name = side.config.name, "secondary ready");

    side.leaving().cancelled().await;
    group.guest.end();
    let result = group.end_session(StopReason::Shutdown).await;
    service.shut_down().await;
    if let Some(server) = guests {
        server.shutdown(STOP_GRACE).await;
    }
    result.and(group.close().await)
}

async fn serve(
    endpoint: &Endpoint,
    exports: Arc<dyn Exports>,
    exposure: &Exposure,
) -> Result<Arc<Server>> {
    let server = Server::new(exports, exposure.server_config(endpoint));
    let listener = Server::bind(endpoint).await.map_err(|e| Error::failed(e.to_string()))?;
    let serving = Arc::clone(&server);
    tokio::spawn(async move { serving.serve(listener).await });
    Ok(server)
}
