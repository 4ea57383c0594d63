//! The control link to a brep secondary, for as long as a session lasts.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brep_nbd::Stream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::time::timeout;

use super::group::Group;
use super::session::Failure;
use crate::link::{HelloAnswer, LinkReader, LinkWriter, Message, StopReason, heartbeat_pause};
use crate::secondary::write_link;
use crate::{Epoch, Error, ErrorKind, Result};

/// Messages that wait to be sent.
const OUTBOX_LEN: usize = 64;

/// Checkpoints, and switchovers, that the secondary may wait for at a time; it asks for fewer.
pub(super) const ASKED_MAX: usize = 256;

/// How long a commit may take on the secondary. The guest does not wait for it.
const COMMIT_LIMIT: Duration = Duration::from_secs(60);

type HashesSender = oneshot::Sender<Result<Vec<String>>>;

/// The link: one task writes what is queued, and heartbeats; one reads.
pub(super) struct Link {
    group: Arc<Group>,
    outbox: mpsc::Sender<Message>,
    /// A guest runs on the secondary.
    pub(super) guest_on_peer: bool,
    /// The longest silence of this side.
    heartbeat_pause: Duration,
    parts: Mutex<Option<Parts>>,
    /// Who waits for the next answers to a cut.
    cut_answers: Mutex<Option<mpsc::Sender<Message>>>,
    /// The peer's number of each disk: its disks may be in another order.
    peer_disks: BTreeMap<usize, u32>,
    /// Who waits for the hashes of a range, by the peer's number of the disk and first byte.
    hashes: Mutex<HashMap<(u32, u64), HashesSender>>,
    /// Who waits to hear whether the secondary could take over.
    switchover: Mutex<Option<oneshot::Sender<Option<String>>>>,
    /// Places for switchovers that the secondary's operator may wait for.
    wishes: Arc<Semaphore>,
}

/// What the tasks take with them.
struct Parts {
    reader: LinkReader<Stream>,
    writer: LinkWriter<Stream>,
    messages: mpsc::Receiver<Message>,
}

/// A cut that is made and not committed.
pub(super) struct CutAnswers(mpsc::Receiver<Message>);

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn gone() -> Error {
    Error::failed("the link is gone")
}

/// What has become of what the secondary's operator asked for.
fn answer(id: u64, result: &Result<Epoch>) -> Message {
    let error = result.as_ref().err();
    Message::CheckpointAnswer {
        id,
        epoch: result.as_ref().ok().copied(),
        error: error.map(ToString::to_string),
        refused: error.is_some_and(|error| error.kind() == ErrorKind::Refused),
    }
}

/// A place in the table of those who wait for hashes.
struct Waiting<'a> {
    hashes: &'a Mutex<HashMap<(u32, u64), HashesSender>>,
    key: (u32, u64),
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        lock(self.hashes).remove(&self.key);
    }
}

/// The peer's number of a disk, in the order of its hello.
pub(super) fn peer_disk(answer: &HelloAnswer, name: &str) -> Option<u32> {
    let index = answer.side.disks.iter().position(|disk| disk.name == name)?;
    u32::try_from(index).ok()
}

impl Link {
    pub(super) fn new(
        group: &Arc<Group>,
        reader: LinkReader<Stream>,
        writer: LinkWriter<Stream>,
        answer: &HelloAnswer,
    ) -> Self {
        let (outbox, messages) = mpsc::channel(OUTBOX_LEN);
        Link {
            group: Arc::clone(group),
            outbox,
            guest_on_peer: answer.guest,
            heartbeat_pause: heartbeat_pause(group.config.peer_timeout, answer.timeout_ms),
            parts: Mutex::new(Some(Parts { reader, writer, messages })),
            cut_answers: Mutex::new(None),
            peer_disks: group
                .disks()
                .iter()
                .filter_map(|d| Some((d.number, peer_disk(answer, &d.name)?)))
                .collect(),
            hashes: Mutex::new(HashMap::new()),
            switchover: Mutex::default(),
            wishes: Arc::new(Semaphore::new(ASKED_MAX)),
        }
    }

