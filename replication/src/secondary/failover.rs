use std::sync::Arc;
use std::time::Duration;

use brep_block::BlockDevice;
use brep_hbitmap::MapSet;
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;

use super::buffers::Buffer;
use super::disk::ReplicaDisk;
use super::group::Group;
use super::plain::Claim;
use super::session::{Promoted, Session};
use crate::commands::{Job, JobKind};
use crate::config::{DiskConfig, Durability};
use crate::errors::now_s;
use crate::link::StopReason;
use crate::primary::{MapsOf, Primary, PrimaryDisk, Since};
use crate::state::{BufferRef, DiskRecord, PrimaryRecord, Promotion, Record, Role, Target};
use crate::status::Progress;
use crate::{Epoch, Error, Generation, Result, primary};

/// Pause before a merge that failed is tried again.
const MERGE_RETRY: Duration = Duration::from_secs(5);

/// Recorded, and not carried out.
pub(super) const UNSERVED: &str = "this side is promoted, and does not serve: start it again";

/// What a failover is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Wanted {
    pub(crate) target: Target,
    /// It may be undone: nothing is merged before it is committed.
    pub(crate) hold: bool,
}

impl Wanted {
    /// To the last checkpoint, for good.
    pub(crate) const CHECKPOINT: Wanted = Wanted { target: Target::Checkpoint, hold: false };
}

/// What a failover did.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Report {
    pub(crate) target: Target,
    /// The checkpoint that the disk became, or that came before what it became.
    pub(crate) epoch: Option<Epoch>,
    /// Bytes by which the newest received state and the checkpoint differ at most (by units of
    /// 2 KiB): what was given up, or kept.
    pub(crate) differing_bytes: u64,
    /// Milliseconds since the primary was last heard of; a primary that went on alone since then
    /// has more.
    pub(crate) last_contact_ms: Option<u64>,
    /// Microseconds until the disk was served.
    pub(crate) took_us: u64,
    /// It can still be undone.
    pub(crate) held: bool,
    /// It had been done before.
    pub(crate) repeated: bool,
    /// Disks that are not part of this: they were being added, and no checkpoint held them.
    pub(crate) left_out: Vec<String>,
}

impl Group {
    /// Makes this side the disk. Served at once; merged behind, unless it is to be held.
    ///
    /// # Errors
    /// Refused, with the reason, if there is nothing to be promoted to, or if it has been promoted
    /// to something else.
    pub(crate) async fn failover(self: &Arc<Self>, wanted: Wanted) -> Result<Report> {
        let begun = Instant::now();
        let _transition = self.transition.lock().await;
        if let Some(report) = self.check_failover(wanted)? {
            return Ok(report);
        }
        self.check_not_superseded().await?;
        self.colo.begin_failover();
        let report = self.take_over(wanted, begun).await;
        self.colo.end_failover(report.is_ok(), &self.events);
        report
    }

