mod attach;
mod cut;
mod disks;
mod durable;
mod held;
mod hot;
mod joining;
mod maps;
mod requests;
mod resize;
mod resync;
mod role;
mod stage;
mod switchover;
mod takeover;
mod window;

use std::collections::BTreeMap;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use brep_block::{BlockDevice, Error as BlockError, FlushLevel, RangeLock};
use brep_hbitmap::MapSet;
use brep_nbd::client::Connection;
use serde_json::json;
use tokio::sync::{Notify, Semaphore, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

pub(crate) use self::attach::Terms;
use self::disks::{check_known_disks, maps_of_new};
use self::durable::PeerWrites;
use self::hot::{HotExtents, HotTasks, begin_logs};
use self::joining::Joining;
pub(crate) use self::maps::{MapsOf, Since, distrust};
pub(crate) use self::role::check_role;
pub(crate) use self::stage::no_peer;
use self::switchover::SteppingDown;
use self::takeover::Takeover;
use self::window::HeldWrite;
use super::ages::{Ages, Due};
use super::epochs::Epochs;
use super::hello::{Refusal, Wish};
use super::pace::Pace;
use super::progress::CopyProgress;
use super::session::CheckpointRequest;
use crate::config::{Ack, DiskConfig, DiskFormat, Durability};
use crate::door::Door;
use crate::guest::Guest;
use crate::image::Image;
use crate::link::{DiskInfo, RefusalKind};
use crate::node::Stage;
use crate::side::Side;
use crate::state::Record;
use crate::status::LinkState;
use crate::table::DiskTable;
use crate::{Epoch, Error, Result, secondary};

/// The disks of a primary, and everything that concerns all of them: epochs, window, record.
pub(crate) struct Group {
    side: Arc<Side>,
    disks: DiskTable<DiskPart>,
    /// What is left of the secondary that was promoted in this process.
    pub(super) promoted: Option<Arc<secondary::Group>>,
    /// The number of the next disk that comes.
    next_disk: AtomicUsize,
    core: Mutex<Core>,
    hot_tasks: HotTasks,
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
    pub(crate) guest: Arc<Guest>,
    pub(crate) counters: Counters,
    /// The guest's writes are held, because the peer is lost.
    held: watch::Sender<bool>,
    held_writes: AtomicU64,
    pace: Mutex<Pace>,
    pace_changed: Notify,
    /// The guest's writes are timed.
    measuring: AtomicBool,
    /// What the secondary has said of taking over.
    takeover: watch::Sender<Takeover>,
    /// What the session is asked for.
    requests: OnceLock<mpsc::Sender<CheckpointRequest>>,
    /// Held while a disk is made larger, comes or goes.
    changing_disks: tokio::sync::Mutex<()>,
}

impl Deref for Group {
    type Target = Side;

    fn deref(&self) -> &Side {
        &self.side
    }
}

/// Why the peer is lost.
#[derive(Debug, Clone)]
pub(crate) struct Loss {
    pub(crate) reason: String,
    /// An operator wants the guest to go on without it.
    by_command: bool,
    /// It is slow, and this side goes on without it.
    pub(crate) left_behind: bool,
}

impl Loss {
    pub(crate) fn by_command(reason: &str) -> Self {
        Loss { reason: reason.to_owned(), by_command: true, left_behind: false }
    }

    pub(crate) fn left_behind(reason: String) -> Self {
        Loss { reason, by_command: false, left_behind: true }
    }
}

impl From<String> for Loss {
    fn from(reason: String) -> Self {
        Loss { reason, by_command: false, left_behind: false }
    }
}

/// What the group has of each disk.
#[derive(Debug)]
pub(crate) struct DiskPart {
    /// Tells it from every other disk that the group has or had.
    pub(crate) number: usize,
    pub(crate) name: String,
    pub(crate) file: String,
    pub(crate) format: DiskFormat,
    /// What it is, if it is an image and nothing else.
    image: Option<Image>,
    /// What the guest's requests are carried out on, here.
    pub(crate) device: Arc<dyn BlockDevice>,
    /// In bytes: what guests and maps know of. The device is never smaller.
    size: AtomicU64,
    /// Serialises what overlaps, over the local leg of a write.
    pub(crate) locks: RangeLock,
    peer_writes: PeerWrites,
}

impl DiskPart {
    /// In bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// Ends its use, after the last request: flushed, if it is an image.
    async fn close(&self) -> Result<()> {
        match &self.image {
            Some(image) => image.close().await,
            None => Ok(()),
        }
    }

    fn of_image(number: usize, config: &DiskConfig, image: Image) -> Arc<Self> {
        let device = Arc::clone(image.device());
        Arc::new(DiskPart { image: Some(image), ..Self::new(number, config, device) })
    }

    fn new(number: usize, config: &DiskConfig, device: Arc<dyn BlockDevice>) -> Self {
        DiskPart {
            number,
            format: config.format,
            image: None,
            name: config.name.clone(),
            file: config.path.display().to_string(),
            size: AtomicU64::new(device.size()),
            device,
            locks: RangeLock::new(),
            peer_writes: PeerWrites::default(),
        }
    }
}

pub(crate) struct Core {
    epochs: Epochs<HeldWrite>,
    /// One a disk, by its number, while a session is attached.
    connections: BTreeMap<usize, Arc<Connection>>,
    /// One a disk, by its number: what is known of the differences to the peer.
    maps: BTreeMap<usize, MapSet>,
    joining: Joining,
    /// The disk whose maps are being made larger beside the others, and its bytes that differ.
    growing: Option<(usize, u64)>,
    /// One a disk, by its number, if a loss of power is to be survived.
    hot: BTreeMap<usize, HotExtents>,
    /// What the peer has said last of its disks.
    pub(crate) peer_disks: Option<Vec<DiskInfo>>,
    ages: Ages,
    /// The secondary is to take over, and this side's record says that it is none any more.
    stepping_down: Option<SteppingDown>,
    /// The present line was begun by this process.
    has_own_line: bool,
    /// Nothing more may be acknowledged: the record, or what the maps need, could not be saved.
    fatal: Option<String>,
    /// What a guest makes durable is durable on the peer too, before the guest is told.
    flushes_reach_peer: bool,
    pub(crate) wish: Wish,
    /// Everything is to be copied again in this session; with hashes first, or not.
    pub(crate) again: Option<bool>,
    pub(crate) link: LinkState,
    pub(crate) refusal: Option<Refusal>,
    pub(crate) reason: Option<String>,
    /// Why the peer is about to be lost, if this side has cut it off.
    pub(crate) dropped: Option<Loss>,
    pub(crate) peer: Option<String>,
    /// As the peer has said last.
    pub(crate) peer_durability: Option<Durability>,
    /// A copy runs of disks that are part of checkpoints; no cuts until it has ended.
    pub(crate) copying: bool,
    /// It compares hashes first, as does what becomes of it in a later session.
    comparing: bool,
    /// A copy has ended, and the checkpoint that it ends with is not committed yet.
    pub(crate) settling: bool,
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
    pub(crate) compared_bytes: AtomicU64,
    pub(crate) differing_bytes: AtomicU64,
}

impl std::fmt::Debug for Group {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("primary::Group").field("name", &self.config.name).finish_non_exhaustive()
    }
}

