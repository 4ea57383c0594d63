use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::sync::Mutex;

use crate::Result;
use crate::control::EventBus;
use crate::door::{Door, Hold};

/// The time in which the guest's requests have to end when it is stopped.
const STOP_LIMIT: Duration = Duration::from_secs(30);

/// Stops and continues a side's guest: its requests, as far as they are brep's.
#[derive(Debug)]
pub(crate) struct Guest {
    /// What its requests pass.
    doors: std::sync::Mutex<Vec<Arc<Door>>>,
    /// One command at a time.
    turn: Mutex<()>,
    /// New requests are held: the guest is stopped, or is being.
    holding: AtomicBool,
    stopped: AtomicBool,
}

impl Guest {
    pub(crate) fn new(doors: Vec<Arc<Door>>) -> Self {
        Guest {
            doors: doors.into(),
            turn: Mutex::new(()),
            holding: AtomicBool::new(false),
            stopped: AtomicBool::new(false),
        }
    }

    fn doors(&self) -> Vec<Arc<Door>> {
        self.doors.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A disk has come. Its guest is stopped if that of the others is, or is just being.
    pub(crate) fn add_door(&self, door: &Arc<Door>) {
        if self.holding.load(Ordering::Acquire) {
            door.hold_now(Hold::Stopped);
        }
        self.doors.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(door));
    }

    /// A disk has gone.
    pub(crate) fn remove_door(&self, door: &Arc<Door>) {
        let mut doors = self.doors.lock().unwrap_or_else(PoisonError::into_inner);
        doors.retain(|known| !Arc::ptr_eq(known, door));
    }

    pub(crate) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Holds the guest's new requests, and returns when those before have ended and `drained` is
    /// done. A guest that is stopped stays so.
    ///
    /// # Errors
    /// Requests did not end in time; the guest goes on.
    pub(crate) async fn stop(
        &self,
        drained: impl Future<Output = ()>,
        events: &EventBus,
    ) -> Result<()> {
        let _turn = self.turn.lock().await;
        if self.is_stopped() {
            return Ok(());
        }
        self.holding.store(true, Ordering::Release);
        for door in self.doors() {
            if let Err(error) = door.hold(Hold::Stopped, STOP_LIMIT).await {
                self.open();
                return Err(error.into());
            }
        }
        drained.await;
        self.stopped.store(true, Ordering::Release);
        events.emit("STOP", Value::Null);
        Ok(())
    }

    /// Holds the guest's new requests while the other side may take over.
    ///
    /// # Errors
    /// Requests did not end in time; the guest goes on.
    pub(crate) async fn hold(&self, limit: Duration) -> Result<()> {
        for door in self.doors() {
            if let Err(error) = door.hold(Hold::Takeover, limit).await {
                self.release();
                return Err(error.into());
            }
        }
        Ok(())
    }

    /// Lets a guest go on that was held.
    pub(crate) fn release(&self) {
        self.doors().iter().for_each(|door| door.open(Hold::Takeover));
    }

    /// Lets a stopped guest go on.
    pub(crate) async fn cont(&self, events: &EventBus) {
        let _turn = self.turn.lock().await;
        if self.stopped.swap(false, Ordering::AcqRel) {
            self.open();
            events.emit("RESUME", Value::Null);
        }
    }

    fn open(&self) {
        self.holding.store(false, Ordering::Release);
        self.doors().iter().for_each(|door| door.open(Hold::Stopped));
    }

    /// The process ends: requests of a stopped guest fail instead of waiting.
    pub(crate) fn end(&self) {
        self.doors().iter().for_each(|door| door.shut());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_disk_that_comes_while_the_guest_is_being_stopped_is_held_too() {
        let [old, new] = ["vda", "vdb"].map(Door::new);
        let guest = Arc::new(Guest::new(vec![Arc::clone(&old)]));
        let inside = Door::try_enter(&old).unwrap();
        let events = EventBus::new();
        let stopping = {
            let (guest, events) = (Arc::clone(&guest), events.clone());
            tokio::spawn(async move { guest.stop(std::future::ready(()), &events).await })
        };
        while Door::try_enter(&old).is_some() {
            tokio::task::yield_now().await;
        }
        guest.add_door(&new);
        assert!(!guest.is_stopped());
        drop(inside);
        stopping.await.unwrap().unwrap();
        assert!(Door::try_enter(&new).is_none(), "stopped, and its guest writes");
        guest.cont(&events).await;
        assert!(Door::try_enter(&new).is_some());
    }
}
