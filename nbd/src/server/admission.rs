use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep_until};

use super::config::ServerConfig;
use super::connection::{Connection, Stop};

/// How long a handshake may always take. Clients that all come at once, as after an outage, wait for
/// each other instead of throwing each other out.
const HANDSHAKE_TIME_MIN: Duration = Duration::from_secs(1);

/// Who is let in: few who have not said yet what they want, and many who have.
///
/// Strangers can take all the room there is for handshakes, but none of the slots of those who use
/// an export; and whoever has been at it for longest makes room for the next one.
#[derive(Debug)]
pub(super) struct Admission {
    slots: Arc<Semaphore>,
    handshakes_max: usize,
    /// By the number of the connection, so the oldest comes first.
    handshakes: Mutex<BTreeMap<u64, Handshake>>,
    changed: Notify,
}

#[derive(Debug)]
struct Handshake {
    connection: Arc<Connection>,
    since: Instant,
    /// It has come to its end, but for a slot.
    is_waiting: bool,
}

/// A connection that has used an export keeps this until it ends.
pub(super) type Slot = OwnedSemaphorePermit;

impl Admission {
    pub(super) fn new(config: &ServerConfig) -> Arc<Self> {
        Arc::new(Admission {
            slots: Arc::new(Semaphore::new(config.connections_max.min(Semaphore::MAX_PERMITS))),
            handshakes_max: config.handshakes_max.max(1),
            handshakes: Mutex::default(),
            changed: Notify::new(),
        })
    }

    /// Resolves when one more handshake may begin. Where there is no room the oldest is ended; those
    /// who only wait for a slot are not.
    pub(super) async fn room(&self) {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            match self.try_room() {
                Ok(()) => return,
                Err(None) => changed.await,
                Err(Some(time)) => tokio::select! {
                    biased;
                    () = changed => {}
                    () = sleep_until(time) => {}
                },
            }
        }
    }

    /// If there is no room: when somebody may be made to leave.
    fn try_room(&self) -> Result<(), Option<Instant>> {
        let mut handshakes = self.handshakes();
        if handshakes.len() < self.handshakes_max {
            return Ok(());
        }
        // Whoever has shown a certificate is no stranger.
        let oldest = handshakes
            .iter()
            .filter(|(_, handshake)| !handshake.is_waiting)
            .min_by_key(|(id, handshake)| (handshake.connection.tls_peer().is_some(), **id))
            .map(|(id, handshake)| (*id, handshake.since + HANDSHAKE_TIME_MIN));
        let Some((id, time)) = oldest else { return Err(None) };
        if time > Instant::now() {
            return Err(Some(time));
        }
        if let Some(oldest) = handshakes.remove(&id) {
            tracing::info!(
                peer = oldest.connection.peer(),
                "too many NBD handshakes at a time: the oldest is ended"
            );
            oldest.connection.stop(Stop::Close);
        }
        Ok(())
    }

    /// A handshake begins.
    pub(super) fn enter(self: &Arc<Self>, connection: &Arc<Connection>) -> Entrance {
        let handshake = Handshake {
            connection: Arc::clone(connection),
            since: Instant::now(),
            is_waiting: false,
        };
        self.handshakes().insert(connection.id(), handshake);
        Entrance { admission: Arc::clone(self), id: connection.id() }
    }

    fn handshakes(&self) -> MutexGuard<'_, BTreeMap<u64, Handshake>> {
        // No code that can panic runs under this lock.
        self.handshakes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A handshake, as long as it takes.
#[derive(Debug)]
pub(super) struct Entrance {
    admission: Arc<Admission>,
    id: u64,
}

impl Entrance {
    /// A slot, if there is one.
    pub(super) fn try_slot(&self) -> Option<Slot> {
        Arc::clone(&self.admission.slots).try_acquire_owned().ok()
    }

    /// Waits for a slot, in turn.
    pub(super) async fn slot(&self) -> Slot {
        if let Some(handshake) = self.admission.handshakes().get_mut(&self.id) {
            handshake.is_waiting = true;
        }
        let slot = Arc::clone(&self.admission.slots).acquire_owned().await;
        slot.expect("the semaphore is never closed")
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        self.admission.handshakes().remove(&self.id);
        self.admission.changed.notify_waiters();
    }
}