impl Group {
    /// Opens the disks and their maps.
    pub(crate) async fn open(side: &Arc<Side>) -> Result<Arc<Self>> {
        let configs = side.disk_configs();
        let known = side.record.get().primary.disks.clone();
        check_known_disks(&known, &configs)?;
        let mut disks = Vec::new();
        for (number, disk) in configs.iter().enumerate() {
            disks.push(DiskPart::of_image(number, disk, Image::open(disk).await?));
        }
        let is_new = |d: &&Arc<DiskPart>| {
            !known.is_empty() && !known.iter().any(|(name, _)| *name == d.name)
        };
        for disk in disks.iter().filter(is_new) {
            tracing::info!(disk = disk.name, "the disk is new to the group");
            // Before the record knows it: its maps are not missed then.
            maps_of_new(side, disk)?;
        }
        side.record.update(|record| {
            record.begin_run(side.boot_id(), side.config.durability);
            record.primary.disks = disks.iter().map(|d| (d.name.clone(), d.size())).collect();
        })?;
        let open = |d: &Arc<DiskPart>| MapsOf::new(side, &d.name, d.size()).open();
        let maps = disks.iter().map(open).collect::<Result<Vec<_>>>()?;
        if side.config.durability == Durability::Power {
            // What a killed run without that promise has committed may be in the page cache only,
            // and its maps have forgotten it.
            for disk in &disks {
                disk.device.flush(FlushLevel::Durable).await?;
            }
        }
        // Else a power loss could bring the clean stop before this run back.
        side.secure_start().await?;
        let door = Door::new(&side.config.name);
        let guest = Arc::new(Guest::new(vec![Arc::clone(&door)]));
        Self::new(side, disks, maps, door, guest, None)
    }

    /// The primary that a promoted secondary is. Its guest stays with the doors that it passes.
    pub(crate) fn of_promoted(
        side: &Arc<Side>,
        secondary: &Arc<secondary::Group>,
        devices: Vec<Arc<dyn BlockDevice>>,
        maps: Vec<MapSet>,
    ) -> Result<Arc<Self>> {
        let parts = secondary.disks().into_iter().zip(devices).enumerate();
        let part = |(number, (disk, device)): (usize, (Arc<secondary::ReplicaDisk>, _))| {
            Arc::new(DiskPart::new(number, &disk.config, device))
        };
        let disks = parts.map(part).collect();
        let guest = Arc::clone(&secondary.guest);
        let door = Door::new(&side.config.name);
        Self::new(side, disks, maps, door, guest, Some(Arc::clone(secondary)))
    }

