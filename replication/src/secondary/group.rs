use std::ops::Deref;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use brep_nbd::tls::TlsPeer;
use futures_util::future::join_all;
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::disk::ReplicaDisk;
use super::durable::after_power_loss;
use super::opening::{check_known_disks, joining, open_disk};
use super::plain::{Claim, Plain};
use super::rejoin::{OwnMaps, Refused};
use super::session::Session;
use super::test_view::Test;
use crate::commands::{ColoMode, Service};
use crate::config::Durability;
use crate::guest::Guest;
use crate::link::{self, StopReason};
use crate::node::Stage;
use crate::primary::Primary;
use crate::side::Side;
use crate::state::{DiskRecord, Record};
use crate::status::LinkState;
use crate::table::{DiskTable, Disks};
use crate::{Commit, Epoch, Error, Result};

/// The disks of a secondary, and everything that concerns all of them: record, session, commits.
pub(crate) struct Group {
    pub(super) side: Arc<Side>,
    /// What is known of a plain primary; none if primaries are brep's.
    pub(super) plain: Option<Plain>,
    pub(super) replicas: DiskTable<ReplicaDisk>,
    core: Mutex<Core>,
    /// Held while a hello is decided, a failover runs, or replication is stopped.
    pub(crate) transition: tokio::sync::Mutex<()>,
    /// Whoever holds the guest has this: one opens the door only for himself.
    pub(super) guest_hold: Arc<tokio::sync::Mutex<()>>,
    pub(crate) guest: Arc<Guest>,
    pub(crate) counters: Counters,
    /// The NBD server at the address where the primary connects.
    service: OnceLock<Weak<Service>>,
    /// What this side is since it was promoted.
    primary: Mutex<Option<Primary>>,
    /// The test view is to be looked at.
    pub(super) test_changed: Notify,
}

impl Deref for Group {
    type Target = Side;

    fn deref(&self) -> &Side {
        &self.side
    }
}

pub(crate) struct Core {
    pub(crate) session: Option<Arc<Session>>,
    /// A session that has ended, until nothing that it started goes on.
    closing: Option<Arc<Session>>,
    pub(crate) link: LinkState,
    pub(crate) reason: Option<String>,
    /// The last primary that came did not begin a session.
    pub(crate) refused: Option<Refused>,
    pub(super) own_maps: OwnMaps,
    /// The side that this one has made room for has said that it has taken over.
    pub(super) other_is_primary: bool,
    pub(crate) peer: Option<String>,
    /// The last link's TLS.
    pub(crate) link_tls: Option<Arc<TlsPeer>>,
    /// What the primary keeps its promises against, as it has said last.
    pub(crate) peer_durability: Option<Durability>,
    pub(crate) last_contact: Option<Instant>,
    pub(crate) last_commit: Option<Instant>,
    pub(crate) receiving: Epoch,
    /// Primaries are let in: not before a start, and not after a stop.
    started: bool,
    /// Replication was stopped by command.
    stopped: bool,
    /// The primary copies; the next commit ends that.
    pub(crate) copying: bool,
    /// Why the last link ended, as it was logged; none since a session has begun.
    pub(crate) link_error: Option<String>,
    /// There was no room for what a write would have overwritten, or for the write itself.
    pub(super) full: Option<String>,
    /// No room is kept for a failover.
    pub(super) unreserved: bool,
    /// This side was promoted, and its files alone are the disks.
    pub(super) merge_has_ended: bool,
    /// While a failover is held: what the file system has left, as it was asked last.
    pub(super) space_bytes: Option<u64>,
    /// When buffers were opened again last.
    pub(super) reopened: Option<Instant>,
    pub(super) test: Option<Test>,
}

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) writes: AtomicU64,
    pub(crate) write_bytes: AtomicU64,
    pub(crate) checkpoints: AtomicU64,
    pub(crate) last_pause_us: AtomicU64,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("secondary::Group").field("name", &self.config.name).finish_non_exhaustive()
    }
}

