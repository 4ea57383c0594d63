mod broken;
mod grow;
mod promoted;
mod test_view;

pub(super) use self::test_view::Remains;
use self::test_view::TestView;

use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brep_backup::{CbwOptions, Copied, CopyBeforeWrite};
use brep_block::{BlockDevice, Error as BlockError, FlushLevel};
use brep_qcow2::Qcow2;
use uuid::Uuid;

use super::buffers::{Buffer, BufferPool};
use super::named::BufferUse;
use super::session::DRAIN_LIMIT;
use crate::config::{DiskConfig, Durability};
use crate::gate::Gate;
use crate::image::Image;
use crate::merge::MergedDisk;
use crate::state::{DiskRecord, Record};
use crate::unavailable::Unavailable;
use crate::view::ChainView;
use crate::{Error, Result, SetId};

/// How far pre-images are copied ahead of sequential writes where each copy waits for flushes.
const AHEAD_BYTES: u64 = 1 << 20;

/// One disk of a secondary: the image that takes the primary's writes, and the buffers that keep
/// its last checkpoint.
#[derive(Debug)]
pub(crate) struct ReplicaDisk {
    pub(crate) name: String,
    pub(crate) file: String,
    pub(crate) config: DiskConfig,
    /// In bytes. It grows with the primary's.
    size: AtomicU64,
    pub(crate) pool: Arc<BufferPool>,
    image: Image,
    /// In front of this side's guest.
    gate: Arc<Gate>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// It is not part of the checkpoint yet; the id under which it was added.
    joining: Option<Uuid>,
    /// The hidden disks since the last checkpoint, the oldest first.
    chain: Vec<Buffer>,
    /// Empty, named by the record; the next cut switches to it.
    next: Option<Buffer>,
    active: Option<Buffer>,
    /// Takes all writes since a promotion, until the merge has ended.
    top: Option<Buffer>,
    replica: Option<Replica>,
    /// The guest is on `active`: what lies below it is a checkpoint.
    shown: bool,
    promoted: Option<Arc<MergedDisk>>,
    test: Option<TestView>,
    /// Bytes in the chain that the filter's count does not contain.
    kept_bytes: u64,
    /// The filter's count of copied bytes that is not of the chain any more.
    dropped_bytes: u64,
    /// The filter's count when the newest buffer of the chain was begun.
    copied_at_switch: u64,
    /// The first flush of the image that has failed: what a later one says has no meaning.
    failed_flush: Option<BlockError>,
}

impl State {
    /// What a cut switches to, and where.
    fn for_switch(&self, disk: &str) -> Result<(Buffer, Replica)> {
        let parts = self.next.clone().zip(self.replica.clone());
        parts.ok_or_else(|| Error::failed(format!("disk {disk}: no buffer for the next epoch")))
    }
}

/// The working parts while a primary may write.
#[derive(Debug, Clone)]
struct Replica {
    filter: Arc<CopyBeforeWrite>,
    view: Arc<ChainView>,
}

/// The buffers that a commit is going to name.
#[derive(Debug)]
pub(crate) struct Fresh {
    next: Buffer,
    active: Option<Buffer>,
}

impl Fresh {
    pub(crate) fn into_buffers(self) -> Vec<Buffer> {
        [Some(self.next), self.active].into_iter().flatten().collect()
    }
}

