use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_backup::{CbwOptions, CopyBeforeWrite};
use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    Replication, ReplicationMode, Result, WriteFlags, ZeroFlags,
};
use brep_qcow2::{MakeEmpty, OpenOptions, Qcow2};
use bytes::Bytes;
use tokio::task::AbortHandle;

use super::{Stage, check_start, control, not_running};
use crate::layer::Below;
use crate::merge::MergedDisk;
use crate::view::ChainView;

/// What a secondary node is made of.
#[derive(Debug, Clone)]
pub struct SecondaryOptions {
    /// Name of the node.
    pub name: String,
    /// The secondary disk; `None` if the hidden disk was given no backing.
    pub base: Option<Arc<dyn BlockDevice>>,
    /// The file of the hidden disk, a qcow2 image; `None` if the active disk was given no backing.
    pub hidden: Option<Arc<dyn BlockDevice>>,
    /// The file of the active disk, a qcow2 image.
    pub active: Arc<dyn BlockDevice>,
    /// Unit of copy-before-write in bytes, a power of two: at least the size at which the hidden
    /// disk allocates.
    pub unit_bytes: u64,
    /// The root node that the guest uses: this one, or one of `above`.
    pub top_id: String,
    /// Names of the root nodes that have this node below them.
    pub above: Vec<String>,
}

/// The secondary's node: what its guest sees is the last checkpoint plus its own writes.
///
/// The primary writes to [`local`](Self::local). A failover merges active and hidden disk into
/// the secondary disk in the background.
#[derive(Debug)]
pub struct SecondaryNode {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    options: SecondaryOptions,
    active: Arc<Qcow2>,
    /// What the active disk falls through to.
    below_active: Arc<Below>,
    hidden: Option<Arc<Qcow2>>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    latched: Option<Error>,
    /// The copy job; none if it was cancelled.
    filter: Option<Arc<CopyBeforeWrite>>,
    view: Option<Arc<ChainView>>,
    merged: Option<Arc<MergedDisk>>,
    merging: Option<AbortHandle>,
}

impl SecondaryNode {
    /// Opens the images. Nothing is changed in them.
    ///
    /// # Errors
    /// An image that cannot be opened, that has internal snapshots, or whose header names a
    /// backing file (the relation exists only at run time).
    pub async fn open(options: SecondaryOptions) -> Result<Arc<Self>> {
        let below_active = Below::nothing(options.active.size());
        let backing = Arc::clone(&below_active) as Arc<dyn BlockDevice>;
        let active = open_image(&options.name, Arc::clone(&options.active), Some(backing)).await?;
        if !active.snapshots().is_empty() {
            let text = "the active disk has internal snapshots, which replication does not support";
            return Err(control(&options.name, ErrorKind::Unsupported, text));
        }
        let hidden = match &options.hidden {
            Some(file) => Some(open_image(&options.name, Arc::clone(file), None).await?),
            None => None,
        };
        let state = State {
            stage: Stage::None,
            latched: None,
            filter: None,
            view: None,
            merged: None,
            merging: None,
        };
        let shared = Shared { options, active, below_active, hidden, state: Mutex::new(state) };
        Ok(Arc::new(SecondaryNode { shared: Arc::new(shared) }))
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.shared.stage()
    }

    /// The secondary disk as the primary may write to it, while the node runs.
    pub fn local(&self) -> Option<Arc<dyn BlockDevice>> {
        let state = self.shared.state();
        if state.stage != Stage::Running {
            return None;
        }
        state.filter.as_ref().map(|f| Arc::clone(f) as Arc<dyn BlockDevice>)
    }

    /// Ends the copy job from outside, as an operator's cancel would. Pre-images are no longer
    /// kept, and [`Replication::error`] says so.
    pub fn cancel_job(&self) {
        let mut state = self.shared.state();
        if state.stage == Stage::Running && state.filter.take().is_some() {
            let text = "I/O error occurred: the copy job was cancelled";
            state.latched = Some(control(&self.shared.options.name, ErrorKind::Io, text));
        }
    }