impl Core {
    pub(crate) fn session_is_sync(&self) -> Option<bool> {
        self.session.as_ref().map(|s| s.sync)
    }

    /// Lets primaries in. False: they are let in already.
    pub(crate) fn set_started(&mut self) -> bool {
        !std::mem::replace(&mut self.started, true)
    }

    /// No primary is let in any more.
    pub(crate) fn set_stopped(&mut self) {
        (self.started, self.stopped) = (false, true);
    }

    pub(crate) fn is_started(&self) -> bool {
        self.started
    }

    /// Whether a session is the present one.
    pub(crate) fn is_current(&self, session: &Session) -> bool {
        self.session.as_ref().is_some_and(|s| std::ptr::eq(Arc::as_ptr(s), session))
    }

    /// From now on there is no session; what the old one started may still go on.
    pub(crate) fn retire_session(&mut self) {
        if let Some(session) = self.session.take() {
            self.closing = Some(session);
            self.link = LinkState::Disconnected;
        }
    }
}

impl Group {
    /// Opens disks and buffers. Changes nothing.
    pub(crate) async fn open(side: &Arc<Side>) -> Result<Arc<Self>> {
        let (config, store) = (&side.config, &side.record);
        let record = store.get();
        let secondary = &record.secondary;
        let boot = side.boot_id();
        let lost = record.lost_power(boot.as_deref());
        let configs = side.disk_configs();
        check_known_disks(&record, &configs)?;
        let mut disks = Vec::new();
        for disk in &configs {
            let known = secondary.disks.iter().find(|d| d.name == disk.name);
            let known = known.cloned().or_else(|| joining(disk, &record));
            disks.push(Arc::new(open_disk(config, disk, known.as_ref(), &record, lost).await?));
        }
        store.update(|record| {
            record.begin_run(boot, config.durability);
            let joining = disks.iter().filter(|disk| disk.joining().is_some());
            for disk in joining.map(|disk| disk.record()) {
                record.secondary.disks.retain(|known| known.name != disk.name);
                record.secondary.disks.push(disk);
            }
        })?;
        let now = store.get();
        if !now.is_primary() && now.has_checkpoint() {
            // Else what they hold is no disk yet.
            for disk in &disks {
                disk.show_guest().await?;
            }
        }
        let sizes: Vec<_> = disks.iter().map(|d: &Arc<ReplicaDisk>| (&*d.name, d.size())).collect();
        let own_maps = OwnMaps::open(&store.get(), &config.state_dir, &sizes)?;
        // Else a power loss could bring the clean stop before this run back.
        side.secure_start().await?;
        let inconsistent = store.get().secondary.inconsistent;
        let reason = lost.then(|| after_power_loss(&record, inconsistent)).flatten();
        let core = Core {
            receiving: store.get().epoch,
            started: config.start,
            stopped: false,
            copying: false,
            link_error: None,
            full: None,
            unreserved: false,
            merge_has_ended: false,
            space_bytes: None,
            reopened: None,
            test: None,
            session: None,
            closing: None,
            link: LinkState::Disconnected,
            reason,
            refused: None,
            own_maps,
            other_is_primary: false,
            peer: None,
            link_tls: None,
            peer_durability: None,
            last_contact: None,
            last_commit: None,
        };
        if !record.is_primary() && record.has_checkpoint() {
            // Its manager may want the failover that this process was ended before.
            side.colo.enter(ColoMode::Secondary);
        }
        let doors = disks.iter().map(|disk| Arc::clone(disk.gate().door())).collect();
        Ok(Arc::new(Group {
            guest: Arc::new(Guest::new(doors)),
            plain: config.plain_primary.then(Plain::default),
            side: Arc::clone(side),
            replicas: DiskTable::new(disks),
            core: Mutex::new(core),
            transition: tokio::sync::Mutex::new(()),
            guest_hold: Arc::default(),
            counters: Counters::default(),
            service: OnceLock::new(),
            primary: Mutex::default(),
            test_changed: Notify::new(),
        }))
    }