impl ReplicaDisk {
    /// Opens the image, and the buffers that the record names.
    pub(crate) async fn open(
        config: &DiskConfig,
        pool: BufferPool,
        image: Image,
        known: Option<&DiskRecord>,
        record: &Record,
        power_lost: bool,
    ) -> Result<Self> {
        let (set, seq_max) = (record.set, record.secondary.buffer_seq);
        let is_disk = record.is_primary();
        let size = image.device().size();
        let gate = Gate::new(&config.name, unavailable(&config.name, size));
        let disk = ReplicaDisk {
            name: config.name.clone(),
            file: config.path.display().to_string(),
            config: config.clone(),
            size: AtomicU64::new(size),
            pool: Arc::new(pool),
            image,
            gate,
            state: Mutex::new(State::default()),
        };
        let Some(known) = known else {
            disk.pool.open(set, &[], seq_max, power_lost, is_disk).await?;
            return Ok(disk);
        };
        let wanted: Vec<_> = known.buffers().collect();
        let buffers = disk.pool.open(set, &wanted, seq_max, power_lost, is_disk).await?;
        let mut buffers = buffers.into_iter();
        {
            let mut state = disk.state();
            state.joining = known.joining;
            state.chain = buffers.by_ref().take(known.chain.len()).collect();
            state.next = known.next.and_then(|_| buffers.next());
            state.active = known.active.and_then(|_| buffers.next());
        }
        let top = known.top.and_then(|_| buffers.next());
        disk.adopt_grown(disk.grown_buffers(size).await?, size);
        disk.adopt_next().await?;
        disk.note_contents().await?;
        disk.make_durable().await?;
        disk.start_replica(Copied::AllocatedInTarget)?;
        if let Some((top, promotion)) = top.zip(record.secondary.promotion.as_ref()) {
            disk.promote_onto(Some(top), promotion.target);
        }
        Ok(disk)
    }

    /// The id under which it was added, if no checkpoint holds it yet.
    pub(crate) fn joining(&self) -> Option<Uuid> {
        self.state().joining
    }