    /// Runs until the link ends; returns why.
    pub(super) async fn run(&self) -> String {
        let Some(Parts { reader, writer, messages }) = lock(&self.parts).take() else {
            return "the session was run twice".to_owned();
        };
        let limit = self.group.config.peer_timeout;
        let writing = write_link(writer, messages, self.heartbeat_pause, limit);
        let writing = tokio_util::task::AbortOnDropHandle::new(tokio::spawn(writing));
        let error = self.read(reader).await;
        drop(writing);
        error.to_string()
    }

    async fn read(&self, mut reader: LinkReader<Stream>) -> Error {
        loop {
            let message = match reader.receive_within(self.group.config.peer_timeout).await {
                Ok(message) => message,
                Err(error) => return error,
            };
            self.group.heard();
            if let Err(error) = self.handle(message) {
                return error;
            }
        }
    }

    fn handle(&self, message: Message) -> Result<()> {
        match message {
            Message::Heartbeat => Ok(()),
            Message::CutDone { .. } | Message::Committed { .. } | Message::CutFailed { .. } => {
                match lock(&self.cut_answers).as_ref().is_some_and(|a| a.try_send(message).is_ok())
                {
                    true => Ok(()),
                    false => Err(Error::failed("link: an answer that nobody asked for")),
                }
            }
            Message::HashAnswer { disk, offset, hashes, error } => {
                if let Some(waiting) = lock(&self.hashes).remove(&(disk, offset)) {
                    let _ = waiting.send(error.map_or(Ok(hashes), |e| Err(Error::failed(e))));
                }
                Ok(())
            }
            Message::CheckpointRequest { id } => {
                let mut core = self.group.core();
                if core.checkpoints_for_peer.len() >= ASKED_MAX {
                    return Err(Error::failed("link: too many checkpoints are asked for"));
                }
                core.checkpoints_for_peer.push(id);
                self.group.wake.notify_one();
                Ok(())
            }
            Message::SwitchoverWish { id, limit_ms } => {
                let place = Arc::clone(&self.wishes).try_acquire_owned();
                let place =
                    place.map_err(|_| Error::failed("link: too many switchovers are asked for"))?;
                self.spawn_switchover(id, Duration::from_millis(limit_ms), place);
                Ok(())
            }
            Message::SwitchoverAnswer { refusal } => match lock(&self.switchover).take() {
                Some(waiting) => {
                    let _ = waiting.send(refusal);
                    Ok(())
                }
                None => Err(Error::failed("link: an answer that nobody asked for")),
            },
            Message::Disks { disks } => {
                self.group.core().peer_disks = Some(disks);
                Ok(())
            }
            Message::Promoting => {
                self.group.takeover_begins();
                // A link that takes no more is as good as broken: the answer is not waited for long.
                let _ = self.outbox.try_send(Message::Holding);
                Ok(())
            }
            Message::NotPromoted => {
                self.group.take_role_back();
                self.group.takeover_ends(false);
                Ok(())
            }
            Message::Stop { reason } => Err(Error::failed(match reason {
                StopReason::Promoted => {
                    self.group.takeover_ends(true);
                    "the secondary has been promoted"
                }
                StopReason::Replaced => "another session has replaced this one",
                StopReason::Shutdown => "the secondary went away",
                StopReason::Stopped => "the secondary stopped replication",
            })),
            other => Err(Error::failed(format!("link: unexpected message {other:?}"))),
        }
    }

    async fn send(&self, message: Message) -> Result<()> {
        self.outbox.send(message).await.map_err(|_| gone())
    }

    /// Tells the secondary that this side ends the session.
    pub(super) async fn stop(&self, reason: StopReason) {
        let _ = self.send(Message::Stop { reason }).await;
        // Give it a moment to be sent; the other side notices the end in any case.
        tokio::time::sleep(Duration::from_millis(50)).await;
    }