    /// The NBD server where the primary connects.
    pub(super) fn serve_with(&self, service: &Arc<Service>) {
        let _ = self.service.set(Arc::downgrade(service));
    }

    pub(super) fn service(&self) -> Result<Arc<Service>> {
        self.service.get().and_then(Weak::upgrade).ok_or_else(|| Error::failed("nothing is served"))
    }

    /// What this side is since it was promoted.
    pub(super) fn primary(&self) -> MutexGuard<'_, Option<Primary>> {
        self.primary.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn disks(&self) -> Disks<ReplicaDisk> {
        self.replicas.get()
    }

    pub(crate) fn has_guest(&self) -> bool {
        self.side.has_second_guest()
    }

    pub(crate) fn record(&self) -> Arc<Record> {
        self.side.record.get()
    }

    pub(crate) fn update_record(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        self.side.record.update(change)
    }

    /// How far replication has come.
    pub(crate) fn stage(&self) -> Stage {
        let core = self.core();
        match &self.record.get().secondary.promotion {
            Some(promotion) if promotion.merged => return Stage::Done,
            Some(_) => return Stage::Failover,
            None => {}
        }
        let running = match self.plain.as_ref().map(Plain::claim) {
            Some(Claim::None) => false,
            Some(Claim::Holds | Claim::Broken(_)) => true,
            None => core.started,
        };
        match (running, core.stopped) {
            (true, _) => Stage::Running,
            (false, true) => Stage::Done,
            (false, false) => Stage::None,
        }
    }

    pub(crate) fn is_promoted(&self) -> bool {
        self.record().is_primary()
    }

    /// Promoted, and guests have no address of their own.
    pub(crate) fn serves_guests_here(&self) -> bool {
        self.config.guest_listen.is_none() && self.is_promoted()
    }

    pub(crate) fn session(&self) -> Option<Arc<Session>> {
        self.core().session.clone()
    }

    /// What hello tells of this side.
    pub(crate) fn introduce(&self) -> link::Side {
        self.side.introduce(self.describe_disks(), self.own_writes())
    }

    /// Ends the present session, if any: afterwards nothing that it, or one before it, started
    /// goes on.
    ///
    /// # Errors
    /// Something still goes on; no new session and no promotion may begin.
    pub(crate) async fn end_session(&self, reason: StopReason) -> Result<()> {
        self.core().retire_session();
        self.end_retired(reason).await
    }

    /// Waits for the end of what a retired session has started.
    pub(crate) async fn end_retired(&self, reason: StopReason) -> Result<()> {
        let Some(session) = self.core().closing.clone() else { return Ok(()) };
        session.close(reason).await?;
        session.committed().await?;
        let settled = join_all(session.disks.taking_part.iter().map(|disk| disk.settle())).await;
        settled.into_iter().fold(Ok(()), Result::and)?;
        let mut core = self.core();
        if core.closing.as_ref().is_some_and(|s| Arc::ptr_eq(s, &session)) {
            core.closing = None;
        }
        Ok(())
    }

