use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use brep_nbd::client::{ClientError, ConnectOptions, Connection, connect_private};
use brep_nbd::{Endpoint, Stream};
use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until, timeout};
use uuid::Uuid;

use super::copy::copy_differences;
use super::epochs::Drained;
use super::group::Group;
use super::hello::{Decision, Refusal, decide};
use crate::config::Ack;
use crate::link::{
    CopyMode, Hello, LINK_VERSION, LinkReader, LinkWriter, Message, OPTION_BIND, OPTION_LINK,
    StopReason, heartbeat_pause, split, timeout_ms,
};
use crate::secondary::write_link;
use crate::{Epoch, Error, Result};

/// Messages that wait to be sent.
const OUTBOX_LEN: usize = 64;

/// How long a commit may take on the secondary. The guest does not wait for it.
const COMMIT_LIMIT: Duration = Duration::from_secs(60);

/// Pause before what could not be copied is tried again.
const COPY_RETRY: Duration = Duration::from_secs(1);

/// Cuts that are tried for one checkpoint: a write that fails meanwhile is sent again.
const CUT_TRIES: usize = 3;

/// What became of an attempt to connect.
pub(super) enum Attempt {
    /// A session; the group is attached.
    Session(Box<Session>),
    /// Reached, and not begun.
    Refused(Refusal),
    /// Not reached.
    Unreachable(Error),
}

type HashesSender = oneshot::Sender<Result<Vec<String>>>;

/// A request for a checkpoint.
pub(crate) struct CheckpointRequest {
    /// Answer when the cut is made, not when it is committed.
    pub(crate) wait_cut: bool,
    pub(crate) answer: oneshot::Sender<Result<Epoch>>,
}

/// One stay of the secondary.
pub(super) struct Session {
    group: Arc<Group>,
    outbox: mpsc::Sender<Message>,
    copy: CopyMode,
    guest_on_peer: bool,
    /// The longest silence of this side on the link.
    heartbeat_pause: Duration,
    parts: Mutex<Option<Parts>>,
    /// Who waits for the next answer to a cut.
    answers: Mutex<Option<mpsc::Sender<Message>>>,
    /// Who waits for the hashes of a range, by disk and first byte.
    hashes: Mutex<HashMap<(u32, u64), HashesSender>>,
    connections: Vec<Arc<Connection>>,
}

/// What the tasks of a session take with them.
struct Parts {
    reader: LinkReader<Stream>,
    writer: LinkWriter<Stream>,
    messages: mpsc::Receiver<Message>,
}

/// Tries once to begin a session.
pub(super) async fn establish(group: &Arc<Group>, peer: &Endpoint) -> Attempt {
    match try_establish(group, peer).await {
        Ok(attempt) => attempt,
        Err(error) => Attempt::Unreachable(error),
    }
}

async fn try_establish(group: &Arc<Group>, peer: &Endpoint) -> Result<Attempt> {
    let limit = group.config.peer_timeout;
    let version = Bytes::copy_from_slice(&LINK_VERSION.to_be_bytes());
    let link = match connect_private(peer, OPTION_LINK, version, limit).await {
        Ok(link) => link,
        Err(ClientError::Unsupported { .. }) => {
            return Ok(Attempt::Refused(Refusal::new(
                format!("{peer} is an NBD server, but no brep secondary"),
                "start brep secondary there, or correct --peer",
            )));
        }
        Err(error) => return Err(Error::failed(error.to_string())),
    };
    let (mut reader, mut writer) = split(link.stream, &link.rest);
    let me = group.side();
    let hello = Hello { version: LINK_VERSION, timeout_ms: timeout_ms(limit), side: me.clone() };
    writer.send(&Message::Hello(Box::new(hello)), limit).await?;
    let answer = match reader.receive_within(limit).await? {
        Message::HelloAnswer(answer) => answer,
        Message::Refuse { reason, advice } => {
            return Ok(Attempt::Refused(Refusal { advice, ..Refusal::new(reason, "") }));
        }
        other => return Err(Error::failed(format!("unexpected message {other:?}"))),
    };
    let wish = group.core().wish;
    let copy = match decide(&me, &answer, wish) {
        Decision::Start(copy) => copy,
        Decision::Refuse(refusal) => {
            let refuse =
                Message::Refuse { reason: refusal.reason.clone(), advice: refusal.advice.clone() };
            // The secondary shows the reason too; if it cannot be told, ours is enough.
            let _ = writer.send(&refuse, limit).await;
            return Ok(Attempt::Refused(refusal));
        }
    };
    let (Some(set), Some(cur)) = (me.set, me.cur) else {
        return Err(Error::failed("the state record has no identity"));
    };
    let epoch = me.epoch.max(answer.side.epoch).max(group.core().epoch()).next();
    let sync = group.config.ack == Ack::Sync;
    writer.send(&Message::Start { set, cur, epoch, copy, sync }, limit).await?;
    // The secondary may have to close an older session and to make buffers first.
    let token = match reader.receive_within(limit.max(Duration::from_secs(35))).await? {
        Message::Started { token } => token,
        Message::Refuse { reason, advice } => {
            let refusal = Refusal { advice, is_secondary: true, ..Refusal::new(reason, "") };
            return Ok(Attempt::Refused(refusal));
        }
        other => return Err(Error::failed(format!("unexpected message {other:?}"))),
    };
    let connections = connect_disks(group, peer, token).await?;
    group.attach(epoch, connections.clone(), &format!("{} ({peer})", answer.side.name))?;
    group.core().last_contact = Some(Instant::now());
    let (outbox, messages) = mpsc::channel(OUTBOX_LEN);
    Ok(Attempt::Session(Box::new(Session {
        group: Arc::clone(group),
        outbox,
        copy,
        guest_on_peer: answer.guest,
        heartbeat_pause: heartbeat_pause(limit, answer.timeout_ms),
        parts: Mutex::new(Some(Parts { reader, writer, messages })),
        answers: Mutex::new(None),
        hashes: Mutex::new(HashMap::new()),
        connections,
    })))
}

