use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brep_nbd::server::Connection;
use futures_util::future::join_all;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::disk::ReplicaDisk;
use crate::link::{Message, StopReason, timeout_ms};
use crate::primary::RequestKind;
use crate::table::{Disks, WeakDisks};
use crate::{Epoch, Error, Result};

/// Messages that wait to be sent; more than any exchange of the link has at a time.
const OUTBOX_LEN: usize = 64;

/// Checkpoints that are asked for at a time; the primary takes more.
const REQUESTS_MAX: usize = 64;

/// Data connections of a session: one a disk now, and room for several.
const SLOTS_MAX: u32 = 1024;

/// How long a promotion waits for the primary's word that it holds back what it would acknowledge.
const HOLDING_LIMIT: Duration = Duration::from_secs(1);

/// The time in which the writes of a session that ends have to end.
pub(super) const DRAIN_LIMIT: Duration = Duration::from_secs(30);

/// What became of a promotion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Promoted {
    Yes,
    No,
    /// The record could not be saved: what it holds is found out by the next start.
    Unknown,
}

/// One primary's stay: its link, and the data connections that its token binds.
#[derive(Debug)]
pub(crate) struct Session {
    pub(crate) token: Uuid,
    pub(crate) sync: bool,
    /// The longest silence of this side on the link.
    pub(crate) heartbeat_pause: Duration,
    /// The link task ends when this is cancelled.
    pub(crate) ending: CancellationToken,
    pub(crate) disks: SessionDisks,
    outbox: mpsc::Sender<Message>,
    slots: Mutex<Slots>,
    /// A replica write has failed since the last cut.
    write_failed: AtomicBool,
    requests: Mutex<BTreeMap<u64, oneshot::Sender<Result<Epoch>>>>,
    request_id: AtomicU64,
    /// This side is about to be promoted: the link stays until the primary has been told.
    promoting: AtomicBool,
    /// The primary acknowledges nothing for the moment.
    held: CancellationToken,
    /// Held from the look at whether this is still the present session to the end of a commit.
    pub(super) committing: tokio::sync::Mutex<()>,
}

/// What a session does with this side's disks.
#[derive(Debug)]
pub(crate) struct SessionDisks {
    /// All, as hello told them. One that goes takes its file with it: it may be added again.
    pub(crate) told: WeakDisks<ReplicaDisk>,
    /// Those that its checkpoints hold.
    pub(crate) taking_part: Disks<ReplicaDisk>,
    /// Those that its first checkpoint does not hold any more.
    pub(crate) leaving: WeakDisks<ReplicaDisk>,
}

impl SessionDisks {
    /// All take part.
    pub(crate) fn all(disks: Disks<ReplicaDisk>) -> Self {
        let leaving = disks.only(|_| false).downgrade();
        SessionDisks { leaving, told: disks.downgrade(), taking_part: disks }
    }
}

/// The data connections. None are bound once the session is closed.
#[derive(Debug, Default)]
struct Slots {
    closed: bool,
    bound: BTreeMap<u32, Arc<Connection>>,
}

impl Session {
    pub(crate) fn new(
        sync: bool,
        heartbeat_pause: Duration,
        disks: SessionDisks,
    ) -> (Arc<Self>, mpsc::Receiver<Message>) {
        let (outbox, messages) = mpsc::channel(OUTBOX_LEN);
        let session = Session {
            token: crate::random::uuid(),
            sync,
            heartbeat_pause,
            disks,
            ending: CancellationToken::new(),
            outbox,
            slots: Mutex::new(Slots::default()),
            write_failed: AtomicBool::new(false),
            requests: Mutex::new(BTreeMap::new()),
            request_id: AtomicU64::new(0),
            promoting: AtomicBool::new(false),
            held: CancellationToken::new(),
            committing: tokio::sync::Mutex::new(()),
        };
        (Arc::new(session), messages)
    }

