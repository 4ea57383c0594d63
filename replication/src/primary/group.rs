mod maps;
mod resync;
mod role;
mod window;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{Error as BlockError, RangeLock, storage};
use brep_hbitmap::{MapSet, Role as MapRole};
use brep_nbd::client::Connection;
use serde_json::json;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

pub(crate) use self::maps::{MapsOf, Since};
use self::maps::{begin_copy, trust};
use self::role::check_role;
use self::window::HeldWrite;
use super::ages::{Ages, Due};
use super::epochs::{Drained, Epochs};
use super::hello::{Refusal, Wish};
use super::pace::Pace;
use super::progress::CopyProgress;
use crate::commands::{Colo, ColoMode};
use crate::config::PrimaryConfig;
use crate::control::EventBus;
use crate::door::Door;
use crate::errors::ErrorLog;
use crate::guest::Guest;
use crate::image::Image;
use crate::link::{CopyMode, DiskInfo, RefusalKind, Side};
use crate::node::Stage;
use crate::state::{Record, RecordStore, Role, SharedRecord};
use crate::status::LinkState;
use crate::written::describe;
use crate::{Commit, Epoch, Error, Generation, Result, SetId};

/// The disks of a primary, and everything that concerns all of them: epochs, window, record.
pub(crate) struct Group {
    pub(crate) config: PrimaryConfig,
    pub(crate) run: Uuid,
    pub(crate) events: EventBus,
    pub(crate) errors: ErrorLog,
    pub(crate) stopping: CancellationToken,
    disks: Vec<DiskPart>,
    /// Changed by the data thread alone, and never while the core is locked: queries need that.
    record: SharedRecord,
    core: Mutex<Core>,
    window_bytes: Arc<Semaphore>,
    window_requests: Arc<Semaphore>,
    /// A write has ended that a cut may be waiting for.
    pub(crate) ended: Notify,
    /// Whether replication is to run; the session task follows it.
    stage: watch::Sender<Stage>,
    /// The session task has something to do: a command, or a peer to be tried again.
    pub(crate) wake: Notify,
    /// Guests are gone and everything is replicated: the session may end.
    pub(crate) quiesced: CancellationToken,
    /// The guest may be served.
    pub(crate) guest_allowed: CancellationToken,
    /// What the guest's requests pass, on all disks.
    pub(crate) door: Arc<Door>,
    pub(crate) guest: Guest,
    pub(crate) colo: Colo,
    pub(crate) counters: Counters,
    pace: Mutex<Pace>,
    pace_changed: Notify,
    /// The guest's writes are timed.
    measuring: AtomicBool,
}

/// On which terms a session begins.
pub(crate) struct Terms<'a> {
    pub(crate) epoch: Epoch,
    /// Its token; a stock NBD server has none.
    pub(crate) session: Option<Uuid>,
    pub(crate) copy: CopyMode,
    /// What the operator had asked for when this was agreed on.
    pub(crate) wish: Wish,
    /// The operator says that the peer's disks are equal to these.
    pub(crate) trusted: bool,
    /// One a disk.
    pub(crate) connections: Vec<Arc<Connection>>,
    /// The other side, for people.
    pub(crate) peer: &'a str,
}

/// What the group has of each disk.
#[derive(Debug)]
pub(crate) struct DiskPart {
    pub(crate) name: String,
    pub(crate) file: String,
    pub(crate) image: Image,
    /// Serialises what overlaps, over the local leg of a write.
    pub(crate) locks: RangeLock,
}