/// One data connection a disk, bound to the session by its token.
async fn connect_disks(
    group: &Arc<Group>,
    peer: &Endpoint,
    token: Uuid,
) -> Result<Vec<Arc<Connection>>> {
    let config = &group.config;
    let mut connections = Vec::new();
    for (slot, disk) in group.disks().iter().enumerate() {
        let mut bind = BytesMut::new();
        bind.put_slice(token.as_bytes());
        bind.put_u32(u32::try_from(slot).unwrap_or(u32::MAX));
        let options = ConnectOptions {
            name: format!("{} on the secondary", disk.name),
            connect_timeout: config.peer_timeout,
            request_timeout: config.peer_timeout,
            private_options: vec![(OPTION_BIND, bind.freeze())],
            // The window is the bound; nothing waits in a second queue.
            in_flight_max: config.window_requests,
            in_flight_bytes_max: config.window_bytes,
            queued_max: config.window_requests.max(16_384),
            queued_bytes_max: config.window_bytes.max(256 << 20),
            ..ConnectOptions::new(peer.clone(), disk.name.clone())
        };
        let connection =
            Connection::connect(&options).await.map_err(|e| Error::failed(e.to_string()))?;
        let size = disk.image.device().size();
        if connection.export().size != size {
            return Err(Error::failed(format!(
                "disk {}: {} bytes here, {} on the secondary",
                disk.name,
                size,
                connection.export().size
            )));
        }
        connections.push(connection);
    }
    Ok(connections)
}