    /// Ends the node: a merge that runs is cancelled before this returns, and images are written
    /// out.
    ///
    /// # Errors
    /// An image that cannot be written.
    pub async fn close(&self) -> Result<()> {
        let merging = self.shared.state().merging.take();
        if let Some(merging) = merging {
            merging.abort();
            while !merging.is_finished() {
                tokio::task::yield_now().await;
            }
        }
        self.shared.active.close().await?;
        match &self.shared.hidden {
            Some(hidden) => hidden.close().await,
            None => Ok(()),
        }
    }
}

async fn open_image(
    name: &str,
    file: Arc<dyn BlockDevice>,
    backing: Option<Arc<dyn BlockDevice>>,
) -> Result<Arc<Qcow2>> {
    let options =
        OpenOptions { name: name.to_owned(), backing, ordered: false, ..OpenOptions::default() };
    Qcow2::open(file, options).await.map_err(Error::from)
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn stage(&self) -> Stage {
        self.state().stage
    }

    fn invalid(&self, text: &str) -> Error {
        control(&self.options.name, ErrorKind::InvalidInput, text)
    }

    async fn start(&self) -> Result<()> {
        let Some(hidden) = &self.hidden else {
            return Err(self.invalid("Active disk doesn't have backing file"));
        };
        let Some(base) = &self.options.base else {
            return Err(self.invalid("Hidden disk doesn't have backing file"));
        };
        let sizes = [self.active.size(), hidden.size(), base.size()];
        if sizes.iter().any(|s| *s != sizes[0]) {
            return Err(
                self.invalid("Active disk, hidden disk, secondary disk's length are not the same")
            );
        }
        let options = &self.options;
        let known = options.top_id == options.name || options.above.contains(&options.top_id);
        if !known {
            return Err(self.invalid("No top_bs or it is invalid"));
        }
        // Both overlays begin empty: without a state record nobody knows what they hold.
        self.active.make_empty(MakeEmpty::Keep).await?;
        hidden.make_empty(MakeEmpty::Keep).await?;
        let filter = CopyBeforeWrite::new(
            Arc::clone(base),
            Arc::clone(hidden) as Arc<dyn BlockDevice>,
            CbwOptions {
                discard_as_zeroes: true,
                ..CbwOptions::new(&options.name).unit_bytes(options.unit_bytes)
            },
        )?;
        let layers = vec![Arc::clone(hidden) as Arc<dyn BlockDevice>];
        let view = ChainView::new(&options.name, layers, Arc::clone(base), filter.locks().clone());
        self.below_active.set(Some(Arc::clone(&view) as Arc<dyn BlockDevice>));
        let mut state = self.state();
        state.filter = Some(filter);
        state.view = Some(view);
        state.stage = Stage::Running;
        state.latched = None;
        Ok(())
    }

    async fn checkpoint(&self) -> Result<()> {
        let filter = self.state().filter.clone();
        let (Some(filter), Some(hidden)) = (filter, &self.hidden) else {
            return Err(self.invalid("Backup job was cancelled unexpectedly"));
        };
        filter.drain().await;
        // The guest's part first: a failure in between leaves the old checkpoint whole.
        self.active.make_empty(MakeEmpty::Keep).await.map_err(|e| {
            control(&self.options.name, e.kind(), format!("Cannot make active disk empty: {e}"))
        })?;
        filter.checkpoint()?;
        hidden.make_empty(MakeEmpty::Keep).await.map_err(|e| {
            control(&self.options.name, e.kind(), format!("Cannot make hidden disk empty: {e}"))
        })
    }

    /// Drops both buffers: the disk is what the primary wrote.
    async fn stop(&self) -> Result<()> {
        let filter = {
            let mut state = self.state();
            state.stage = Stage::Done;
            state.latched = None;
            state.view = None;
            state.filter.take()
        };
        if let Some(filter) = filter {
            filter.drain().await;
        }
        self.below_active.set(None);
        self.active.make_empty(MakeEmpty::Keep).await?;
        match &self.hidden {
            Some(hidden) => hidden.make_empty(MakeEmpty::Keep).await,
            None => Ok(()),
        }
    }

    /// Begins the merge.
    async fn failover(self: Arc<Self>) -> Result<()> {
        let (filter, view) = {
            let mut state = self.state();
            state.stage = Stage::Failover;
            state.latched = None;
            (state.filter.take(), state.view.clone())
        };
        if let Some(filter) = filter {
            filter.drain().await;
        }
        let (Some(view), Some(base)) = (view, &self.options.base) else {
            return Err(self.invalid("Backup job was cancelled unexpectedly"));
        };
        let merged = MergedDisk::merging(
            &self.options.name,
            Arc::clone(base),
            Arc::clone(&self.active) as Arc<dyn BlockDevice>,
            vec![view],
        );
        self.state().merged = Some(Arc::clone(&merged));
        let shared = Arc::clone(&self);
        let task = tokio::spawn(async move {
            let result = merged.merge().await;
            match result {
                Ok(()) => {
                    merged.finish().await;
                    let mut state = shared.state();
                    state.stage = Stage::Done;
                    state.latched = None;
                }
                Err(error) => {
                    let mut state = shared.state();
                    state.stage = Stage::Failed;
                    let text = format!("I/O error occurred: {error}");
                    state.latched = Some(control(&shared.options.name, error.kind(), text));
                }
            }
        });
        self.state().merging = Some(task.abort_handle());
        Ok(())
    }

    /// The device that serves the guest now.
    fn serving(&self, operation: Operation, offset: u64, len: u64) -> Result<Serving> {
        let state = self.state();
        match state.stage {
            Stage::None => Err(Error::new(
                operation,
                ErrorKind::Io,
                &self.options.name,
                "Block replication is not running",
            )
            .at(offset, len)),
            Stage::Running => Ok(Serving::Whole(Arc::clone(&self.active) as _)),
            Stage::Failover => Ok(Serving::Whole(match &state.merged {
                Some(merged) => Arc::clone(merged) as _,
                None => Arc::clone(&self.active) as _,
            })),
            Stage::Failed => Ok(Serving::Split),
            Stage::Done => match (&state.merged, &self.options.base) {
                (Some(merged), _) => Ok(Serving::Whole(Arc::clone(merged) as _)),
                (None, Some(base)) => Ok(Serving::Whole(Arc::clone(base))),
                (None, None) => Err(self.invalid("Hidden disk doesn't have backing file")),
            },
        }
    }

    /// After a merge that failed: what active or hidden have is written to active, all else to
    /// the secondary disk.
    async fn write_split(&self, offset: u64, change: Change) -> Result<()> {
        let (view, base) = match (&self.state().view, &self.options.base) {
            (Some(view), Some(base)) => (Arc::clone(view), Arc::clone(base)),
            _ => return Err(self.invalid("Hidden disk doesn't have backing file")),
        };
        let len = change.len();
        let _guard = view.locks().lock(offset..offset + len, LockMode::Exclusive).await;
        let mut done = 0;
        while done < len {
            let at = offset + done;
            let own = self.active.layer_status(at, len - done).await?;
            let (part, layered) = if own.flags.allocated {
                (own.len, true)
            } else {
                let below = view.layer_status(at, own.len.min(len - done)).await?;
                (below.len.min(own.len), below.flags.allocated)
            };
            let part = part.min(len - done);
            let target: &dyn BlockDevice = if layered { &*self.active } else { &*base };
            change.part(done, part).apply(target, at).await?;
            done += part;
        }
        Ok(())
    }
}

