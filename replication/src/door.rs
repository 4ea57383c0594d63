use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use brep_block::{Error, ErrorKind, Operation, Result};
use tokio::sync::Notify;

/// A door that a guest's requests pass. It can be held: then new requests wait in front of it, and
/// whoever holds it waits until those inside have ended.
///
/// Passing an open door costs two atomic operations.
pub(crate) struct Door {
    name: String,
    inside: AtomicUsize,
    /// Who holds it: a bit for each [`Hold`], and [`SHUT`].
    held: AtomicU8,
    /// Somebody went out while the door was held, or it was opened.
    moved: Notify,
}

/// Why a door is held. Each reason opens for itself: the door is open when none holds it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Hold {
    /// What lies behind it is replaced.
    Switch = 1,
    /// The guest is stopped, by a command.
    Stopped = 2,
    /// The other side may take over.
    Takeover = 8,
}

/// Requests in front of the door fail: the process ends.
const SHUT: u8 = 4;

/// Counts one request inside the door.
pub(crate) struct Inside(Arc<Door>);

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.inside.fetch_sub(1, Ordering::SeqCst);
        if self.0.held.load(Ordering::SeqCst) != 0 {
            self.0.moved.notify_waiters();
        }
    }
}

impl Door {
    pub(crate) fn new(name: &str) -> Arc<Self> {
        Arc::new(Door {
            name: name.to_owned(),
            inside: AtomicUsize::new(0),
            held: AtomicU8::new(0),
            moved: Notify::new(),
        })
    }

    /// Holds new requests.
    pub(crate) fn hold_now(&self, reason: Hold) {
        self.held.fetch_or(reason as u8, Ordering::SeqCst);
    }

    /// Holds new requests and waits until none is inside.
    ///
    /// # Errors
    /// Some were still inside after `limit`; this reason holds the door no more.
    pub(crate) async fn hold(&self, reason: Hold, limit: Duration) -> Result<()> {
        self.hold_now(reason);
        let empty = async {
            loop {
                let moved = self.moved.notified();
                let mut moved = std::pin::pin!(moved);
                moved.as_mut().enable();
                if self.inside.load(Ordering::SeqCst) == 0 {
                    return;
                }
                moved.await;
            }
        };
        if tokio::time::timeout(limit, empty).await.is_err() {
            self.open(reason);
            return Err(Error::new(
                Operation::Control,
                ErrorKind::TimedOut,
                &self.name,
                format!("requests of the guest did not end within {limit:?}"),
            ));
        }
        Ok(())
    }

    /// Lets requests in again, unless the door is held for another reason.
    pub(crate) fn open(&self, reason: Hold) {
        self.held.fetch_and(!(reason as u8), Ordering::SeqCst);
        self.moved.notify_waiters();
    }

    /// Requests that wait in front of the door, now or later, fail.
    pub(crate) fn shut(&self) {
        self.held.fetch_or(SHUT, Ordering::SeqCst);
        self.moved.notify_waiters();
    }

    fn is_held(&self) -> bool {
        self.held.load(Ordering::SeqCst) & !SHUT != 0
    }

    /// Goes inside at once, if the door is not held.
    pub(crate) fn try_enter(this: &Arc<Self>) -> Option<Inside> {
        if this.is_held() {
            return None;
        }
        this.inside.fetch_add(1, Ordering::SeqCst);
        let inside = Inside(Arc::clone(this));
        // It may have been held in between; then `inside` goes out again.
        (!this.is_held()).then_some(inside)
    }

    /// Goes inside, when the door is open.
    ///
    /// # Errors
    /// The process ends, and the door is held.
    pub(crate) async fn enter(this: &Arc<Self>, operation: Operation) -> Result<Inside> {
        if let Some(inside) = Self::try_enter(this) {
            return Ok(inside);
        }
        loop {
            let opened = this.moved.notified();
            let mut opened = std::pin::pin!(opened);
            opened.as_mut().enable();
            if let Some(inside) = Self::try_enter(this) {
                return Ok(inside);
            }
            if this.held.load(Ordering::SeqCst) & SHUT != 0 {
                let text = "the guest was stopped, and brep ends";
                return Err(Error::new(operation, ErrorKind::Shutdown, &this.name, text));
            }
            opened.await;
        }
    }
}

impl fmt::Debug for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Door")
            .field("name", &self.name)
            .field("inside", &self.inside)
            .field("held", &self.held)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures_util::poll;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(5);

    #[tokio::test(start_paused = true)]
    async fn a_door_that_two_hold_opens_when_both_have_opened_it() {
        let door = Door::new("disk");
        door.hold(Hold::Stopped, LIMIT).await.unwrap();
        door.hold(Hold::Switch, LIMIT).await.unwrap();
        let mut enter = std::pin::pin!(Door::enter(&door, Operation::Read));
        door.open(Hold::Switch);
        assert!(poll!(&mut enter).is_pending());
        door.open(Hold::Stopped);
        assert!(poll!(&mut enter).is_ready());
    }

    #[tokio::test(start_paused = true)]
    async fn holding_waits_for_those_inside_and_gives_up_in_time() {
        let door = Door::new("disk");
        let inside = Door::try_enter(&door).unwrap();
        door.hold(Hold::Stopped, LIMIT).await.unwrap_err();
        assert!(Door::try_enter(&door).is_some(), "a hold that failed holds nothing");
        {
            let mut hold = std::pin::pin!(door.hold(Hold::Stopped, LIMIT));
            assert!(poll!(&mut hold).is_pending());
            drop(inside);
            hold.await.unwrap();
        }
        assert!(Door::try_enter(&door).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn requests_before_a_door_that_is_shut_fail_and_others_pass() {
        let door = Door::new("disk");
        door.hold(Hold::Stopped, LIMIT).await.unwrap();
        let mut enter = std::pin::pin!(Door::enter(&door, Operation::Write));
        assert!(poll!(&mut enter).is_pending());
        door.shut();
        assert_eq!(enter.await.err().unwrap().kind(), ErrorKind::Shutdown);
        door.open(Hold::Stopped);
        assert!(Door::try_enter(&door).is_some());
    }
}