    /// In bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn gate(&self) -> &Arc<Gate> {
        &self.gate
    }

    /// A next buffer that has been written to belongs to the chain: a cut was made and never
    /// committed.
    async fn adopt_next(&self) -> Result<()> {
        let Some(next) = self.state().next.clone() else { return Ok(()) };
        if !next.image.is_empty().await? {
            let mut state = self.state();
            state.next = None;
            state.chain.push(next);
        }
        Ok(())
    }

    /// Looks what the buffers of an earlier run hold.
    async fn note_contents(&self) -> Result<()> {
        let (chain, active) = {
            let state = self.state();
            (state.chain.clone(), state.active.clone())
        };
        let mut bytes = 0;
        for buffer in chain {
            bytes += buffer.image.allocated_bytes().await?;
        }
        self.state().kept_bytes = bytes;
        if let Some(active) = active {
            self.gate.set_written(!active.image.is_empty().await?);
        }
        Ok(())
    }

    /// Puts what the disk and its buffers hold on stable storage, if that is what they are to
    /// survive on: of what a killed process has left only the page cache may know.
    pub(crate) async fn make_durable(&self) -> Result<()> {
        if self.pool.durability() == Durability::Process {
            return Ok(());
        }
        let buffers: Vec<_> = {
            let state = self.state();
            state.chain.iter().chain(&state.active).chain(&state.top).cloned().collect()
        };
        for buffer in buffers {
            buffer.image.flush(FlushLevel::Durable).await?;
        }
        self.flush_image().await
    }

    /// Puts everything that the primary has written so far on stable storage, if that is promised.
    pub(crate) async fn flush_image(&self) -> Result<()> {
        if self.pool.durability() == Durability::Process {
            return Ok(());
        }
        let flushed = self.image.device().flush(FlushLevel::Durable).await;
        flushed.map_err(|error| {
            self.state().failed_flush.get_or_insert(error.clone());
            error.into()
        })
    }

    /// Builds filter and view over the chain, if there is a buffer to write to.
    fn start_replica(&self, assume: Copied) -> Result<()> {
        let mut state = self.state();
        let Some(newest) = state.chain.last().or(state.next.as_ref()) else { return Ok(()) };
        let (barrier, ahead_bytes) = match self.pool.durability() {
            Durability::Process => (FlushLevel::Process, 0),
            Durability::Power => (FlushLevel::Durable, AHEAD_BYTES),
        };
        let options = CbwOptions {
            assume,
            discard_as_zeroes: true,
            barrier: Some(barrier),
            ahead_bytes,
            ..CbwOptions::new(&self.name).unit_bytes(newest.unit_bytes())
        };
        let base = Arc::clone(self.image.device());
        let filter = CopyBeforeWrite::new(Arc::clone(&base), newest.device(), options)?;
        let layers = state.chain.iter().map(Buffer::device).collect();
        let view = ChainView::new(&self.name, layers, base, filter.locks().clone());
        state.replica = Some(Replica { filter, view });
        Ok(())
    }

    /// Prepares for the writes of a session: a next buffer that is empty, and an active disk if
    /// there is a guest. The record has to name them, as [`record`](Self::record) tells, before
    /// the first write.
    ///
    /// With `keep_checkpoint` pre-images are kept from the first write on; without, there is no
    /// checkpoint to be kept until the first cut.
    pub(crate) async fn begin_session(
        &self,
        set: SetId,
        guest: bool,
        keep_checkpoint: bool,
    ) -> Result<()> {
        self.adopt_next().await?;
        if keep_checkpoint && self.state().chain.is_empty() {
            // The checkpoint of a side that made room is its files alone, until now. What the next
            // cut switches to has to stay empty until then.
            let next = self.state().next.take();
            let first = match next {
                Some(next) => next,
                None => self.pool.take_first(set, BufferUse::Hidden).await?,
            };
            let mut state = self.state();
            state.chain.push(first);
            // The view is to show it.
            state.replica = None;
        }
        if self.state().next.is_none() {
            let next = self.pool.take_first(set, BufferUse::Hidden).await?;
            self.state().next = Some(next);
        }
        if guest && self.state().active.is_none() {
            let active = self.pool.take_first(set, BufferUse::Active).await?;
            self.state().active = Some(active);
        }
        if self.state().replica.is_none() {
            let newest = {
                let state = self.state();
                state.chain.last().or(state.next.as_ref()).map(|newest| Arc::clone(&newest.image))
            };
            let is_empty = match newest {
                Some(newest) => newest.is_empty().await?,
                None => true,
            };
            self.start_replica(if is_empty { Copied::Nothing } else { Copied::AllocatedInTarget })?;
        }
        self.filter()?.set_enabled(keep_checkpoint);
        Ok(())
    }

    /// The device that a primary writes to.
    pub(crate) fn filter(&self) -> Result<Arc<CopyBeforeWrite>> {
        match &self.state().replica {
            Some(replica) => Ok(Arc::clone(&replica.filter)),
            None => Err(Error::refused(format!("disk {}: no session", self.name))),
        }
    }

    /// Waits for the end of pre-images that are copied ahead: they are in no session, and write to
    /// the buffers. Nobody writes meanwhile, or there would be new ones.
    ///
    /// # Errors
    /// They do not end.
    pub(super) async fn settle(&self) -> Result<()> {
        let Ok(filter) = self.filter() else { return Ok(()) };
        tokio::time::timeout(DRAIN_LIMIT, filter.drain_ahead()).await.map_err(|_| {
            Error::failed(format!(
                "disk {}: copies of pre-images have not ended for {DRAIN_LIMIT:?}; the disk may hang",
                self.name
            ))
        })
    }

    /// Waits until no write of the primary is in flight.
    pub(crate) async fn drain(&self, limit: Duration) -> Result<()> {
        let filter = self.filter()?;
        tokio::time::timeout(limit, filter.drain()).await.map_err(|_| {
            Error::failed(format!("disk {}: writes did not end within {limit:?}", self.name))
        })
    }

    /// Whether [`switch`](Self::switch) can be done now.
    ///
    /// # Errors
    /// A write of the primary is in flight, or there is no buffer.
    pub(crate) fn check_switch(&self) -> Result<()> {
        match self.state().for_switch(&self.name)?.1.filter.in_flight() {
            0 => Ok(()),
            _ => Err(Error::failed(format!(
                "disk {}: the primary writes during a checkpoint; its guest is to be stopped for it",
                self.name
            ))),
        }
    }

    /// Ends the epoch: from here on pre-images go to the next buffer. Nothing is in flight.
    pub(crate) fn switch(&self) -> Result<()> {
        let mut state = self.state();
        let (next, replica) = state.for_switch(&self.name)?;
        replica.filter.switch_target_with_unit(next.device(), next.unit_bytes())?;
        replica.filter.set_enabled(true);
        state.next = None;
        state.chain.push(next);
        state.copied_at_switch = replica.filter.stats().copied_bytes;
        replica.view.set_layers(state.chain.iter().map(Buffer::device).collect());
        if let Some(test) = &state.test {
            test.follow(&state.chain);
        }
        Ok(())
    }

    /// Takes the buffers that the commit is going to name.
    pub(crate) async fn fresh(&self, set: SetId) -> Result<Fresh> {
        let mut fresh = Fresh { next: self.pool.take(set).await?, active: None };
        // An active disk that nobody wrote to serves on.
        if self.guest_wrote() {
            match self.pool.take(set).await {
                Ok(active) => fresh.active = Some(active),
                Err(error) => {
                    self.pool.recycle(fresh.next).await?;
                    return Err(error);
                }
            }
        }
        Ok(fresh)
    }

    /// What the record has to say of this disk once the newest epoch's predecessor is committed.
    pub(crate) fn record_after_commit(&self, fresh: &Fresh) -> DiskRecord {
        let state = self.state();
        DiskRecord {
            chain: state.chain.last().map(Buffer::reference).into_iter().collect(),
            next: Some(fresh.next.reference()),
            active: fresh.active.as_ref().or(state.active.as_ref()).map(Buffer::reference),
            ..DiskRecord::new(&self.name, self.size())
        }
    }

    /// What the record has to say of this disk now.
    pub(crate) fn record(&self) -> DiskRecord {
        let state = self.state();
        DiskRecord {
            chain: state.chain.iter().map(Buffer::reference).collect(),
            next: state.next.as_ref().map(Buffer::reference),
            active: state.active.as_ref().map(Buffer::reference),
            joining: state.joining,
            top: state.top.as_ref().map(Buffer::reference),
            ..DiskRecord::new(&self.name, self.size())
        }
    }

    /// The same without its buffers, which are given up.
    pub(crate) fn record_without_buffers(&self) -> DiskRecord {
        let joining = self.joining();
        DiskRecord { joining, ..DiskRecord::new(&self.name, self.size()) }
    }

    /// Follows the record that [`record_after_commit`](Self::record_after_commit) described, and
    /// returns the buffers that nobody names any more. The guest is held.
    pub(crate) async fn committed(&self, fresh: Fresh) -> Result<Vec<Buffer>> {
        let (mut retired, view, layers) = {
            let mut state = self.state();
            state.joining = None;
            let newest = state.chain.pop();
            let retired = std::mem::replace(&mut state.chain, newest.into_iter().collect());
            state.next = Some(fresh.next);
            let epoch = state.copied_at_switch.saturating_sub(state.dropped_bytes);
            let bytes = state.kept_bytes + epoch;
            self.pool.note_use(bytes);
            let mut retired = retired;
            if let Some(test) = &mut state.test {
                test.keep(std::mem::take(&mut retired), bytes);
            }
            state.kept_bytes = 0;
            state.dropped_bytes = state.copied_at_switch;
            let layers: Vec<_> = state.chain.iter().map(Buffer::device).collect();
            (retired, state.replica.as_ref().map(|r| Arc::clone(&r.view)), layers)
        };
        if let Some(view) = view {
            view.set_layers(layers);
        }
        if let Some(active) = fresh.active {
            let old = self.state().active.replace(active);
            retired.extend(old);
            self.gate.set_written(false);
            self.show_guest().await?;
        }
        Ok(retired)
    }

    /// Puts the guest on the checkpoint plus its own writes, if there is an active disk.
    pub(crate) async fn show_guest(&self) -> Result<()> {
        let (active, view) = {
            let state = self.state();
            let none_yet = state.joining.is_some();
            let (Some(active), Some(replica), false) = (&state.active, &state.replica, none_yet)
            else {
                return Ok(());
            };
            (active.clone(), Arc::clone(&replica.view))
        };
        active.below.set(Some(view as Arc<dyn BlockDevice>));
        self.gate.replace(active.device());
        self.state().shown = true;
        Ok(())
    }

    /// Whether this side's guest has written since the last checkpoint.
    pub(crate) fn guest_wrote(&self) -> bool {
        self.state().active.is_some() && self.gate.was_written()
    }

    /// The buffers over the image, the lowest first: what each is, and its file.
    pub(crate) fn layers(&self) -> Vec<(String, PathBuf)> {
        let state = self.state();
        let mut layers = Vec::new();
        let hidden =
            state.chain.iter().chain(state.next.as_ref().filter(|_| state.chain.is_empty()));
        for (index, buffer) in hidden.enumerate() {
            let name = if index == 0 { "hidden".to_owned() } else { format!("hidden-{index}") };
            layers.push((name, buffer.path().to_owned()));
        }
        let upper = [("active", &state.active), ("top", &state.top)];
        for (name, buffer) in upper {
            layers.extend(buffer.iter().map(|b| (name.to_owned(), b.path().to_owned())));
        }
        layers
    }

    /// Whether its checkpoint is more than its file.
    pub(crate) fn has_buffers(&self) -> bool {
        let state = self.state();
        !state.chain.is_empty() || state.next.is_some() || state.active.is_some()
    }

    /// Bytes of pre-images since the last checkpoint.
    pub(crate) fn hidden_bytes(&self) -> u64 {
        let state = self.state();
        let copied = state.replica.as_ref().map_or(0, |r| r.filter.stats().copied_bytes);
        state.kept_bytes + copied.saturating_sub(state.dropped_bytes)
    }

    /// Bytes written to hidden disks as pre-images since this session's parts were built.
    pub(crate) fn preimage_bytes(&self) -> u64 {
        self.state().replica.as_ref().map_or(0, |r| r.filter.stats().written_bytes)
    }

    /// Gives up every buffer, after a merge or when a checkpoint is dropped by command. No record
    /// names them any more.
    pub(crate) async fn drop_buffers(&self) -> Result<()> {
        self.settle().await?;
        match self.promoted() {
            Some(promoted) => promoted.finish().await,
            None => self.gate.replace(unavailable(&self.name, self.size())),
        }
        let buffers = {
            let mut state = self.state();
            (state.replica, state.shown) = (None, false);
            (state.kept_bytes, state.dropped_bytes, state.copied_at_switch) = (0, 0, 0);
            let mut buffers = std::mem::take(&mut state.chain);
            buffers.extend(state.next.take());
            buffers.extend(state.active.take());
            buffers.extend(state.top.take());
            buffers
        };
        for buffer in buffers {
            self.pool.recycle(buffer).await?;
        }
        Ok(())
    }

    /// Writes everything out; buffers keep what they hold.
    pub(crate) async fn close(&self) -> Result<()> {
        let images: Vec<Arc<Qcow2>> = {
            let state = self.state();
            let named = state.chain.iter().chain(&state.next).chain(&state.active);
            named.chain(&state.top).map(|b| Arc::clone(&b.image)).collect()
        };
        for image in images {
            image.close().await?;
        }
        // What lies behind the door of a promoted disk holds its group, and so this disk.
        self.gate.replace(unavailable(&self.name, self.size()));
        self.pool.close().await?;
        self.image.close().await
    }
}

/// What the guest finds while there is no checkpoint.
fn unavailable(name: &str, size: u64) -> Arc<dyn BlockDevice> {
    Arc::new(Unavailable { name: name.to_owned(), size, reason: "replication is not running" })
}