/// Who serves a request.
enum Serving {
    Whole(Arc<dyn BlockDevice>),
    /// Decided range by range.
    Split,
}

/// A change of contents.
#[derive(Debug, Clone)]
enum Change {
    Write(Bytes, WriteFlags),
    Zeroes(u64, ZeroFlags),
}

impl Change {
    fn len(&self) -> u64 {
        match self {
            Change::Write(data, _) => data.len() as u64,
            Change::Zeroes(len, _) => *len,
        }
    }

    fn part(&self, from: u64, len: u64) -> Change {
        match self {
            // A part of data that is in memory: both fit.
            Change::Write(data, flags) => {
                Change::Write(data.slice(from as usize..(from + len) as usize), *flags)
            }
            Change::Zeroes(_, flags) => Change::Zeroes(len, *flags),
        }
    }

    async fn apply(self, device: &dyn BlockDevice, offset: u64) -> Result<()> {
        match self {
            Change::Write(data, flags) => device.write(offset, data, flags).await,
            Change::Zeroes(len, flags) => device.write_zeroes(offset, len, flags).await,
        }
    }
}

impl SecondaryNode {
    fn change(&self, operation: Operation, offset: u64, change: Change) -> Io<'_, ()> {
        let shared = Arc::clone(&self.shared);
        Io::future(brep_block::detach(async move {
            match shared.serving(operation, offset, change.len())? {
                Serving::Whole(device) => change.apply(&*device, offset).await,
                Serving::Split => shared.write_split(offset, change).await,
            }
        }))
    }

    /// The device that answers what changes nothing.
    fn reader(&self, operation: Operation, offset: u64, len: u64) -> Result<Arc<dyn BlockDevice>> {
        Ok(match self.shared.serving(operation, offset, len)? {
            Serving::Whole(device) => device,
            Serving::Split => Arc::clone(&self.shared.active) as _,
        })
    }
}