    /// Begins a session on the primary's terms: buffers, record, and then its token counts.
    pub(crate) async fn begin_session(
        self: &Arc<Self>,
        terms: &Terms,
        session: &Arc<Session>,
    ) -> Result<()> {
        self.end_session(StopReason::Replaced).await?;
        self.reopen_buffers().await?;
        if terms.discard_checkpoint {
            self.discard_checkpoint().await?;
        }
        let keep_checkpoint = self.record().has_checkpoint();
        // Whose buffers they are is known before one is taken: a file that somebody else has named
        // is taken for ours again after a kill only by its set.
        let follow = |record: &mut Record| {
            record.follow_line(terms.cur, terms.history.clone());
            record.epoch = record.epoch.max(terms.epoch);
        };
        self.update_record(|record| {
            record.set = Some(terms.set);
            // An old primary can be one again as long as nothing can be written to its disks.
            if !record.secondary.outdated {
                follow(record);
            }
        })?;
        self.secure_record().await?;
        for disk in &*session.disks.taking_part {
            // What is not part of a checkpoint has none to keep.
            let keep = keep_checkpoint && disk.joining().is_none();
            disk.begin_session(terms.set, self.has_guest(), keep).await?;
        }
        self.update_record(|record| {
            follow(record);
            self.record_disks(record, |disk| disk.record());
            record.session = Some(session.token);
            let secondary = &mut record.secondary;
            // From here on an old primary's disks are not its own line any more.
            secondary.inconsistent = !keep_checkpoint;
            secondary.made_room = false;
            // Until a commit says otherwise: a copy begins, or writes that may be missing.
            secondary.latest_ok = false;
            // What was lost with the power is copied now, or is part of what a later session
            // will still have to copy.
            secondary.power_lost = false;
        })?;
        self.secure_record().await?;
        if keep_checkpoint {
            for disk in self.disks() {
                disk.show_guest().await?;
            }
        }
        let mut core = self.core();
        core.refused = None;
        core.other_is_primary = false;
        core.receiving = terms.epoch;
        // Every session begins with a copy, and no cut is made before it has ended.
        core.copying = true;
        core.session = Some(Arc::clone(session));
        self.colo.enter(ColoMode::Secondary);
        Ok(())
    }

    /// Puts what `describe` says of each disk into the record.
    pub(crate) fn record_disks(
        &self,
        record: &mut Record,
        mut describe: impl FnMut(&ReplicaDisk) -> DiskRecord,
    ) {
        let all = self.disks();
        let disks = all.iter().map(|d| describe(d)).collect();
        let seq = all.iter().map(|d| d.pool.seq()).max().unwrap_or(0);
        let secondary = &mut record.secondary;
        secondary.disks = disks;
        secondary.buffer_seq = secondary.buffer_seq.max(seq);
    }

    pub(super) fn check_current(&self, session: &Session) -> Result<()> {
        match self.core().is_current(session) {
            true => Ok(()),
            false => Err(Error::failed("the session has ended")),
        }
    }

    pub(crate) fn count_replica_write(&self, len: u64) {
        self.counters.writes.fetch_add(1, Ordering::Relaxed);
        self.counters.write_bytes.fetch_add(len, Ordering::Relaxed);
    }

    /// Something has failed that no guest is told of.
    pub(crate) fn note_error(&self, disk: &str, error: &brep_block::Error) {
        let entry = self.errors.add(disk, error);
        tracing::warn!(disk, %error, count = entry.count, "replication error");
        self.events.emit("BREP_ERROR", json!(entry));
    }

    /// Writes everything out. Buffers keep what they hold.
    pub(crate) async fn close(&self) -> Result<()> {
        let primary = self.primary().take();
        let primary = match primary {
            Some(primary) => Some(primary.end().await),
            None => None,
        };
        self.end_with_test().await;
        let mut result = Ok(());
        for disk in self.disks() {
            result = result.and(disk.close().await);
        }
        let own_maps = std::mem::take(&mut self.core().own_maps);
        result = result.and(own_maps.close());
        match primary {
            Some(primary) => primary.close(result).await?,
            None => {
                result?;
                self.update_record(|r| r.clean = true)?;
            }
        }
        self.sync_record().await
    }
}

/// The terms on which a primary begins a session.
#[derive(Debug)]
pub(crate) struct Terms {
    pub(crate) set: crate::SetId,
    pub(crate) cur: crate::Generation,
    pub(crate) epoch: Epoch,
    /// The last checkpoint is given up, and with it the pre-images.
    pub(crate) discard_checkpoint: bool,
    /// The lines that led the primary there.
    pub(crate) history: Vec<Commit>,
}