    fn slots(&self) -> MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Binds a data connection to a slot. An older holder is closed first, and everything that it
    /// has started has ended before this returns: no late write of it is applied afterwards.
    pub(crate) async fn bind(&self, slot: u32, connection: &Arc<Connection>) -> Result<()> {
        if slot >= SLOTS_MAX {
            return Err(Error::usage(format!("slot {slot}: there are {SLOTS_MAX}")));
        }
        let mut drained: Option<Arc<Connection>> = None;
        loop {
            let holder = {
                let mut slots = self.slots();
                if slots.closed {
                    return Err(Error::refused("the session has ended"));
                }
                match slots.bound.get(&slot) {
                    Some(holder) if !drained.as_ref().is_some_and(|d| Arc::ptr_eq(d, holder)) => {
                        Arc::clone(holder)
                    }
                    _ => {
                        slots.bound.insert(slot, Arc::clone(connection));
                        return Ok(());
                    }
                }
            };
            // The holder keeps the slot meanwhile, so that the end of the session waits for it too.
            close_and_drain(&holder).await?;
            drained = Some(holder);
        }
    }

    /// Whether a data connection holds a slot.
    pub(crate) fn is_bound(&self, connection: &Arc<Connection>) -> bool {
        self.slots().bound.values().any(|c| Arc::ptr_eq(c, connection))
    }

    /// Tells the primary that this side is about to be promoted, and waits a moment for its word
    /// that it holds back what it would acknowledge. A primary that is gone says nothing.
    pub(crate) async fn announce_promotion(&self) {
        self.promoting.store(true, Ordering::Release);
        if self.outbox.try_send(Message::Promoting).is_err() {
            return;
        }
        let held = async {
            tokio::select! {
                biased;
                () = self.held.cancelled() => {}
                () = self.ending.cancelled() => {}
            }
        };
        let _ = tokio::time::timeout(HOLDING_LIMIT, held).await;
    }

    /// The primary acknowledges nothing for the moment.
    pub(crate) fn note_held(&self) {
        self.held.cancel();
    }