    async fn take_over(self: &Arc<Self>, wanted: Wanted, begun: Instant) -> Result<Report> {
        // A primary that is alive stops for good, or goes on: it is never left to guess.
        let session = self.session();
        if let Some(session) = &session {
            session.announce_promotion().await;
        }
        let promoted = self.promote_drained(wanted).await;
        if let Some(session) = &session {
            session.conclude_promotion(self.what_became());
        }
        let (differing_bytes, left_out) = match promoted {
            Ok(promoted) => promoted,
            Err(error) => {
                self.reserve_room().await;
                return Err(self.explain(error));
            }
        };
        let report = Report {
            target: wanted.target,
            epoch: self.record().com.map(|c| c.epoch),
            differing_bytes,
            last_contact_ms: self.last_contact_ms(),
            took_us: u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX),
            held: wanted.hold,
            repeated: false,
            left_out,
        };
        self.core().reason = None;
        let (target, epoch) = (report.target.as_str(), report.epoch.map(|e| e.0));
        tracing::warn!(target, epoch, held = report.held, "promoted: this side is the disk now");
        self.events.emit("BREP_PROMOTED", json!(report));
        if !wanted.hold {
            self.spawn_merge();
        }
        self.serve_guests().await;
        Ok(report)
    }

    /// Why this side cannot take over from a primary that is alive, if it cannot.
    pub(super) fn cannot_take_over(&self) -> Option<String> {
        let record = self.record();
        if self.peer().is_none() {
            return Some(
                "the other side does not know where it would find this one as its secondary: \
                 brep peer set URI, there"
                    .to_owned(),
            );
        }
        if self.has_guest() {
            return Some(
                "the other side serves a guest of its own: its manager decides".to_owned(),
            );
        }
        if record.is_primary() || !record.has_checkpoint() {
            return Some("the other side has no checkpoint yet".to_owned());
        }
        let session = self.session().filter(|_| self.has_open_test())?;
        let leaving = session.disks.leaving.upgrade();
        let shown = leaving.iter().find(|disk| self.disks().has(disk))?;
        Some(format!(
            "a test view on the other side still shows disk {}, which has been removed: end it \
             first, with brep failover --test-end there",
            shown.name
        ))
    }

    /// The primary has made room, with a checkpoint that holds everything.
    pub(super) async fn switch_over(self: Arc<Self>, session: Arc<Session>, epoch: Epoch) {
        // Whoever asked for it here, or for a checkpoint, is told what the session does not live to
        // tell.
        let waiting = session.take_requests();
        let complete = self.record().com.is_some_and(|com| com.epoch == epoch)
            && self.core().is_current(&session);
        let taken_over = match complete {
            true => self.failover(Wanted::CHECKPOINT).await.map(drop),
            false => Err(Error::failed("the checkpoint of the switchover is not the last one")),
        };
        if let Err(error) = &taken_over {
            tracing::error!(%error, "no switchover");
            session.conclude_promotion(self.what_became());
        }
        for answer in waiting {
            let _ = answer.send(taken_over.clone().map(|()| epoch));
        }
    }

    /// What the primary is to be told of a promotion: what a restart of this side would find,
    /// whatever has failed since.
    fn what_became(&self) -> Promoted {
        match (self.is_promoted(), self.side.record.failure()) {
            (true, _) => Promoted::Yes,
            (false, Some(_)) => Promoted::Unknown,
            (false, None) => Promoted::No,
        }
    }

    /// Why a promotion has failed, and what it has left.
    fn explain(&self, error: Error) -> Error {
        match self.what_became() {
            Promoted::No => error,
            Promoted::Unknown => error.context("it is not known whether this side is promoted"),
            Promoted::Yes => {
                let error = error.context(UNSERVED);
                self.core().reason = Some(error.to_string());
                error
            }
        }
    }

    /// Ends what the primary has begun here, and promotes. Returns the bytes that differ, and the
    /// disks that have no part in it.
    async fn promote_drained(self: &Arc<Self>, wanted: Wanted) -> Result<(u64, Vec<String>)> {
        self.end_session(StopReason::Promoted).await?;
        self.drop_test("this side is promoted");
        let _held = self.hold_guest().await?;
        // Again, now that nothing moves: a write that was drained may have failed, and the guest
        // may have written.
        self.check_failover(wanted)?;
        let left_out = self.leave_out_joining();
        let configs = left_out.configs();
        let differing_bytes = self.promote(wanted, &configs).await?;
        left_out.gone();
        Ok((differing_bytes, configs.into_iter().map(|disk| disk.name).collect()))
    }

    /// Where guests have no address of their own, they are served where the primary was: also if
    /// that door was closed before the failover.
    async fn serve_guests(&self) {
        if !self.serves_guests_here() {
            return;
        }
        let served =
            async { self.service()?.serve(self.listen_address()?, &self.disk_names()).await };
        if let Err(error) = served.await {
            let reason = format!("promoted, but guests are not served: {error}");
            tracing::error!("{reason}");
            self.core().reason = Some(reason);
        }
    }

    /// From now on this side is a primary: guests' writes are counted in its maps, and go to its
    /// peer, if it has one.
    fn become_primary(self: &Arc<Self>, maps: Vec<MapSet>) -> Result<()> {
        let mut devices: Vec<Arc<dyn BlockDevice>> = Vec::new();
        for disk in self.disks() {
            devices.push(disk.promoted().ok_or_else(|| Error::failed("not promoted"))?);
        }
        let group = primary::Group::of_promoted(&self.side, self, devices, maps)?;
        for (disk, part) in self.disks().into_iter().zip(group.disks()) {
            disk.gate().replace(Arc::new(PrimaryDisk::new(&group, part)));
        }
        *self.primary() = Some(Primary::start(&group, &self.service()?));
        self.watch_space();
        Ok(())
    }

    /// Whether it can be done; a report if it has been done already.
    fn check_failover(&self, wanted: Wanted) -> Result<Option<Report>> {
        let record = self.record();
        let secondary = &record.secondary;
        if let Some(report) = repeated(&record, wanted, self.last_contact_ms()) {
            return match self.primary().is_some() {
                true => report.map(Some),
                false => Err(Error::failed(UNSERVED)),
            };
        }
        if secondary.outdated {
            return Err(Error::refused(match secondary.inconsistent {
                true => {
                    "this side is being brought to its primary's line of writes (outdated): it \
                     can be promoted when that copy has ended; nothing was changed"
                }
                false => {
                    "this side was a primary, and lacks what the other side has written since \
                     (outdated). Let the primary connect; or, if this side's data shall be kept, \
                     stop it and start it with brep primary; nothing was changed"
                }
            }));
        }
        if !record.has_checkpoint() {
            return Err(Error::refused(
                "there is no complete checkpoint (inconsistent): a full copy has not ended, or \
                 power was lost since. Let the primary copy everything; nothing was changed",
            ));
        }
        if wanted.target == Target::Latest {
            if self.disks().iter().any(|d| d.guest_wrote()) {
                return Err(Error::refused(
                    "this side's guest has written since the checkpoint; its view and the latest \
                     state are different disks. Use --to checkpoint",
                ));
            }
            if !secondary.latest_ok {
                return Err(Error::refused(
                    "what was received since the checkpoint is not known to be complete \
                     (asynchronous, interrupted, or in the middle of a copy). Use --to checkpoint",
                ));
            }
        }
        Ok(None)
    }

    pub(crate) fn last_contact_ms(&self) -> Option<u64> {
        let since = self.core().last_contact?;
        u64::try_from(since.elapsed().as_millis()).ok()
    }

    /// Writes the record first, then serves. Returns the bytes that differ.
    async fn promote(self: &Arc<Self>, wanted: Wanted, left_out: &[DiskConfig]) -> Result<u64> {
        let Wanted { target, hold } = wanted;
        let record = self.record();
        let set = record.set.ok_or_else(|| Error::failed("no set"))?;
        let differing_bytes = self.disks().iter().map(|d| d.hidden_bytes()).sum();
        // A side that made room in a switchover, and was never written to: its files are the
        // checkpoint.
        let merged =
            !hold && (target == Target::Latest || self.disks().iter().all(|d| !d.has_buffers()));
        self.release_room();
        let mut tops: Vec<Option<Buffer>> = Vec::new();
        let mut maps = Vec::new();
        for disk in self.disks() {
            let prepared = self.prepare_disk(&disk, target, &record).await;
            let top = match (prepared, merged) {
                (Ok(map), true) => Ok((map, None)),
                (Ok(map), false) => disk.pool.take(set).await.map(|top| (map, Some(top))),
                (Err(error), _) => Err(error),
            };
            match top {
                Ok((map, top)) => {
                    maps.push(map);
                    tops.push(top);
                }
                Err(error) => {
                    let disks = self.disks().into_iter();
                    let unused = tops.into_iter().map(|top| top.into_iter().collect());
                    self.recycle(disks.zip(unused).collect()).await;
                    return Err(error);
                }
            }
        }
        let references: Vec<_> = tops.iter().map(|t| t.as_ref().map(Buffer::reference)).collect();
        self.update_record(|record| {
            let held = hold.then(|| record.before_failover(now_s(), left_out));
            record.begin_line_at_checkpoint(Generation::random());
            let mut references = references.iter();
            self.record_disks(record, |disk| {
                promoted_record(disk.record(), references.next().copied().flatten())
            });
            left_out.iter().for_each(|disk| record.remove_disk(&disk.name));
            record.role = Role::Primary;
            record.session = None;
            let disks = self.disks().iter().map(|d| (d.name.clone(), d.size())).collect();
            // Nobody else can be the disk: a restart serves the guest at once.
            record.primary =
                PrimaryRecord { had_peer: true, alone: true, disks, ..PrimaryRecord::default() };
            record.secondary.latest_ok &= hold;
            record.secondary.made_room = false;
            let dropped_bytes = differing_bytes;
            record.secondary.promotion = Some(Promotion { target, merged, dropped_bytes, held });
        })?;
        // A side that forgot its promotion would let the old primary overwrite it.
        match (self.sync_record().await, self.config.durability) {
            (Err(error), Durability::Power) => return Err(error),
            (Err(error), Durability::Process) => {
                tracing::error!(%error, "the promotion may not survive a power loss");
            }
            (Ok(()), _) => {}
        }
        for (disk, top) in self.disks().iter().zip(tops) {
            disk.promote_onto(top, target);
        }
        self.become_primary(maps)?;
        Ok(differing_bytes)
    }

    /// What has to be there before the record says that this side is a primary.
    async fn prepare_disk(
        &self,
        disk: &ReplicaDisk,
        target: Target,
        record: &Record,
    ) -> Result<MapSet> {
        if target == Target::Latest {
            // What was received is all that there is once the pre-images are given up.
            disk.flush_image().await?;
        }
        // Its maps count from the fork.
        let since = record.com.map_or(Since::Ever, Since::Commit);
        let mut map = MapsOf::new(&self.side, &disk.name, disk.size()).create(since)?;
        disk.mark_beyond_checkpoint(target, &mut map).await?;
        Ok(map)
    }

    /// How far the merge of each disk has come; none when it has ended.
    pub(crate) fn merges(&self) -> Vec<Option<Progress>> {
        self.disks().iter().map(|d| d.promoted().and_then(|p| p.progress())).collect()
    }

    /// Whether nothing of a promotion is left to be done, so that disks may come and go.
    pub(crate) fn merge_has_ended(&self) -> bool {
        self.core().merge_has_ended
    }

    /// Merges in the background, until it has ended or the process does.
    pub(crate) fn spawn_merge(self: &Arc<Self>) {
        let group = Arc::clone(self);
        tokio::spawn(async move {
            let stopping = group.stopping.clone();
            let merging = async {
                while let Err(error) = group.merge().await {
                    tracing::error!(%error, "the merge has failed and will be tried again");
                    group.core().reason = Some(format!("the merge fails: {error}"));
                    group.errors.latch(&error.to_string());
                    group.events.emit("BREP_MERGE_FAILED", json!({ "error": error.to_string() }));
                    tokio::time::sleep(MERGE_RETRY).await;
                }
            };
            tokio::select! {
                biased;
                () = merging => {}
                () = stopping.cancelled() => {}
            }
        });
    }

    async fn merge(self: &Arc<Self>) -> Result<()> {
        for disk in self.disks() {
            if let Some(promoted) = disk.promoted() {
                promoted.merge().await?;
            }
        }
        // The record gives the buffers up before anything is done to them.
        self.update_record(|record| {
            self.record_disks(record, |disk| DiskRecord::new(&disk.name, disk.size()));
            if let Some(promotion) = &mut record.secondary.promotion {
                promotion.merged = true;
            }
        })?;
        // Whatever the durability: with a record of before this the buffers would be merged again, over
        // what the guest has flushed since.
        self.sync_record().await?;
        for disk in self.disks() {
            disk.drop_buffers().await?;
        }
        {
            let mut core = self.core();
            (core.reason, core.merge_has_ended) = (None, true);
        }
        self.errors.clear_latch();
        for disk in self.disks() {
            let job = Job::ended(JobKind::Commit, &disk.name, disk.size());
            self.events.emit("BLOCK_JOB_COMPLETED", job.completed());
        }
        tracing::info!("merged: the disk files alone are the disks");
        self.events.emit("BREP_MERGED", json!({}));
        Ok(())
    }

    /// Goes on with a failover that an earlier run began.
    pub(crate) async fn resume_promotion(self: &Arc<Self>) -> Result<()> {
        if self.is_promoted() {
            let open = |d: &Arc<ReplicaDisk>| MapsOf::new(&self.side, &d.name, d.size()).open();
            let maps = self.disks().iter().map(open).collect::<Result<Vec<_>>>()?;
            self.become_primary(maps)?;
            if self.record().held().is_none() {
                self.spawn_merge();
            }
        }
        Ok(())
    }

    /// Ends replication for good and gives the checkpoint up: the disks stay what was received.
    ///
    /// # Errors
    /// Refused without `discard` if there is a checkpoint to lose.
    pub(crate) async fn stop(self: &Arc<Self>, discard: bool) -> Result<()> {
        let _transition = self.transition.lock().await;
        let record = self.record();
        let secondary = &record.secondary;
        if let Some(promotion) = &secondary.promotion {
            if !promotion.merged {
                tracing::info!("the merge goes on when this side is started again");
            }
            return Ok(());
        }
        let bytes: u64 = self.disks().iter().map(|d| d.hidden_bytes()).sum();
        let kept =
            record.com.is_some() && (bytes > 0 || self.disks().iter().any(|d| d.guest_wrote()));
        if kept && !discard {
            return Err(Error::refused(format!(
                "the buffers hold the last checkpoint ({bytes} bytes of pre-images); `brep stop \
                 --discard-checkpoint` drops them and leaves the disks as last received. To keep \
                 the checkpoint, end the process with SIGTERM instead"
            )));
        }
        self.core().set_stopped();
        if let Some(plain) = &self.plain {
            plain.set_claim(Claim::None);
        }
        self.end_session(StopReason::Stopped).await?;
        if discard {
            self.drop_test("the checkpoint is given up");
            self.update_record(|record| {
                self.record_disks(record, ReplicaDisk::record_without_buffers);
                record.com = None;
                record.secondary.inconsistent = true;
                record.secondary.latest_ok = false;
            })?;
            self.secure_record().await?;
            let _held = self.hold_guest().await?;
            for disk in self.disks() {
                disk.drop_buffers().await?;
            }
        }
        Ok(())
    }
}

