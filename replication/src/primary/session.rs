use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use brep_block::{BlockDevice, BlockStatus};
use brep_nbd::client::Connection;
use futures_util::future::join;
use tokio::sync::{RwLock, RwLockReadGuard, mpsc, oneshot};
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use super::ages::Due;
use super::copy::copy_differences;
use super::epochs::Drained;
use super::group::{DiskPart, Group, Loss};
use super::link::{CutAnswers, Link};
use super::plain::Plain;
use crate::commands::{Job, JobKind};
use crate::config::OnSlowPeer;
use crate::link::StopReason;
use crate::{Epoch, Error, Result};

/// Pause before what could not be copied is tried again.
const COPY_RETRY: Duration = Duration::from_secs(1);

/// How long a secondary may take to be told that it is left behind.
const TOLD_LIMIT: Duration = Duration::from_millis(200);

/// How long the secondary may take to become the primary; the guest waits for it.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(30);

/// Cuts that are tried for one checkpoint: a write that fails meanwhile is sent again.
const CUT_TRIES: usize = 3;

/// What is asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RequestKind {
    /// A checkpoint; answer when the cut is made.
    Cut,
    /// A checkpoint; answer when it is committed.
    Checkpoint,
    /// A checkpoint with nothing after it, after which the secondary takes over.
    Switchover,
}

impl RequestKind {
    /// Nothing has come of it so far.
    pub(crate) fn not_within(self, limit: Duration) -> Error {
        Error::failed(match self {
            RequestKind::Switchover => {
                format!("no switchover within {limit:?}; if it has not begun yet, it will not")
            }
            RequestKind::Cut | RequestKind::Checkpoint => format!("no checkpoint within {limit:?}"),
        })
    }
}

/// A request for a checkpoint.
pub(crate) struct CheckpointRequest {
    pub(crate) kind: RequestKind,
    pub(crate) answer: oneshot::Sender<Result<Epoch>>,
}

/// Who is at the other end.
pub(super) enum Peer {
    Brep(Link),
    Plain(Plain),
}

/// The data connections, by the numbers of the disks.
pub(super) type Connections = BTreeMap<usize, Arc<Connection>>;

/// One stay of the secondary.
pub(super) struct Session {
    group: Arc<Group>,
    peer: Peer,
    connections: Connections,
    /// It is about to end: nothing more is copied.
    ending: CancellationToken,
    /// Held by a cut, for which guests wait, and by each piece of a copy while it is on its way.
    cutting: RwLock<()>,
    /// A disk has been copied: the next checkpoint is to hold it.
    has_joined: AtomicBool,
}

impl Session {
    pub(super) fn new(group: &Arc<Group>, peer: Peer, connections: Connections) -> Self {
        Session {
            group: Arc::clone(group),
            peer,
            connections,
            ending: CancellationToken::new(),
            cutting: RwLock::new(()),
            has_joined: AtomicBool::new(false),
        }
    }

