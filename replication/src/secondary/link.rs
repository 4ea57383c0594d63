use std::sync::Arc;
use std::time::Duration;

use brep_nbd::server::TakenStream;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::disk::ReplicaDisk;
use super::durable::START_AGAIN;
use super::group::{Group, Terms};
use super::rejoin::Refused;
use super::session::Session;
use crate::link::{
    HelloAnswer, LINK_VERSION, LinkReader, LinkWriter, Message, StopReason, heartbeat_pause, split,
    timeout_ms,
};
use crate::status::LinkState;
use crate::{Epoch, Error, Result};

/// Most bytes that one hash request may cover, and most hashes in an answer.
const HASH_BYTES_MAX: u64 = 64 << 20;
const HASHES_MAX: u64 = 4096;

/// So many peer timeouts a primary may take between its hello and its terms: nothing else begins
/// meanwhile, and no failover.
const TERMS_TIMEOUTS: u32 = 10;

/// How long what is queued for a primary may take when its session has ended.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(200);

impl Group {
    /// Serves one link from its first byte to its end.
    pub(crate) async fn serve_link(self: Arc<Self>, stream: TakenStream, peer: String) {
        let tls = stream.tls_peer().cloned();
        let (mut reader, mut writer) = split(stream, &[]);
        let begun = tokio::select! {
            biased;
            begun = self.negotiate(&mut reader, &mut writer, &peer) => begun,
            () = self.stopping.cancelled() => return,
        };
        let ended = match begun {
            Ok((session, outbox)) => {
                self.core().link_tls = tls;
                let ended = self.run_session(&session, reader, writer, outbox).await;
                self.session_ended(&session, ended).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = ended {
            self.tell_ended(&peer, &error);
        }
    }

    /// A primary that is refused comes back every few seconds: the same is said once.
    fn tell_ended(&self, peer: &str, error: &Error) {
        let text = error.to_string();
        let told = self.core().link_error.replace(text.clone());
        if told.is_some_and(|told| told == text) {
            tracing::debug!(peer, %error, "link ended");
        } else {
            tracing::info!(peer, %error, "link ended");
        }
    }

    /// From hello to the token.
    async fn negotiate(
        self: &Arc<Self>,
        reader: &mut LinkReader<TakenStream>,
        writer: &mut LinkWriter<TakenStream>,
        peer: &str,
    ) -> Result<(Arc<Session>, mpsc::Receiver<Message>)> {
        let limit = self.config.peer_timeout;
        let Message::Hello(hello) = reader.receive_within(limit).await? else {
            return Err(Error::failed("the first message was no hello"));
        };
        // One at a time, and none during a failover.
        let transition = self.transition.lock().await;
        // One that has been promoted says so, however it was started: an old primary has to hear it.
        if !self.core().is_started() && !self.record().is_primary() {
            let reason = "replication has not been started on the secondary".to_owned();
            return refuse(writer, limit, reason, Some("brep start, there")).await;
        }
        if hello.version != LINK_VERSION {
            let reason = format!("this side speaks link version {LINK_VERSION}");
            return refuse(writer, limit, reason, None).await;
        }
        let (record, told) = (self.record(), self.disks());
        let answer = HelloAnswer {
            version: LINK_VERSION,
            timeout_ms: timeout_ms(limit),
            side: self.introduce(),
            guest: self.has_guest(),
            inconsistent: record.secondary.inconsistent,
            power_lost: record.secondary.power_lost,
            outdated: record.secondary.outdated,
            discard_local: record.secondary.discard_local,
        };
        writer.send(&Message::HelloAnswer(Box::new(answer)), limit).await?;
        let until = Instant::now() + limit * TERMS_TIMEOUTS;
        let (terms, sync) = loop {
            let left = until.saturating_duration_since(Instant::now());
            match reader.receive_within(limit.min(left)).await? {
                Message::RangesRequest { disk, offset } => {
                    writer.send(&self.own_ranges(&told, disk, offset), limit).await?;
                }
                Message::TakeOver { epoch } => {
                    drop(transition);
                    self.take_over_now(writer, &hello.side, epoch).await?;
                    return Err(Error::failed("the other side has made room for this one"));
                }
                Message::Start { set, cur, epoch, copy: _, sync, discard_checkpoint } => {
                    let history = hello.side.history_before(cur);
                    break (Terms { set, cur, epoch, discard_checkpoint, history }, sync);
                }
                Message::Refuse { reason, advice, kind, written } => {
                    let refused = Refused { kind, reason: reason.clone(), advice, theirs: written };
                    if let Some(primary) = &*self.primary() {
                        primary.refused_by(&hello.side.name, &refused);
                    }
                    let mut core = self.core();
                    if core.session.is_some() {
                        // Whoever declines this side is not the one that replicates to it.
                        return Err(Error::refused(reason));
                    }
                    core.link = LinkState::Refused;
                    core.peer = Some(format!("{} ({peer})", hello.side.name));
                    core.reason = None;
                    core.refused = Some(refused);
                    return Err(Error::refused(reason));
                }
                other => return Err(Error::failed(format!("unexpected message {other:?}"))),
            }
        };
        if let Some((reason, advice)) = self.objection(&terms).await {
            return refuse(writer, limit, reason, advice).await;
        }
        let disks = self.disks_of_session(told, &hello.side)?;
        let pause = heartbeat_pause(limit, hello.timeout_ms);
        let (session, outbox) = Session::new(sync, pause, disks);
        let begun = match self.grow_disks(&hello.side.disks).await {
            Ok(()) => {
                self.reserve_room().await;
                self.begin_session(&terms, &session).await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = begun {
            let reason = format!("the secondary cannot begin: {error}");
            tracing::error!(%error, "cannot begin a session");
            self.core().reason = Some(reason.clone());
            return refuse(writer, limit, reason, None).await;
        }
        let started = Message::Started { token: session.token };
        if let Err(error) = writer.send(&started, limit).await {
            // It has begun here, and nobody is there who would end it.
            self.end_session(StopReason::Shutdown).await?;
            return Err(error);
        }
        {
            let mut core = self.core();
            core.link = LinkState::Connected;
            core.reason = None;
            core.peer = Some(format!("{} ({peer})", hello.side.name));
            core.peer_durability = Some(hello.side.durability);
            core.link_error = None;
            core.last_contact = Some(Instant::now());
        }
        if hello.side.name == self.config.name {
            let name = &self.config.name;
            tracing::warn!(name, "both sides have one name: give one of them another, with --name");
        }
        tracing::info!(peer = hello.side.name, epoch = %terms.epoch, "session begun");
        self.events.emit("BREP_CONNECTED", serde_json::json!({ "peer": hello.side.name }));
        Ok((session, outbox))
    }

    /// Why these terms cannot be accepted, if they cannot, and what resolves it.
    async fn objection(&self, terms: &Terms) -> Option<(String, Option<&'static str>)> {
        let record = self.record();
        if record.is_primary() {
            return Some(("this side has been promoted".to_owned(), None));
        }
        if let Some(reason) = self.wants_consent() {
            return Some((reason, None));
        }
        let follows = terms.epoch > record.epoch && terms.epoch <= Epoch::MAX;
        let fits = record.set.is_none_or(|s| s == terms.set) && follows;
        if !fits {
            let reason = "the terms do not fit what this side said in its hello";
            return Some((reason.to_owned(), None));
        }
        if let Some(reason) = self.broken() {
            return Some((reason, Some(START_AGAIN)));
        }
        let full = self.no_room().await.filter(|_| !terms.discard_checkpoint)?;
        let advice = "make room beside the secondary's state directory, or give its \
                      --buffer-limit more; to give its last checkpoint up for it: brep resync \
                      --discard-checkpoint";
        Some((format!("there is no room for pre-images: {full}"), Some(advice)))
    }

    async fn run_session(
        self: &Arc<Self>,
        session: &Arc<Session>,
        reader: LinkReader<TakenStream>,
        writer: LinkWriter<TakenStream>,
        outbox: mpsc::Receiver<Message>,
    ) -> Result<StopReason> {
        // The writer is a task of its own: heartbeats go on while a commit is being written.
        let limit = self.config.peer_timeout;
        let writing = tokio::spawn(write_link(writer, outbox, session.heartbeat_pause, limit));
        let result = tokio::select! {
            biased;
            result = self.read_link(session, reader) => result,
            () = session.ending.cancelled() => Err(Error::failed("the session was ended here")),
            () = self.watch_room(session) => Err(Error::failed("nobody looks after the room")),
        };
        // What is queued (a stop, an answer) may still go out; the task ends with the outbox.
        let abort = writing.abort_handle();
        if !session.ending.is_cancelled() {
            abort.abort();
        } else {
            // The primary holds its guest for the last word of a promotion, as long as it may.
            let grace = if session.is_promoting() { limit } else { LAST_WORDS_LIMIT };
            tokio::spawn(async move {
                let _ = tokio::time::timeout(grace, writing).await;
                abort.abort();
            });
        }
        result
    }

    async fn read_link(
        self: &Arc<Self>,
        session: &Arc<Session>,
        mut reader: LinkReader<TakenStream>,
    ) -> Result<StopReason> {
        let mut takes_over = false;
        loop {
            let message = reader.receive_within(self.config.peer_timeout).await?;
            self.core().last_contact = Some(Instant::now());
            match message {
                Message::Heartbeat | Message::CopyDone => {}
                Message::CopyBegun => self.core().copying = true,
                Message::Cut { epoch, without } => {
                    self.handle_cut(session, epoch, &without).await?;
                }
                Message::HashRequest { disk, offset, length, chunk } => {
                    let answer = self.hash(session, (disk, offset, length), chunk).await;
                    session.send(answer).await?;
                }
                Message::CheckpointAnswer { id, epoch, error, refused } => {
                    let told = if refused { Error::refused } else { Error::failed };
                    let result = match (epoch, error) {
                        (Some(epoch), None) => Ok(epoch),
                        (_, error) => {
                            let error = told(error.unwrap_or_default());
                            Err(error.context("the primary says"))
                        }
                    };
                    session.answer(id, result);
                }
                Message::Holding => session.note_held(),
                Message::SwitchoverRequest => {
                    let refusal = self.cannot_take_over();
                    session.send(Message::SwitchoverAnswer { refusal }).await?;
                }
                Message::TakeOver { epoch } if !takes_over => {
                    takes_over = true;
                    // Beside the link: it is needed until the end.
                    let (group, session) = (Arc::clone(self), Arc::clone(session));
                    tokio::spawn(async move { group.switch_over(session, epoch).await });
                }
                Message::Stop { reason } => return Ok(reason),
                other => return Err(Error::failed(format!("unexpected message {other:?}"))),
            }
        }
    }

    async fn handle_cut(
        self: &Arc<Self>,
        session: &Arc<Session>,
        epoch: Epoch,
        without: &[u32],
    ) -> Result<()> {
        if epoch < self.core().receiving {
            return Err(Error::failed(format!("a cut of epoch {epoch}, which has ended")));
        }
        let disks = self.disks_to_cut(session, without)?;
        if let Err(error) = self.cut(session, &disks, epoch).await {
            let reason = error.to_string();
            return session.send(Message::CutFailed { epoch, reason }).await;
        }
        session.send(Message::CutDone { epoch }).await?;
        self.commit(session, disks, epoch).await?;
        session.send(Message::Committed { epoch }).await
    }

    async fn session_ended(
        self: &Arc<Self>,
        session: &Arc<Session>,
        ended: Result<StopReason>,
    ) -> Result<()> {
        let mine = {
            let mut core = self.core();
            let mine = core.is_current(session);
            if mine {
                core.retire_session();
                core.reason = Some(match &ended {
                    Ok(StopReason::Stopped) => "the primary stopped replication".to_owned(),
                    Ok(_) => "the primary went away".to_owned(),
                    Err(error) => format!("the primary is lost: {error}"),
                });
            }
            mine
        };
        if mine {
            self.end_retired(StopReason::Shutdown).await?;
            self.events.emit("BREP_DISCONNECTED", serde_json::json!({}));
            self.colo.broken(&self.events);
        }
        ended.map(|_| ())
    }

    /// Hashes chunks of a replica as it is now.
    async fn hash(&self, session: &Session, range: (u32, u64, u64), chunk: u32) -> Message {
        let (disk, offset, length) = range;
        let told = session.disks.told.get(disk as usize);
        let result = match told {
            Some(replica) => self.hash_chunks(&replica, offset, length, chunk).await,
            None => Err(Error::usage("no such disk")),
        };
        let (hashes, error) = match result {
            Ok(hashes) => (hashes, None),
            Err(error) => (Vec::new(), Some(error.to_string())),
        };
        Message::HashAnswer { disk, offset, hashes, error }
    }

    async fn hash_chunks(
        &self,
        disk: &ReplicaDisk,
        offset: u64,
        length: u64,
        chunk: u32,
    ) -> Result<Vec<String>> {
        let chunk = u64::from(chunk);
        let fits = offset <= disk.size() && length <= disk.size() - offset;
        if !fits || chunk < 512 || length > HASH_BYTES_MAX || length.div_ceil(chunk) > HASHES_MAX {
            return Err(Error::usage("a hash request out of bounds"));
        }
        let filter = disk.filter()?;
        let mut hashes = Vec::new();
        let mut at = offset;
        while at < offset + length {
            let len = chunk.min(offset + length - at);
            let read = brep_block::BlockDevice::read(&*filter, at, len as usize).await;
            let data = read.inspect_err(|error| self.note_error(&disk.name, error))?;
            hashes.push(hash_hex(&data));
            at += len;
            tokio::task::yield_now().await;
        }
        Ok(hashes)
    }
}

/// Tells the primary that there is no session, and why.
async fn refuse<T>(
    writer: &mut LinkWriter<TakenStream>,
    limit: Duration,
    reason: String,
    advice: Option<&str>,
) -> Result<T> {
    writer.send(&Message::refusal(reason.clone(), advice), limit).await?;
    Err(Error::refused(reason))
}

/// The SHA-256 of `data` in hexadecimal digits.
pub(crate) fn hash_hex(data: &[u8]) -> String {
    Sha256::digest(data).iter().map(|b| format!("{b:02x}")).collect()
}

/// Sends what is queued, and a heartbeat when there has been nothing to send for `pause`.
pub(crate) async fn write_link<S>(
    mut writer: LinkWriter<S>,
    mut outbox: mpsc::Receiver<Message>,
    pause: Duration,
    limit: Duration,
) where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite,
{
    loop {
        let message = match tokio::time::timeout(pause, outbox.recv()).await {
            Ok(Some(message)) => message,
            Ok(None) => return,
            Err(_) => Message::Heartbeat,
        };
        if writer.send(&message, limit).await.is_err() {
            // The reader notices: nothing will come from the other side either.
            return;
        }
    }
}