/// The answer to a failover on a side that has been promoted already; none if it has not.
pub(crate) fn repeated(
    record: &Record,
    wanted: Wanted,
    last_contact_ms: Option<u64>,
) -> Option<Result<Report>> {
    let done = record.secondary.promotion.as_ref()?;
    let state = done.target.as_str();
    let refused = match (&done.held, wanted.hold) {
        (Some(_), false) => Some(format!(
            "this side has been promoted to its {state} state, and that is held: brep failover \
             --commit makes it final, brep failover --rollback undoes it"
        )),
        (Some(_), true) if done.target != wanted.target => Some(format!(
            "this side has been promoted to its {state} state, and that is held: undo it first, \
             with brep failover --rollback"
        )),
        (None, true) => Some(format!(
            "this side has already been promoted to its {state} state, for good; nothing was \
             changed"
        )),
        (None, false) if done.target != wanted.target => Some(format!(
            "this side has already been promoted to its {state} state; that cannot be changed"
        )),
        _ => None,
    };
    if let Some(reason) = refused {
        return Some(Err(Error::refused(reason)));
    }
    Some(Ok(Report {
        target: wanted.target,
        epoch: record.com.map(|c| c.epoch),
        differing_bytes: done.dropped_bytes,
        last_contact_ms,
        took_us: 0,
        held: wanted.hold,
        repeated: true,
        left_out: Vec::new(),
    }))
}

/// A promoted disk's record: the buffers that make the checkpoint, and the new top; for the
/// latest state, no buffers at all.
fn promoted_record(now: DiskRecord, top: Option<BufferRef>) -> DiskRecord {
    match top {
        Some(_) => DiskRecord { top, next: None, ..now },
        None => DiskRecord::new(&now.name, now.size),
    }
}