    /// Waits for the end of a cut; the next one waits until the result is dropped.
    pub(super) async fn not_in_a_cut(&self) -> RwLockReadGuard<'_, ()> {
        self.cutting.read().await
    }

    pub(super) fn is_ending(&self) -> bool {
        self.ending.is_cancelled()
    }

    /// Runs until the peer is lost, stops, or `stop` is done; returns why.
    pub(super) async fn run(
        &self,
        requests: &mut mpsc::Receiver<CheckpointRequest>,
        stop: impl Future<Output = StopReason>,
    ) -> Loss {
        let peer = async {
            match &self.peer {
                Peer::Brep(link) => link.run().await,
                Peer::Plain(plain) => plain.run().await,
            }
        };
        let stopped = async {
            let reason = stop.await;
            self.ending.cancel();
            if reason == StopReason::Shutdown {
                // Nobody is there afterwards who could take note of what was not answered.
                self.group.idle().await;
            }
            if let Peer::Brep(link) = &self.peer {
                link.stop(reason).await;
            }
            "replication was stopped here".to_owned()
        };
        let mut peer = std::pin::pin!(peer);
        let (reason, link): (Loss, _) = tokio::select! {
            biased;
            reason = &mut peer => (reason.into(), None),
            reason = self.watch_connections() => (reason.into(), Some(peer)),
            reason = self.watch_ages() => (reason.into(), Some(peer)),
            reason = self.group.watch_window() => (self.too_slow(reason).await, Some(peer)),
            reason = self.group.takeover_overdue() => (reason.into(), Some(peer)),
            error = self.work(requests) => (error.to_string().into(), Some(peer)),
            reason = stopped => (reason.into(), Some(peer)),
        };
        self.group.takeover_decided(link).await;
        self.group.end_switchover();
        reason
    }

    /// What becomes of a secondary that is too slow.
    async fn too_slow(&self, reason: String) -> Loss {
        match (self.group.config.on_slow_peer, &self.peer) {
            (OnSlowPeer::Lost, _) => reason.into(),
            (OnSlowPeer::PullAhead, Peer::Plain(_)) => Loss::left_behind(reason),
            (OnSlowPeer::PullAhead, Peer::Brep(link)) => {
                let loss = Loss::left_behind(reason);
                // It ends the session when it is told; a write that fails by this is not its loss.
                self.group.core().dropped = Some(loss.clone());
                // It need not wait for what does not come; but it may be too slow for this too.
                let _ = tokio::time::timeout(TOLD_LIMIT, link.stop(StopReason::Stopped)).await;
                loss
            }
        }
    }

    async fn watch_connections(&self) -> String {
        let ended = self.connections.values().map(|c| Box::pin(c.failed()));
        let (error, _, _) = futures_util::future::select_all(ended).await;
        error.to_string()
    }

    /// Ends when the oldest request has waited too long for the peer, wherever it waits.
    async fn watch_ages(&self) -> String {
        let limit = self.group.config.peer_timeout;
        loop {
            match self.group.oldest_request() {
                Due::Now => return format!("the oldest request has waited for {limit:?}"),
                Due::At(time) => sleep_until(time).await,
            }
        }
    }

    /// Copies, then takes checkpoints. What joins is copied beside those.
    async fn work(&self, requests: &mut mpsc::Receiver<CheckpointRequest>) -> Error {
        let compare = self.group.compares();
        if let Err(error) = self.copy_all(requests).await {
            return error;
        }
        tokio::select! {
            biased;
            error = self.copy_what_joins(compare) => error,
            error = self.take_checkpoints(requests) => error,
        }
    }

    /// Copies the disks that no checkpoint holds yet, one after the other. Ends with the session.
    async fn copy_what_joins(&self, compare: bool) -> Error {
        for disk in self.group.disks_that_join(true) {
            let is_equal = || self.group.try_join(disk.number);
            if let Err(error) = self.copy(std::slice::from_ref(&disk), compare, is_equal).await {
                return error;
            }
            self.tell_copied(&disk);
            self.has_joined.store(true, Ordering::Relaxed);
            self.group.wake.notify_one();
        }
        std::future::pending().await
    }

    /// A disk has been copied: the next checkpoint holds it, which is taken now.
    async fn take_in(&self) -> Result<()> {
        if matches!(&self.peer, Peer::Brep(link) if link.guest_on_peer) {
            // Its writes would be dropped: the manager's next one holds the disk.
            self.group.core().settling = false;
            return Ok(());
        }
        self.settle().await
    }

    async fn take_checkpoints(&self, requests: &mut mpsc::Receiver<CheckpointRequest>) -> Error {
        let interval = match &self.peer {
            // The manager of the secondary's guest decides.
            Peer::Brep(link) if link.guest_on_peer => None,
            Peer::Plain(_) => None,
            Peer::Brep(_) => self.group.config.checkpoint_interval,
        };
        loop {
            let tick = async {
                match interval {
                    Some(interval) => tokio::time::sleep(interval).await,
                    None => std::future::pending().await,
                }
            };
            let result = tokio::select! {
                biased;
                () = self.group.wake.notified() => {
                    if self.group.copy_again() {
                        if let Peer::Brep(link) = &self.peer
                            && let Err(error) = link.copy_begun().await
                        {
                            return error;
                        }
                        if let Err(error) = self.copy_all(requests).await {
                            return error;
                        }
                    }
                    if self.has_joined.swap(false, Ordering::Relaxed)
                        && let Err(error) = self.take_in().await
                    {
                        return error;
                    }
                    self.checkpoints_for_peer().await
                }
                request = requests.recv() => match request {
                    Some(request) => self.checkpoint_for(request).await,
                    None => return Error::failed("brep is going away"),
                },
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
                Err(Failure::Void(error)) => self.note_no_checkpoint(&error),
                Err(Failure::Lost(error)) => return error,
            }
        }
    }

    /// Sends what differs of some disks until nothing does any more.
    ///
    /// # Errors
    /// The peer is lost.
    async fn copy(
        &self,
        disks: &[Arc<DiskPart>],
        compare: bool,
        is_equal: impl Fn() -> bool,
    ) -> Result<()> {
        while !is_equal() {
            let copied = copy_differences(&self.group, self, disks, compare).await;
            if let Err(error) = copied {
                // What cannot be read here keeps the copy from ending, and nothing else.
                if !self.group.is_attached() {
                    return Err(error);
                }
                tracing::warn!(%error, "a part of the copy is tried again");
            }
            if !is_equal() {
                // One of the sides refuses some of it, and the errors say so.
                tokio::time::sleep(COPY_RETRY).await;
            }
        }
        Ok(())
    }

    /// Copies the disks that checkpoints hold, and takes one.
    async fn copy_all(&self, requests: &mut mpsc::Receiver<CheckpointRequest>) -> Result<()> {
        let compare = self.group.compares();
        let disks = self.group.disks_that_join(false);
        let copying = async {
            self.copy(&disks, compare, || !self.group.has_differences()).await?;
            match &self.peer {
                Peer::Brep(link) => link.copy_done().await,
                Peer::Plain(_) => Ok(()),
            }
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
            biased;
            result = copying => result?,
            () = refusing => {}
        }
        self.group.end_copy();
        disks.iter().for_each(|disk| self.tell_copied(disk));
        self.settle().await
    }

    fn tell_copied(&self, disk: &DiskPart) {
        let job = Job::ended(JobKind::Mirror, &disk.name, disk.size());
        self.group.events.emit("BLOCK_JOB_COMPLETED", job.completed());
    }

    /// Takes the checkpoint that a copy ends with.
    async fn settle(&self) -> Result<()> {
        loop {
            match self.checkpoint(None).await {
                Ok(_) => {
                    self.group.core().settling = false;
                    return Ok(());
                }
                Err(Failure::Void(error)) => self.note_no_checkpoint(&error),
                Err(Failure::Lost(error)) => return Err(error),
            }
            tokio::time::sleep(COPY_RETRY).await;
        }
    }

    fn note_no_checkpoint(&self, error: &Error) {
        tracing::warn!(%error, "no checkpoint");
        self.group.core().reason = Some(format!("no checkpoint: {error}"));
    }

    /// Makes the secondary the primary: it is asked, the guest is held and drained, a checkpoint
    /// holds everything, and this side's record says that it is a secondary before the other one's
    /// may say that it is the primary.
    async fn switch_over(
        &self,
        answer: oneshot::Sender<Result<Epoch>>,
    ) -> std::result::Result<(), Failure> {
        let prepared = async {
            let void = Failure::Void;
            let Peer::Brep(link) = &self.peer else {
                let what = "the other side is no brep: it cannot take over";
                return Err(void(Error::refused(what)));
            };
            if let Some(disk) = self.group.disks_that_join(true).first() {
                return Err(void(Error::refused(format!(
                    "disk {} is being copied for the first time, and the other side would lack it; \
                     brep resync --wait waits for that",
                    disk.name
                ))));
            }
            link.request_switchover().await.map_err(void)?;
            self.group.hold_guest().await.map_err(void)?;
            let epoch = self.checkpoint(None).await?;
            if self.group.has_differences() {
                return Err(void(Error::failed("a write failed meanwhile")));
            }
            if answer.is_closed() {
                return Err(void(Error::failed("nobody waits for the switchover any more")));
            }
            self.group.step_down(epoch).await.map_err(void)?;
            Ok((link, epoch))
        };
        let (link, epoch) = match prepared.await {
            Ok(prepared) => prepared,
            Err(failure) => {
                self.group.release_guest();
                let _ = answer.send(Err(failure.error().clone()));
                return match failure {
                    Failure::Void(_) => Ok(()),
                    lost => Err(lost),
                };
            }
        };
        self.group.await_switchover(answer);
        link.take_over(epoch).await.map_err(Failure::Lost)?;
        // It says what becomes of it, and ends the session.
        tokio::time::sleep(TAKE_OVER_LIMIT).await;
        Err(Failure::Lost(Error::failed("the secondary has not taken over in time")))
    }

    async fn checkpoint_for(&self, request: CheckpointRequest) -> std::result::Result<(), Failure> {
        let CheckpointRequest { kind, answer } = request;
        if kind == RequestKind::Switchover {
            return self.switch_over(answer).await;
        }
        let mut answer = Some(answer);
        let result = self.checkpoint((kind == RequestKind::Cut).then_some(&mut answer)).await;
        if let Some(answer) = answer {
            let told = result.as_ref().map(|epoch| *epoch).map_err(|f| f.error().clone());
            let _ = answer.send(told);
        }
        result.map(drop)
    }

    /// One checkpoint is the answer to all that had asked when it began.
    async fn checkpoints_for_peer(&self) -> std::result::Result<(), Failure> {
        let asked = std::mem::take(&mut self.group.core().checkpoints_for_peer);
        if asked.is_empty() {
            return Ok(());
        }
        let result = self.checkpoint(None).await;
        if let Peer::Brep(link) = &self.peer {
            let told = result.as_ref().map(|epoch| *epoch).map_err(|f| f.error().clone());
            for id in asked {
                link.answer_checkpoint(id, &told).await;
            }
        }
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
                let disks = self.group.disks_that_join(false);
                let copied = copy_differences(&self.group, self, &disks, false).await;
                copied.map_err(Failure::Void)?;
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
        self.group.late_writes().await;
        // Of what the last commit dropped nothing can come back, and what was set since survives a
        // loss of power without the logs.
        self.group.flush_maps().await.map_err(Failure::Lost)?;
        // A copy beside it may have much on its way, for which no guest is to wait. But nor does a cut
        // wait for a disk that cannot be read.
        let patience = self.group.config.peer_timeout / 2;
        let cutting = tokio::time::timeout(patience, self.cutting.write()).await;
        let begun = Instant::now();
        let mut answers = match &self.peer {
            Peer::Brep(link) => Some(link.expect_cut()),
            Peer::Plain(_) => None,
        };
        let Some((epoch, without)) = self.group.start_cut().map_err(Failure::Lost)? else {
            return Err(Failure::Lost(Error::failed("there is no session")));
        };
        self.group.secure_record().await.map_err(Failure::Lost)?;
        match self.drain(begun + self.group.config.peer_timeout / 2).await {
            Drained::Clean => {}
            Drained::Failed => {
                self.group.void_cut();
                return Ok(None);
            }
            Drained::NotYet => {
                self.group.void_cut();
                return Err(Failure::Void(Error::failed(
                    "the local disk is stuck: a write to it does not end",
                )));
            }
        }
        let cut = match (&self.peer, &mut answers) {
            (Peer::Brep(link), Some(answers)) => link.cut(epoch, &without, answers).await,
            (Peer::Plain(plain), _) => plain.flush().await.map_err(Failure::Void),
            (Peer::Brep(_), None) => Err(Failure::Lost(Error::failed("nobody waits for the cut"))),
        };
        if let Err(failure) = cut {
            if matches!(failure, Failure::Void(_)) {
                self.group.void_cut();
            }
            return Err(failure);
        }
        self.group.release();
        drop(cutting);
        let pause_us = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.group.counters.last_pause_us.store(pause_us, Ordering::Relaxed);
        Ok(Some(Cut { epoch, without, answers }))
    }

    async fn wait_commit(&self, cut: Cut) -> std::result::Result<(), Failure> {
        let Cut { epoch, without, answers } = cut;
        let peer = async {
            match (&self.peer, answers) {
                (Peer::Brep(link), Some(mut answers)) => link.committed(epoch, &mut answers).await,
                _ => Ok(()),
            }
        };
        // Every write of the epoch has ended here, so both sides flush at the same time.
        let (peer, local) = join(peer, self.group.secure_disks()).await;
        peer?;
        if let Err(error) = local {
            self.group.void_cut();
            return Err(Failure::Void(error));
        }
        self.group.committed(epoch, &without).await.map_err(Failure::Lost)
    }

    /// Waits until every write of the ended epoch has ended on both sides. For the peer as long as
    /// it is not lost; for the local disk alone until `limit`, because others are held back
    /// meanwhile, and what they wait for would seem to be the peer.
    async fn drain(&self, limit: Instant) -> Drained {
        loop {
            let ended = self.group.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            match self.group.drained() {
                Drained::NotYet if Instant::now() < limit => {
                    let _ = tokio::time::timeout_at(limit, ended).await;
                }
                Drained::NotYet if self.group.cut_waits_for_local() => return Drained::NotYet,
                Drained::NotYet => ended.await,
                drained => return drained,
            }
        }
    }

    /// What the peer's disk says of a range without reading it.
    pub(super) async fn block_status(
        &self,
        disk: usize,
        offset: u64,
        length: u64,
    ) -> Result<BlockStatus> {
        Ok(self.connections[&disk].block_status(offset, length).await?)
    }

    /// The peer's hashes of a range of a disk.
    pub(super) async fn hashes(
        &self,
        disk: usize,
        offset: u64,
        length: u64,
        chunk: u32,
    ) -> Result<Vec<String>> {
        match &self.peer {
            Peer::Brep(link) => link.hashes(disk, offset, length, chunk).await,
            Peer::Plain(plain) => plain.hashes(disk, offset, length, chunk).await,
        }
    }
}

/// A cut that is made and not committed.
struct Cut {
    epoch: Epoch,
    /// The numbers of the disks that join, and are no part of it.
    without: Vec<usize>,
    answers: Option<CutAnswers>,
}

/// Why there was no checkpoint.
pub(super) enum Failure {
    /// It was not made; the session goes on.
    Void(Error),
    /// The session is over.
    Lost(Error),
}

impl Failure {
    fn error(&self) -> &Error {
        match self {
            Failure::Void(error) | Failure::Lost(error) => error,
        }
    }
}