    /// Tells the primary what became of the promotion; the link ends then.
    pub(crate) fn conclude_promotion(&self, promoted: Promoted) {
        let last_words = match promoted {
            Promoted::Yes => vec![Message::Stop { reason: StopReason::Promoted }],
            Promoted::No => {
                vec![Message::NotPromoted, Message::Stop { reason: StopReason::Replaced }]
            }
            Promoted::Unknown => {
                // Nobody is to wait for a word.
                self.promoting.store(false, Ordering::Release);
                Vec::new()
            }
        };
        // Behind whatever is queued already; it ends with the link.
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            for message in last_words {
                if outbox.send(message).await.is_err() {
                    return;
                }
            }
        });
        self.ending.cancel();
    }

    /// The primary was told that this side is about to be promoted.
    pub(super) fn is_promoting(&self) -> bool {
        self.promoting.load(Ordering::Acquire)
    }

    /// Closes every data connection and waits until nothing that they started goes on. May be
    /// called again, by several at a time: success always means that all has ended. The link stays
    /// while the primary is to be told of a promotion.
    pub(crate) async fn close(&self, reason: StopReason) -> Result<()> {
        #[cfg(feature = "simulation")]
        if brep_block::plant::is(brep_block::plant::Plant::LateWriteApplied) {
            self.ending.cancel();
            return Ok(());
        }
        let promoting = self.is_promoting();
        let bound: Vec<_> = {
            let mut slots = self.slots();
            if !std::mem::replace(&mut slots.closed, true) && !promoting {
                // Best effort: the primary may be gone.
                let _ = self.outbox.try_send(Message::Stop { reason });
            }
            slots.bound.values().cloned().collect()
        };
        for connection in &bound {
            connection.close();
        }
        let drained = join_all(bound.iter().map(close_and_drain)).await;
        let result = drained.into_iter().fold(Ok(()), Result::and);
        if !promoting {
            self.ending.cancel();
        }
        self.requests().clear();
        result
    }

    /// Waits for the end of a commit that has begun. No other one begins in a session that was ended.
    ///
    /// # Errors
    /// It does not end.
    pub(crate) async fn committed(&self) -> Result<()> {
        let ended = tokio::time::timeout(DRAIN_LIMIT, self.committing.lock()).await;
        ended.map(drop).map_err(|_| {
            Error::failed(format!(
                "the last checkpoint has not been recorded for {DRAIN_LIMIT:?}; the file system of \
                 the state directory may hang"
            ))
        })
    }

    /// Cuts the primary off, without waiting for anything; the end of the session follows.
    pub(crate) fn drop_now(&self) {
        let bound: Vec<_> = self.slots().bound.values().cloned().collect();
        bound.iter().for_each(|connection| connection.close());
        self.ending.cancel();
    }

    /// Queues a message for the primary.
    pub(crate) async fn send(&self, message: Message) -> Result<()> {
        let gone = || Error::failed("the link to the primary is gone");
        self.outbox.send(message).await.map_err(|_| gone())
    }

    /// Queues a message for the primary, if there is room.
    pub(crate) fn try_send(&self, message: Message) {
        let _ = self.outbox.try_send(message);
    }

    /// Asks the primary for a checkpoint and waits for its answer.
    pub(crate) async fn request_checkpoint(&self, limit: Duration) -> Result<Epoch> {
        let request = |id| Message::CheckpointRequest { id };
        let answer = self.request(request, limit).await?;
        answer.unwrap_or_else(|| Err(RequestKind::Checkpoint.not_within(limit)))
    }

    /// Asks the primary to make this side the primary, and waits until it is, or until the primary
    /// has said why not. It does not begin after `limit`, and has `grace` more to say so.
    pub(crate) async fn request_switchover(
        &self,
        limit: Duration,
        grace: Duration,
    ) -> Result<Epoch> {
        let limit_ms = timeout_ms(limit);
        let request = |id| Message::SwitchoverWish { id, limit_ms };
        let answer = self.request(request, limit.saturating_add(grace)).await?;
        answer.unwrap_or_else(|| Err(RequestKind::Switchover.not_within(limit)))
    }

    /// Asks the primary, and waits for its answer; none within the limit: none.
    async fn request(
        &self,
        message: impl FnOnce(u64) -> Message,
        limit: Duration,
    ) -> Result<Option<Result<Epoch>>> {
        let id = self.request_id.fetch_add(1, Ordering::Relaxed);
        let (answer, wait) = oneshot::channel();
        {
            let mut requests = self.requests();
            if requests.len() >= REQUESTS_MAX {
                return Err(Error::refused("too many checkpoints are waiting already"));
            }
            requests.insert(id, answer);
        }
        self.send(message(id)).await?;
        let result = tokio::time::timeout(limit, wait).await;
        self.requests().remove(&id);
        match result {
            Ok(Ok(result)) => Ok(Some(result)),
            Ok(Err(_)) => {
                Err(Error::failed("the session ended before that was done (see brep status)"))
            }
            Err(_) => Ok(None),
        }
    }

    /// The primary has answered a request.
    pub(crate) fn answer(&self, id: u64, result: Result<Epoch>) {
        if let Some(waiting) = self.requests().remove(&id) {
            let _ = waiting.send(result);
        }
    }

    /// Everybody who waits for the primary's answer: the end of the session forgets them.
    pub(crate) fn take_requests(&self) -> Vec<oneshot::Sender<Result<Epoch>>> {
        std::mem::take(&mut *self.requests()).into_values().collect()
    }

    fn requests(&self) -> MutexGuard<'_, BTreeMap<u64, oneshot::Sender<Result<Epoch>>>> {
        self.requests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn note_failed_write(&self) {
        self.write_failed.store(true, Ordering::Release);
    }

    pub(crate) fn forget_failed_writes(&self) {
        self.write_failed.store(false, Ordering::Release);
    }

    /// Whether everything that the primary acknowledged while in contact is here.
    pub(crate) fn is_complete(&self) -> bool {
        self.sync && !self.write_failed.load(Ordering::Acquire)
    }
}

async fn close_and_drain(connection: &Arc<Connection>) -> Result<()> {
    connection.close();
    tokio::time::timeout(DRAIN_LIMIT, connection.closed()).await.map_err(|_| {
        Error::failed(format!(
            "writes of an older data connection ({}) have not ended for {DRAIN_LIMIT:?}; the disk \
             may be stuck",
            connection.peer()
        ))
    })
}