    fn new(
        side: &Arc<Side>,
        disks: Vec<Arc<DiskPart>>,
        mut maps: Vec<MapSet>,
        door: Arc<Door>,
        guest: Arc<Guest>,
        promoted: Option<Arc<secondary::Group>>,
    ) -> Result<Arc<Self>> {
        let config = &side.config;
        let hot = begin_logs(side, disks.iter().zip(&mut maps))?;
        let peer = side.peer();
        let window_bytes = u32::try_from(config.window_bytes).unwrap_or(u32::MAX >> 4);
        let core = Core {
            epochs: Epochs::new(side.record.get().epoch),
            connections: BTreeMap::new(),
            maps: maps.into_iter().enumerate().collect(),
            joining: Joining::default(),
            growing: None,
            hot,
            peer_disks: None,
            ages: Ages::default(),
            stepping_down: None,
            has_own_line: false,
            fatal: None,
            flushes_reach_peer: config.durability == Durability::Power && config.ack == Ack::Sync,
            again: None,
            wish: Wish { seeded: config.seeded, ..Wish::default() },
            link: if peer.is_some() { LinkState::Disconnected } else { LinkState::None },
            refusal: None,
            reason: None,
            dropped: None,
            peer: peer.as_ref().map(ToString::to_string),
            peer_durability: None,
            copying: false,
            comparing: false,
            settling: false,
            progress: None,
            checkpoints_for_peer: Vec::new(),
            last_contact: None,
            last_commit: None,
            dirty: false,
        };
        let stage = match config.start && peer.is_some() {
            true => Stage::Running,
            false => Stage::None,
        };
        let pace = Pace::new(config.resync_limits);
        let group = Arc::new(Group {
            guest,
            door,
            window_bytes: Arc::new(Semaphore::new(window_bytes as usize)),
            window_requests: Arc::new(Semaphore::new(config.window_requests)),
            side: Arc::clone(side),
            next_disk: AtomicUsize::new(disks.len()),
            disks: DiskTable::new(disks),
            promoted,
            core: Mutex::new(core),
            hot_tasks: HotTasks::default(),
            ended: Notify::new(),
            stage: watch::Sender::new(stage),
            wake: Notify::new(),
            quiesced: CancellationToken::new(),
            guest_allowed: CancellationToken::new(),
            counters: Counters::default(),
            held: watch::Sender::new(false),
            held_writes: AtomicU64::new(0),
            pace: Mutex::new(pace),
            pace_changed: Notify::new(),
            measuring: AtomicBool::new(false),
            takeover: watch::Sender::new(Takeover::None),
            requests: OnceLock::new(),
            changing_disks: tokio::sync::Mutex::default(),
        });
        group.start_hot_tasks();
        Ok(group)
    }

    /// Ends the use of the disks, after the last request: flushed, if they are images. `flushed`:
    /// what is below them has been written out without an error.
    ///
    /// # Errors
    /// Something could not be written; then the record does not say that this was a clean end.
    pub(crate) async fn close(&self, flushed: Result<()>) -> Result<()> {
        let mut result = flushed;
        for disk in self.disks() {
            result = result.and(disk.close().await);
        }
        if result.is_err() {
            self.disks().iter().for_each(|disk| self.distrust_maps(disk.number));
        }
        result = result.and(self.close_maps());
        if result.is_ok() {
            self.update_record(|record| record.clean = true)?;
            self.secure_record().await?;
        }
        result
    }

    pub(crate) fn core(&self) -> MutexGuard<'_, Core> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn record(&self) -> Arc<Record> {
        self.side.record.get()
    }

    /// A failure that no guest is told of, or not only.
    pub(crate) fn report(&self, disk: usize, error: &BlockError) {
        let name = self.disk_name(disk);
        let entry = self.errors.add(&name, error);
        tracing::warn!(disk = name, %error, count = entry.count, "replication error");
        self.events.emit("BREP_ERROR", json!(entry));
    }

    /// The guest may be served, alone if there is no session.
    pub(crate) fn allow_guest(&self, alone: bool) {
        if self.guest_allowed.is_cancelled() {
            return;
        }
        if alone {
            self.without_peer("the secondary is not connected", self.config.force_lonely);
        }
        self.guest_allowed.cancel();
    }

    /// Whether a request has waited for the peer as long as is allowed.
    pub(crate) fn oldest_request(&self) -> Due {
        self.core().ages.due(Instant::now(), self.config.peer_timeout)
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

    /// The peer has given a sign of life.
    pub(crate) fn heard(&self) {
        self.core().last_contact = Some(Instant::now());
    }

    pub(crate) fn is_attached(&self) -> bool {
        self.core().epochs.is_attached()
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