impl BlockDevice for SecondaryNode {
    fn name(&self) -> &str {
        &self.shared.options.name
    }

    fn size(&self) -> u64 {
        self.shared.active.size()
    }

    fn limits(&self) -> Limits {
        self.shared.active.limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        match self.reader(Operation::Read, offset, len as u64) {
            Ok(device) => Io::future(async move { device.read(offset, len).await }),
            Err(error) => Io::err(error),
        }
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.change(Operation::Write, offset, Change::Write(data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.change(Operation::WriteZeroes, offset, Change::Zeroes(len, flags))
    }

    /// Carried out as zeroing: what lies below must not shine through.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.change(Operation::Discard, offset, Change::Zeroes(len, flags))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        match self.reader(Operation::BlockStatus, offset, len) {
            Ok(device) => Io::future(async move { device.block_status(offset, len).await }),
            Err(error) => Io::err(error),
        }
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        match self.reader(Operation::Flush, 0, 0) {
            Ok(device) => Io::future(async move { device.flush(level).await }),
            Err(error) => Io::err(error),
        }
    }

    /// Refused while the node is part of a replication: its disks must keep their size.
    fn truncate(&self, size: u64) -> Io<'_, ()> {
        let text = "Block device is in use by internal backup job";
        let error = Error::new(Operation::Truncate, ErrorKind::Locked, self.name(), text);
        Io::err(error.at(size, 0))
    }

    fn replication(&self) -> Option<&dyn Replication> {
        Some(self)
    }
}

impl Replication for SecondaryNode {
    fn start(&self, mode: ReplicationMode) -> Io<'_, ()> {
        match check_start(self.name(), self.stage(), mode, ReplicationMode::Secondary) {
            Ok(()) => Io::future(self.shared.start()),
            Err(error) => Io::err(error),
        }
    }

    fn checkpoint(&self) -> Io<'_, ()> {
        match self.stage() {
            Stage::None => Io::err(not_running(self.name())),
            Stage::Running | Stage::Failed => Io::future(self.shared.checkpoint()),
            Stage::Failover | Stage::Done => Io::ok(()),
        }
    }

    fn stop(&self, failover: bool) -> Io<'_, ()> {
        match self.stage() {
            Stage::None | Stage::Failed => Io::err(not_running(self.name())),
            Stage::Failover | Stage::Done => Io::ok(()),
            Stage::Running if failover => Io::future(Arc::clone(&self.shared).failover()),
            Stage::Running => Io::future(self.shared.stop()),
        }
    }

    fn error(&self) -> Io<'_, ()> {
        let state = self.shared.state();
        match (state.stage, &state.latched) {
            (Stage::None, _) => Io::err(not_running(self.name())),
            (_, Some(error)) => Io::err(error.clone()),
            (_, None) => Io::ok(()),
        }
    }
}