    /// Asks the secondary whether it could take over.
    ///
    /// # Errors
    /// It could not, or does not answer.
    pub(super) async fn request_switchover(&self) -> Result<()> {
        let (answer, wait) = oneshot::channel();
        *lock(&self.switchover) = Some(answer);
        self.send(Message::SwitchoverRequest).await?;
        match timeout(self.group.config.peer_timeout, wait).await {
            Ok(Ok(None)) => Ok(()),
            Ok(Ok(Some(refusal))) => Err(Error::refused(refusal)),
            _ => Err(Error::failed("the secondary does not answer")),
        }
    }

    /// Tells the secondary to take over.
    pub(super) async fn take_over(&self, epoch: Epoch) -> Result<()> {
        self.send(Message::TakeOver { epoch }).await
    }

    /// Tells the secondary that a session copies again.
    pub(super) async fn copy_begun(&self) -> Result<()> {
        self.send(Message::CopyBegun).await
    }

    pub(super) async fn copy_done(&self) -> Result<()> {
        self.send(Message::CopyDone).await
    }

    pub(super) async fn answer_checkpoint(&self, id: u64, result: &Result<Epoch>) {
        let _ = self.send(answer(id, result)).await;
    }

    /// Switches over because the secondary's operator asks for it, beside the link, which that
    /// needs. Nothing comes of it any more when the link has ended: nobody waits there then.
    fn spawn_switchover(&self, id: u64, limit: Duration, place: OwnedSemaphorePermit) {
        let (group, outbox) = (Arc::clone(&self.group), self.outbox.clone());
        tokio::spawn(async move {
            let result = tokio::select! {
                biased;
                result = group.switchover(limit) => result,
                () = outbox.closed() => return,
            };
            // That it has taken over the secondary knows itself.
            let _ = outbox.send(answer(id, &result)).await;
            drop(place);
        });
    }

    /// Whoever makes a cut gets its answers from now on.
    pub(super) fn expect_cut(&self) -> CutAnswers {
        let (sender, answers) = mpsc::channel(4);
        *lock(&self.cut_answers) = Some(sender);
        CutAnswers(answers)
    }

    /// Cuts on the secondary, but for the disks `without`: nothing of `epoch` is in flight.
    pub(super) async fn cut(
        &self,
        epoch: Epoch,
        without: &[usize],
        answers: &mut CutAnswers,
    ) -> std::result::Result<(), Failure> {
        let without = without.iter().filter_map(|disk| self.peer_disks.get(disk).copied());
        let cut = Message::Cut { epoch, without: without.collect() };
        self.send(cut).await.map_err(Failure::Lost)?;
        match timeout(self.group.config.peer_timeout, answers.0.recv()).await {
            Ok(Some(Message::CutDone { epoch: done })) if done == epoch => Ok(()),
            Ok(Some(Message::CutFailed { reason, .. })) => {
                Err(Failure::Void(Error::failed(reason)))
            }
            _ => Err(Failure::Lost(Error::failed("no answer to a cut"))),
        }
    }

    /// Waits until the secondary has committed what was cut.
    pub(super) async fn committed(
        &self,
        epoch: Epoch,
        answers: &mut CutAnswers,
    ) -> std::result::Result<(), Failure> {
        match timeout(COMMIT_LIMIT, answers.0.recv()).await {
            Ok(Some(Message::Committed { epoch: done })) if done == epoch => Ok(()),
            _ => Err(Failure::Lost(Error::failed("a checkpoint was not committed"))),
        }
    }

    /// The peer's hashes of a range of a disk.
    pub(super) async fn hashes(
        &self,
        disk: usize,
        offset: u64,
        length: u64,
        chunk: u32,
    ) -> Result<Vec<String>> {
        let disk = self.peer_disks.get(&disk).copied();
        let disk = disk.ok_or_else(|| Error::failed("the secondary does not have this disk"))?;
        let (answer, wait) = oneshot::channel();
        let key = (disk, offset);
        lock(&self.hashes).insert(key, answer);
        // Whoever gives up takes his place in the table with him.
        let _waiting = Waiting { hashes: &self.hashes, key };
        self.send(Message::HashRequest { disk, offset, length, chunk }).await?;
        match timeout(COMMIT_LIMIT, wait).await {
            Ok(Ok(result)) => result,
            _ => Err(Error::failed("the secondary sent no hashes")),
        }
    }
}