impl Session {
    /// Runs until the peer is lost, stops, or `stop` is done; returns why.
    pub(super) async fn run(
        &self,
        requests: &mut mpsc::Receiver<CheckpointRequest>,
        stop: impl Future<Output = StopReason>,
    ) -> String {
        let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Parts { reader, writer, messages }) = parts else {
            return "the session was run twice".to_owned();
        };
        let limit = self.group.config.peer_timeout;
        let writing = tokio::spawn(write_link(writer, messages, self.heartbeat_pause, limit));
        let reason = tokio::select! {
            error = self.read(reader) => error.to_string(),
            reason = self.watch_connections() => reason,
            reason = self.watch_ages() => reason,
            error = self.work(requests) => error.to_string(),
            reason = stop => {
                let _ = self.outbox.send(Message::Stop { reason }).await;
                // Give it a moment to be sent; the other side notices the end in any case.
                tokio::time::sleep(Duration::from_millis(50)).await;
                "replication was stopped here".to_owned()
            }
        };
        writing.abort();
        reason
    }

    /// Reads the link until it ends.
    async fn read(&self, mut reader: LinkReader<Stream>) -> Error {
        loop {
            let message = match reader.receive_within(self.group.config.peer_timeout).await {
                Ok(message) => message,
                Err(error) => return error,
            };
            self.group.core().last_contact = Some(Instant::now());
            if let Err(error) = self.handle(message) {
                return error;
            }
        }
    }

    fn handle(&self, message: Message) -> Result<()> {
        match message {
            Message::Heartbeat => Ok(()),
            Message::CutDone { .. } | Message::Committed { .. } | Message::CutFailed { .. } => {
                let answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
                match answers.as_ref().is_some_and(|a| a.try_send(message).is_ok()) {
                    true => Ok(()),
                    false => Err(Error::failed("link: an answer that nobody asked for")),
                }
            }
            Message::HashAnswer { disk, offset, hashes, error } => {
                let waiting = self
                    .hashes
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .remove(&(disk, offset));
                if let Some(waiting) = waiting {
                    let _ = waiting.send(error.map_or(Ok(hashes), |e| Err(Error::failed(e))));
                }
                Ok(())
            }
            Message::CheckpointRequest { id } => {
                self.group.core().checkpoint_for_peer = Some(id);
                self.group.wake.notify_one();
                Ok(())
            }
            Message::Stop { reason } => Err(Error::failed(match reason {
                StopReason::Promoted => "the secondary has been promoted",
                StopReason::Replaced => "another session has replaced this one",
                StopReason::Shutdown => "the secondary went away",
                StopReason::Stopped => "the secondary stopped replication",
            })),
            other => Err(Error::failed(format!("link: unexpected message {other:?}"))),
        }
    }

    async fn watch_connections(&self) -> String {
        let ended = self.connections.iter().map(|c| Box::pin(c.failed()));
        let (error, _, _) = futures_util::future::select_all(ended).await;
        error.to_string()
    }

    /// Ends when the oldest request has waited too long for the peer, wherever it waits.
    async fn watch_ages(&self) -> String {
        let limit = self.group.config.peer_timeout;
        loop {
            let oldest = self.group.oldest_request();
            let now = Instant::now();
            if oldest.is_some_and(|o| now >= o + limit) {
                return format!("the oldest request has waited for {limit:?}");
            }
            sleep_until(oldest.unwrap_or(now) + limit).await;
        }
    }

    /// Copies, then takes checkpoints.
    async fn work(&self, requests: &mut mpsc::Receiver<CheckpointRequest>) -> Error {
        match self.copy_all(requests).await {
            Ok(()) => {}
            Err(error) => return error,
        }
        let interval = match self.group.config.checkpoint_interval {
            // The manager of the secondary's guest decides.
            Some(_) if self.guest_on_peer => None,
            interval => interval,
        };
        loop {
            let tick = async {
                match interval {
                    Some(interval) => tokio::time::sleep(interval).await,
                    None => std::future::pending().await,
                }
            };
            let result = tokio::select! {
                request = requests.recv() => match request {
                    Some(request) => self.checkpoint_for(request).await,
                    None => return Error::failed("brep is going away"),
                },
                () = self.group.wake.notified() => self.checkpoint_for_peer().await,
                () = tick => {
                    if self.group.core().dirty {
                        self.checkpoint(None).await.map(drop)
                    } else {
                        Ok(())
                    }
                }
            };
            match result {
                Ok(()) => {}
                Err(Failure::Void(error)) => {
                    tracing::warn!(%error, "no checkpoint");
                    self.group.core().reason = Some(format!("no checkpoint: {error}"));
                }
                Err(Failure::Lost(error)) => return error,
            }
        }
    }

    async fn copy_all(
        &self,
        requests: &mut mpsc::Receiver<CheckpointRequest>,
    ) -> std::result::Result<(), Error> {
        let copying = async {
            while self.group.has_differences() {
                let copied = copy_differences(&self.group, self, self.copy).await;
                if let Err(error) = copied {
                    // What cannot be read here keeps the copy from ending, and nothing else.
                    if !self.group.is_attached() {
                        return Err(error);
                    }
                    tracing::warn!(%error, "a part of the copy is tried again");
                }
                if self.group.has_differences() {
                    // One of the sides refuses some of it, and the errors say so.
                    tokio::time::sleep(COPY_RETRY).await;
                }
            }
            self.outbox.send(Message::CopyDone).await.map_err(|_| Error::failed("the link is gone"))
        };
        let refusing = async {
            // No cuts while a copy runs: nobody is left to wait.
            while let Some(request) = requests.recv().await {
                let _ = request.answer.send(Err(Error::refused(
                    "the disks are being copied; checkpoints are taken when that has ended (see \
                     brep status)",
                )));
            }
            std::future::pending::<()>().await
        };
        tokio::select! {
            result = copying => result?,
            () = refusing => {}
        }
        self.group.core().copying = false;
        match self.checkpoint(None).await {
            Ok(_) => Ok(()),
            Err(Failure::Void(error) | Failure::Lost(error)) => Err(error),
        }
    }

    async fn checkpoint_for(&self, request: CheckpointRequest) -> std::result::Result<(), Failure> {
        let CheckpointRequest { wait_cut, answer } = request;
        let mut answer = Some(answer);
        let result = self.checkpoint(wait_cut.then_some(&mut answer)).await;
        let told = match &result {
            Ok(epoch) => Ok(*epoch),
            Err(Failure::Void(error) | Failure::Lost(error)) => Err(error.clone()),
        };
        if let Some(answer) = answer {
            let _ = answer.send(told);
        }
        result.map(drop)
    }

    async fn checkpoint_for_peer(&self) -> std::result::Result<(), Failure> {
        let Some(id) = self.group.core().checkpoint_for_peer.take() else { return Ok(()) };
        let result = self.checkpoint(None).await;
        let (epoch, error) = match &result {
            Ok(epoch) => (Some(*epoch), None),
            Err(Failure::Void(error) | Failure::Lost(error)) => (None, Some(error.to_string())),
        };
        let _ = self.outbox.send(Message::CheckpointAnswer { id, epoch, error }).await;
        result.map(drop)
    }

    /// Takes a checkpoint: cut, then commit. `early` is answered after the cut.
    async fn checkpoint(
        &self,
        mut early: Option<&mut Option<oneshot::Sender<Result<Epoch>>>>,
    ) -> std::result::Result<Epoch, Failure> {
        for _ in 0..CUT_TRIES {
            if self.group.has_differences() {
                // Something failed on one side: read it back and send it again.
                copy_differences(&self.group, self, CopyMode::Full).await.map_err(Failure::Void)?;
                if self.group.has_differences() {
                    continue;
                }
                self.group.repaired();
            }
            let Some(cut) = self.cut().await? else { continue };
            let epoch = cut.epoch;
            if let Some(answer) = early.as_mut().and_then(|e| e.take()) {
                let _ = answer.send(Ok(epoch));
            }
            self.wait_commit(cut).await?;
            self.group.core().reason = None;
            return Ok(epoch);
        }
        Err(Failure::Void(Error::failed(
            "writes keep failing on one of the sides (see the errors in brep status)",
        )))
    }

    /// Cuts the current epoch on both sides. None: a write of it has failed, try again.
    async fn cut(&self) -> std::result::Result<Option<Cut>, Failure> {
        let begun = Instant::now();
        let (sender, mut answers) = mpsc::channel(4);
        *self.answers.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender);
        let Some(epoch) = self.group.start_cut().map_err(Failure::Lost)? else {
            return Err(Failure::Lost(Error::failed("there is no session")));
        };
        // Bounded: a request that does not end loses the peer.
        if self.drain().await == Drained::Failed {
            self.group.void_cut();
            return Ok(None);
        }
        self.send(Message::Cut { epoch }).await?;
        let answer = timeout(self.group.config.peer_timeout, answers.recv()).await;
        match answer {
            Ok(Some(Message::CutDone { epoch: done })) if done == epoch => {}
            Ok(Some(Message::CutFailed { reason, .. })) => {
                self.group.void_cut();
                return Err(Failure::Void(Error::failed(reason)));
            }
            _ => return Err(Failure::Lost(Error::failed("no answer to a cut"))),
        }
        self.group.release();
        let pause_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.group.counters.last_pause_us.store(pause_us, std::sync::atomic::Ordering::Relaxed);
        Ok(Some(Cut { epoch, answers }))
    }

    async fn wait_commit(&self, cut: Cut) -> std::result::Result<(), Failure> {
        let Cut { epoch, mut answers } = cut;
        match timeout(COMMIT_LIMIT, answers.recv()).await {
            Ok(Some(Message::Committed { epoch: done })) if done == epoch => {
                self.group.committed(epoch).map_err(Failure::Lost)
            }
            _ => Err(Failure::Lost(Error::failed("a checkpoint was not committed"))),
        }
    }

    /// Waits until every write of the ended epoch has ended on both sides.
    async fn drain(&self) -> Drained {
        loop {
            let ended = self.group.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            match self.group.drained() {
                Drained::NotYet => ended.await,
                drained => return drained,
            }
        }
    }

    async fn send(&self, message: Message) -> std::result::Result<(), Failure> {
        self.outbox
            .send(message)
            .await
            .map_err(|_| Failure::Lost(Error::failed("the link is gone")))
    }

    /// The peer's hashes of a range of a disk.
    pub(super) async fn hashes(
        &self,
        disk: usize,
        offset: u64,
        length: u64,
        chunk: u32,
    ) -> Result<Vec<String>> {
        let disk = u32::try_from(disk).map_err(|_| Error::failed("too many disks"))?;
        let (answer, wait) = oneshot::channel();
        self.hashes.lock().unwrap_or_else(PoisonError::into_inner).insert((disk, offset), answer);
        self.outbox
            .send(Message::HashRequest { disk, offset, length, chunk })
            .await
            .map_err(|_| Error::failed("the link is gone"))?;
        match timeout(COMMIT_LIMIT, wait).await {
            Ok(Ok(result)) => result,
            _ => Err(Error::failed("the secondary sent no hashes")),
        }
    }
}

/// A cut that is made and not committed.
struct Cut {
    epoch: Epoch,
    answers: mpsc::Receiver<Message>,
}

/// Why there was no checkpoint.
enum Failure {
    /// It was not made; the session goes on.
    Void(Error),
    /// The session is over.
    Lost(Error),
}