pub(crate) struct Core {
    epochs: Epochs<HeldWrite>,
    /// One a disk, while a session is attached.
    connections: Vec<Arc<Connection>>,
    /// One a disk: what is known of the differences to the peer.
    maps: Vec<MapSet>,
    ages: Ages,
    /// Nothing more may be acknowledged: the record could not be saved.
    fatal: Option<String>,
    pub(crate) wish: Wish,
    /// Everything is to be copied again in this session; with hashes first, or not.
    pub(crate) again: Option<bool>,
    pub(crate) link: LinkState,
    pub(crate) refusal: Option<Refusal>,
    pub(crate) reason: Option<String>,
    /// Why the peer is about to be lost, if that was a command.
    pub(crate) dropped: Option<String>,
    pub(crate) peer: Option<String>,
    /// A copy runs; no cuts until it has ended.
    pub(crate) copying: bool,
    /// Of the last copy.
    progress: Option<CopyProgress>,
    /// The secondary's operators ask for a checkpoint, under these numbers; at most
    /// [`ASKED_MAX`](super::link::ASKED_MAX).
    pub(crate) checkpoints_for_peer: Vec<u64>,
    pub(crate) last_contact: Option<Instant>,
    pub(crate) last_commit: Option<Instant>,
    /// Something was written since the last cut.
    pub(crate) dirty: bool,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) guest_writes: AtomicU64,
    pub(crate) guest_write_bytes: AtomicU64,
    pub(crate) replicated_writes: AtomicU64,
    pub(crate) replicated_bytes: AtomicU64,
    pub(crate) checkpoints: AtomicU64,
    pub(crate) last_pause_us: AtomicU64,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("primary::Group").field("name", &self.config.name).finish_non_exhaustive()
    }
}

impl Group {
    /// Opens record and disks.
    pub(crate) async fn open(
        config: PrimaryConfig,
        events: EventBus,
        stopping: CancellationToken,
    ) -> Result<Arc<Self>> {
        let blank = || Record {
            set: Some(SetId::random()),
            cur: Some(Generation::random()),
            ..Record::blank(&config.name, Role::Primary)
        };
        let mut store = RecordStore::open(&config.state_dir, blank)?;
        let record = store.record();
        check_role(record).map_err(|e| e.context(config.state_dir.display()))?;
        let mut disks = Vec::new();
        for disk in &config.disks {
            disks.push(DiskPart {
                name: disk.name.clone(),
                file: disk.path.display().to_string(),
                image: Image::open(disk).await?,
                locks: RangeLock::new(),
            });
        }
        store.update(|record| {
            record.begin_run(storage::boot_id(&config.state_dir));
            record.become_primary();
            let size = |d: &DiskPart| (d.name.clone(), d.image.device().size());
            record.primary.disks = disks.iter().map(size).collect();
        })?;
        let set = store.record().set;
        let maps = disks
            .iter()
            .map(|d| {
                let size = d.image.device().size();
                MapsOf { state_dir: &config.state_dir, set, disk: &d.name, size }.open()
            })
            .collect::<Result<Vec<_>>>()?;
        let window_bytes = u32::try_from(config.window_bytes).unwrap_or(u32::MAX >> 4);
        let core = Core {
            epochs: Epochs::new(store.record().epoch),
            connections: Vec::new(),
            maps,
            ages: Ages::default(),
            fatal: None,
            again: None,
            wish: Wish { seeded: config.seeded, ..Wish::default() },
            link: if config.peer.is_some() { LinkState::Disconnected } else { LinkState::None },
            refusal: None,
            reason: None,
            dropped: None,
            peer: config.peer.as_ref().map(ToString::to_string),
            copying: false,
            progress: None,
            checkpoints_for_peer: Vec::new(),
            last_contact: None,
            last_commit: None,
            dirty: false,
        };
        let stage = match config.start && config.peer.is_some() {
            true => Stage::Running,
            false => Stage::None,
        };
        let door = Door::new(&config.name);
        let pace = Pace::new(config.resync_limits);
        Ok(Arc::new(Group {
            guest: Guest::new(vec![Arc::clone(&door)]),
            door,
            colo: Colo::default(),
            window_bytes: Arc::new(Semaphore::new(window_bytes as usize)),
            window_requests: Arc::new(Semaphore::new(config.window_requests)),
            config,
            run: crate::random::uuid(),
            events,
            errors: ErrorLog::default(),
            stopping,
            disks,
            record: SharedRecord::new(store),
            core: Mutex::new(core),
            ended: Notify::new(),
            stage: watch::Sender::new(stage),
            wake: Notify::new(),
            quiesced: CancellationToken::new(),
            guest_allowed: CancellationToken::new(),
            counters: Counters::default(),
            pace: Mutex::new(pace),
            pace_changed: Notify::new(),
            measuring: AtomicBool::new(false),
        }))
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn disks(&self) -> &[DiskPart] {
        &self.disks
    }

    pub(crate) fn record(&self) -> Record {
        Record::clone(&self.record.get())
    }

    /// What hello tells of this side.
    pub(crate) fn side(&self) -> Side {
        let (record, maps) = (self.record(), describe(self.core().maps.iter()));
        let size = |d: &DiskPart| d.image.device().size();
        Side {
            name: self.config.name.clone(),
            run: self.run,
            set: record.set,
            cur: record.cur,
            fork: record.fork,
            com: record.com,
            epoch: record.epoch,
            session: record.session,
            history: record.history,
            primary: true,
            disks: self
                .disks
                .iter()
                .map(|d| DiskInfo { name: d.name.clone(), size: size(d) })
                .collect(),
            maps,
        }
    }

    /// A failure that no guest is told of, or not only.
    pub(crate) fn report(&self, disk: usize, error: &BlockError) {
        let name = self.disks.get(disk).map_or("", |d| d.name.as_str());
        let entry = self.errors.add(name, error);
        tracing::warn!(disk = name, %error, count = entry.count, "replication error");
        self.events.emit("BREP_ERROR", json!(entry));
    }

    /// The peer is lost: from here on this side writes alone, on a new line that is recorded
    /// before anything more is acknowledged.
    pub(crate) fn lose_peer(&self, reason: &str) {
        let reason = {
            let mut core = self.core();
            if !core.epochs.is_attached() {
                return;
            }
            core.connections.iter().for_each(|c| c.kill());
            core.dropped.take().unwrap_or_else(|| reason.to_owned())
        };
        // At the end of the process the guest is gone already.
        if !self.quiesced.is_cancelled() {
            self.go_alone();
        }
        let held = {
            let mut core = self.core();
            core.connections.clear();
            core.copying = false;
            core.link = LinkState::Disconnected;
            core.reason = Some(reason.clone());
            // What was on its way marks itself as different when its owner learns of the loss.
            core.maps.iter_mut().for_each(MapSet::void_pending);
            core.epochs.detach()
        };
        // Dropped outside the lock: each held write wakes its owner, who marks its range.
        drop(held);
        self.ended.notify_waiters();
        tracing::warn!(reason, "the secondary is lost; going on alone");
        self.events.emit("BREP_PEER_LOST", json!({ "reason": reason }));
        if self.stage() == Stage::Running {
            self.errors.latch(&reason);
            self.colo.broken(&self.events);
        }
    }

    /// Cuts the peer off, from any thread and without waiting; the data thread then loses it.
    pub(crate) fn drop_peer(&self, reason: &str) {
        let mut core = self.core();
        if core.epochs.is_attached() {
            core.dropped = Some(reason.to_owned());
            core.connections.iter().for_each(|c| c.kill());
        }
    }

    /// A session begins. What differs from the peer now is in the maps before the first write.
    pub(crate) fn attach(&self, terms: Terms<'_>) -> Result<()> {
        let Terms { epoch, session, copy, wish, trusted, connections, peer } = terms;
        {
            let mut core = self.core();
            if !core.epochs.is_settled() {
                return Err(Error::failed("writes to the lost secondary have not ended yet"));
            }
            if core.wish != wish {
                return Err(Error::failed("the session was agreed on before the last command"));
            }
            for (maps, disk) in core.maps.iter_mut().zip(&self.disks) {
                let size = disk.image.device().size();
                if trusted {
                    trust(maps, size);
                }
                begin_copy(maps, copy, size);
            }
            core.progress = Some(CopyProgress::begin(core.all_bytes_behind(), Instant::now()));
        }
        self.record.update(|record| {
            record.epoch = epoch;
            record.session = session;
            record.primary.had_peer = true;
            record.primary.alone = false;
        })?;
        let mut core = self.core();
        core.connections = connections;
        core.copying = true;
        core.dropped = None;
        core.checkpoints_for_peer.clear();
        core.wish = Wish::default();
        core.again = None;
        core.link = LinkState::Connected;
        core.refusal = None;
        core.reason = None;
        core.peer = Some(peer.to_owned());
        core.epochs.attach(epoch);
        drop(core);
        // What was measured of the guest was with another load.
        self.set_resync_limits(self.resync_limits());
        self.colo.enter(ColoMode::Primary);
        Ok(())
    }

    /// Everything differs, as far as a copy in this session is concerned, until it has been
    /// compared or sent again.
    pub(crate) fn copy_again(&self) {
        {
            let mut core = self.core();
            for (maps, disk) in core.maps.iter_mut().zip(&self.disks) {
                maps.set(MapRole::Differs, 0, disk.image.device().size());
            }
            core.copying = true;
            core.progress = Some(CopyProgress::begin(core.all_bytes_behind(), Instant::now()));
        }
        self.set_resync_limits(self.resync_limits());
    }

    /// Ends the current epoch. None: there is no session, or a cut is outstanding.
    ///
    /// # Errors
    /// The record could not be saved.
    pub(crate) fn start_cut(&self) -> Result<Option<Epoch>> {
        let epoch = {
            let mut core = self.core();
            core.dirty = false;
            core.epochs.start_cut()
        };
        let Some(epoch) = epoch else { return Ok(None) };
        // The secondary may commit this epoch and this side never hear of it: it must not take
        // itself for an older copy then. After a commit this is recorded already, after a void
        // cut it is not.
        self.record.update(|record| record.epoch = record.epoch.max(epoch.next()))?;
        let cur = self.record.get().cur;
        let since = cur.map_or(Since::Unknown, |cur| Since::Commit(Commit { cur, epoch }));
        for maps in &mut self.core().maps {
            maps.rotate(since.tag()).map_err(|e| Error::failed(e.to_string()))?;
        }
        Ok(Some(epoch))
    }

    pub(crate) fn drained(&self) -> Drained {
        self.core().epochs.drained()
    }

    /// The cut is made: the writes that were held go out, in their order, before any other.
    pub(crate) fn release(&self) {
        let mut core = self.core();
        let held = core.epochs.release();
        core.send_held(held);
    }

    /// The cut is not made, or not committed; its epoch runs on.
    pub(crate) fn void_cut(&self) {
        let mut core = self.core();
        core.dirty = true;
        core.maps.iter_mut().for_each(MapSet::void_pending);
        let held = core.epochs.void_cut();
        core.send_held(held);
    }

    /// The secondary has committed `epoch`.
    pub(crate) fn committed(&self, epoch: Epoch) -> Result<()> {
        let next = {
            let mut core = self.core();
            if !core.epochs.is_of_session(epoch) {
                // This side has begun a new line meanwhile; the checkpoint is not of it.
                return Err(Error::failed("the secondary was lost during a commit"));
            }
            core.epochs.committed();
            core.last_commit = Some(Instant::now());
            core.epochs.current().next()
        };
        self.record.update(|record| {
            // The next cut's epoch too: the secondary may have committed it when this side is
            // started again.
            record.epoch = record.epoch.max(next);
            if let Some(cur) = record.cur {
                record.com = Some(Commit { cur, epoch });
            }
        })?;
        // Only now: a start after a kill in between finds more than it needs.
        self.core().maps.iter_mut().for_each(MapSet::drop_pending);
        self.errors.clear_latch();
        self.counters.checkpoints.fetch_add(1, Ordering::Relaxed);
        self.events.emit("BREP_CHECKPOINT", json!({ "epoch": epoch }));
        Ok(())
    }

    /// The guest may be served, alone if there is no session.
    pub(crate) fn allow_guest(&self, alone: bool) {
        if self.guest_allowed.is_cancelled() {
            return;
        }
        if alone {
            self.go_alone();
        }
        self.guest_allowed.cancel();
    }

    /// Whether a request has waited for the peer as long as is allowed.
    pub(crate) fn oldest_request(&self) -> Due {
        self.core().ages.due(Instant::now(), self.config.peer_timeout)
    }

    /// Whether a cut waits for nothing but the local disk.
    pub(crate) fn cut_waits_for_local(&self) -> bool {
        self.core().epochs.waits_for_local()
    }

    /// Waits for the local writes that have kept a cut from being made.
    pub(crate) async fn late_writes(&self) {
        loop {
            let ended = self.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            if !self.core().epochs.has_late_writes() {
                return;
            }
            ended.await;
        }
    }

    /// Waits until nothing that is on its way to the peer now is on its way any more.
    pub(crate) async fn idle(&self) {
        let arrived = self.core().ages.arrived();
        loop {
            let ended = self.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            if self.core().ages.have_left(arrived) {
                return;
            }
            ended.await;
        }
    }

    /// Waits until what was on its way to a lost peer is known to differ.
    ///
    /// # Errors
    /// It has not ended within the peer timeout.
    pub(crate) async fn settled(&self) -> Result<()> {
        let settled = async {
            loop {
                let ended = self.ended.notified();
                let mut ended = std::pin::pin!(ended);
                ended.as_mut().enable();
                if self.core().epochs.is_settled() {
                    return;
                }
                ended.await;
            }
        };
        tokio::time::timeout(self.config.peer_timeout, settled)
            .await
            .map_err(|_| Error::failed("writes to the lost secondary do not end"))
    }

    /// Everything that failed in this epoch has been sent again.
    pub(crate) fn repaired(&self) {
        self.core().epochs.repaired();
    }

    /// The peer has given a sign of life.
    pub(crate) fn heard(&self) {
        self.core().last_contact = Some(Instant::now());
    }

    pub(crate) fn stage(&self) -> Stage {
        *self.stage.borrow()
    }

    /// Resolves when replication is to run, or is not to run any more.
    pub(crate) async fn until_stage(&self, running: bool) {
        let mut stage = self.stage.subscribe();
        // The sender lives as long as this.
        let _ = stage.wait_for(|s| (*s == Stage::Running) == running).await;
    }

    /// Begins to replicate: the peer is connected to, now and whenever it is lost.
    ///
    /// # Errors
    /// It runs already, or there is no peer.
    pub(crate) fn start_replication(&self) -> Result<()> {
        if self.config.peer.is_none() {
            return Err(Error::refused("no --peer was given: there is nothing to replicate to"));
        }
        if self.stage.send_replace(Stage::Running) == Stage::Running {
            return Err(Error::refused("Block replication is running or done"));
        }
        self.errors.clear_latch();
        Ok(())
    }

    /// Ends replication; the guest goes on alone. Returns when the peer gets nothing more.
    ///
    /// # Errors
    /// It does not run.
    pub(crate) async fn stop_replication(&self) -> Result<()> {
        if self.stage() != Stage::Running {
            return Err(Error::refused("Block replication is not running"));
        }
        self.stage.send_replace(Stage::Done);
        loop {
            let ended = self.ended.notified();
            let mut ended = std::pin::pin!(ended);
            ended.as_mut().enable();
            if !self.is_attached() {
                return Ok(());
            }
            ended.await;
        }
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.core().epochs.is_attached()
    }

    /// Records that this side writes alone, on a new line if it was not alone before.
    fn go_alone(&self) {
        let before = self.record.get();
        let last = self.core().epochs.current().max(before.epoch);
        let new_line = before.primary.had_peer && !before.primary.alone;
        let saved = self.record.update(|record| {
            record.primary.alone = record.primary.had_peer;
            record.epoch = record.epoch.max(last);
            if new_line {
                record.begin_line(Generation::random(), last);
            }
        });
        // A power loss must not make this side forget that both may have written.
        let saved = saved.and_then(|()| if new_line { self.record.sync() } else { Ok(()) });
        if let Err(error) = saved {
            tracing::error!(%error, "cannot record that this side goes on alone");
            self.core().fatal = Some(format!("no write can be acknowledged: {error}"));
        }
    }

    pub(crate) fn update_record(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        self.record.update(change)
    }
}

impl Core {
    pub(crate) fn epoch(&self) -> Epoch {
        self.epochs.current()
    }

    pub(crate) fn is_refused(&self, kind: RefusalKind) -> bool {
        self.refusal.as_ref().is_some_and(|refusal| refusal.kind == kind)
    }

    pub(crate) fn fatal(&self) -> Option<&str> {
        self.fatal.as_deref()
    }
}
