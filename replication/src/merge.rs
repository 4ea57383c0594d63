use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    RangeLock, Result, StatusFlags, WriteFlags, ZeroFlags, detach,
};
use brep_qcow2::Qcow2;
use bytes::Bytes;

use crate::change::Change;
use crate::status::Progress;

/// Bytes that the merge copies, and locks, at a time.
const MERGE_STEP_BYTES: u64 = 1 << 20;

/// A promoted disk: served at once, merged behind.
///
/// All writes go to a fresh top layer, so nothing below it changes: neither a pre-image nor an
/// earlier write of this side's guest. The merge copies, in ascending order, whatever any layer
/// has into the image. It never changes its sources, so it can begin again after any crash: a
/// write to a range that has been merged goes to the top *and* to the image. When all is merged,
/// the image alone is the disk.
#[derive(Debug)]
pub(crate) struct MergedDisk {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    name: String,
    base: Arc<dyn BlockDevice>,
    locks: RangeLock,
    /// Everything below this byte is in the image.
    merged: AtomicU64,
    stack: Mutex<Option<Stack>>,
}

/// What lies over the image until the merge has ended.
#[derive(Debug, Clone)]
struct Stack {
    /// Takes all writes; its backing is what lies below.
    top: Arc<dyn BlockDevice>,
    /// The image behind the top, and those below it, the upper first. Each tells what it has by
    /// itself; nobody asks the disk's image, which may be slow to tell and has everything anyway.
    layers: Vec<Arc<Qcow2>>,
}

/// What the layers have, for one walk in ascending order.
#[derive(Debug)]
struct Walk<'a> {
    stack: &'a Stack,
    /// Those below the top.
    below: Vec<Layer<'a>>,
}

/// A layer that nobody writes to any more.
#[derive(Debug)]
struct Layer<'a> {
    image: &'a Qcow2,
    /// What it said last, and from where on. To ask is expensive: a layer that has nothing more
    /// looks through all of the rest before it says so.
    said: Option<(u64, BlockStatus)>,
}

impl Layer<'_> {
    async fn status(&mut self, offset: u64, len: u64) -> Result<BlockStatus> {
        let (from, said) = match self.said {
            Some((from, said)) if (from..from + said.len).contains(&offset) => (from, said),
            _ => (offset, self.image.layer_status(offset, self.image.size() - offset).await?),
        };
        self.said = Some((from, said));
        Ok(BlockStatus { len: len.min(from + said.len - offset), flags: said.flags })
    }
}

impl<'a> Walk<'a> {
    fn new(stack: &'a Stack) -> Self {
        let layer = |image: &'a Arc<Qcow2>| Layer { image, said: None };
        Self { stack, below: stack.layers.iter().skip(1).map(layer).collect() }
    }

    /// The state of the first bytes of a range; `allocated`: some layer over the image has them.
    async fn status(&mut self, offset: u64, len: u64) -> Result<BlockStatus> {
        let mut below = BlockStatus { len, flags: StatusFlags::default() };
        for layer in &mut self.below {
            below = layer.status(offset, below.len).await?;
            if below.flags.allocated {
                break;
            }
        }
        // Only the top changes. It is asked no further than the others reach.
        let Some(top) = self.stack.layers.first() else { return Ok(below) };
        let top = top.layer_status(offset, below.len).await?;
        let flags = if top.flags.allocated { top.flags } else { below.flags };
        Ok(BlockStatus { len: top.len.min(below.len), flags })
    }
}

impl MergedDisk {
    /// The image is the disk.
    pub(crate) fn direct(name: &str, base: Arc<dyn BlockDevice>) -> Arc<Self> {
        Self::new(name, base, None)
    }

    /// `top`, whose backing shows the checkpoint, is the disk until the merge has ended. `layers`
    /// are the image behind it and those between it and the disk's image, the upper first.
    pub(crate) fn merging(
        name: &str,
        base: Arc<dyn BlockDevice>,
        top: Arc<dyn BlockDevice>,
        layers: Vec<Arc<Qcow2>>,
    ) -> Arc<Self> {
        Self::new(name, base, Some(Stack { top, layers }))
    }

    fn new(name: &str, base: Arc<dyn BlockDevice>, stack: Option<Stack>) -> Arc<Self> {
        Arc::new(MergedDisk {
            shared: Arc::new(Shared {
                name: name.to_owned(),
                base,
                locks: RangeLock::new(),
                merged: AtomicU64::new(0),
                stack: Mutex::new(stack),
            }),
        })
    }

    /// How much of the disk is in the image; none when the merge has ended.
    pub(crate) fn progress(&self) -> Option<Progress> {
        self.shared.stack().map(|_| Progress {
            done: self.shared.merged.load(Ordering::Acquire),
            total: self.shared.base.size(),
        })
    }

    /// Copies what the layers have into the image; may end at any point and begin again.
    ///
    /// # Errors
    /// A layer could not be read or the image not be written; the disk is served on as before.
    pub(crate) async fn merge(&self) -> Result<()> {
        let Some(stack) = self.shared.stack() else { return Ok(()) };
        let size = self.shared.base.size();
        let mut walk = Walk::new(&stack);
        let mut offset = 0;
        while offset < size {
            offset = self.shared.merge_step(&mut walk, offset, size).await?;
            tokio::task::yield_now().await;
        }
        self.shared.base.flush(FlushLevel::Durable).await
    }

    /// From now on the image alone is the disk: the merge has ended, and the record says so.
    /// Nobody reads the layers any more when this returns.
    pub(crate) async fn finish(&self) {
        let _all = self.shared.locks.lock(0..u64::MAX, LockMode::Exclusive).await;
        self.shared.stack.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn start_change(&self, offset: u64, change: Change) -> Io<'_, ()> {
        let me: &dyn BlockDevice = self;
        if let Err(error) = me.check_range(change.operation(), offset, change.len()) {
            return Io::err(error);
        }
        Io::future(detach(Arc::clone(&self.shared).change(offset, change)))
    }
}

impl Shared {
    fn stack(&self) -> Option<Stack> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Merges from `offset` on, under a lock, and returns the end of what is merged.
    async fn merge_step(&self, walk: &mut Walk<'_>, offset: u64, size: u64) -> Result<u64> {
        // A long range that no layer has is passed over in one go. What was found without the
        // lock is looked up again under it: a guest may have written in between.
        let probe = walk.status(offset, size - offset).await?;
        let len = if probe.flags.allocated { probe.len.min(MERGE_STEP_BYTES) } else { probe.len };
        let end = offset + len;
        let _guard = self.locks.lock(offset..end, LockMode::Exclusive).await;
        let mut at = offset;
        while at < end {
            let status = walk.status(at, end - at).await?;
            let mut part = status.len.min(end - at);
            if status.flags.allocated {
                part = part.min(MERGE_STEP_BYTES);
                self.merge_part(&*walk.stack.top, at, part, status.flags.zero).await?;
            }
            at += part;
        }
        // Before the lock is released: a write that comes next has to know.
        self.merged.store(end, Ordering::Release);
        Ok(end)
    }

    async fn merge_part(
        &self,
        top: &dyn BlockDevice,
        offset: u64,
        len: u64,
        zero: bool,
    ) -> Result<()> {
        if zero {
            let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
            return self.base.write_zeroes(offset, len, flags).await;
        }
        // At most MERGE_STEP_BYTES, so it fits.
        let data = top.read(offset, len as usize).await?;
        self.base.write(offset, data, WriteFlags::default()).await
    }

    async fn change(self: Arc<Self>, offset: u64, change: Change) -> Result<()> {
        let len = change.len();
        let _guard = self.locks.lock(offset..offset + len, LockMode::Exclusive).await;
        let Some(stack) = self.stack() else { return change.apply(&*self.base, offset).await };
        // The merge cannot pass this range while it is locked.
        let merged = self.merged.load(Ordering::Acquire).saturating_sub(offset).min(len);
        let head = (merged > 0).then(|| change.part(0, merged));
        change.apply(&*stack.top, offset).await?;
        match head {
            Some(head) => head.apply(&*self.base, offset).await,
            None => Ok(()),
        }
    }
}

impl BlockDevice for MergedDisk {
    fn name(&self) -> &str {
        &self.shared.name
    }

    fn size(&self) -> u64 {
        self.shared.base.size()
    }

    fn limits(&self) -> Limits {
        Limits { growable: false, ..self.shared.base.limits() }
    }

    /// Holds its range, so that the layers stay until the read has ended.
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let me: &dyn BlockDevice = self;
        if let Err(error) = me.check_range(Operation::Read, offset, len as u64) {
            return Io::err(error);
        }
        let range = offset..offset + len as u64;
        Io::future(async move {
            let _guard = self.shared.locks.lock(range, LockMode::Shared).await;
            match self.shared.stack() {
                Some(stack) => stack.top.read(offset, len).await,
                None => self.shared.base.read(offset, len).await,
            }
        })
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.start_change(offset, Change::Write(data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.start_change(offset, Change::Zeroes(len, flags))
    }

    /// Carried out as zeroing, so that a later secondary reads the same.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.start_change(offset, Change::Zeroes(len, flags))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        let me: &dyn BlockDevice = self;
        if let Err(error) = me.check_range(Operation::BlockStatus, offset, len) {
            return Io::err(error);
        }
        Io::future(async move {
            let _guard = self.shared.locks.lock(offset..offset + len, LockMode::Shared).await;
            match self.shared.stack() {
                Some(stack) => stack.top.block_status(offset, len).await,
                None => self.shared.base.block_status(offset, len).await,
            }
        })
    }

    /// Not before the merge has ended.
    fn truncate(&self, size: u64) -> Io<'_, ()> {
        Io::future(async move {
            let _all = self.shared.locks.lock(0..u64::MAX, LockMode::Exclusive).await;
            if self.shared.stack().is_some() {
                let what = "the promoted disk is being merged; its size can be changed afterwards";
                let kind = ErrorKind::Unsupported;
                return Err(Error::new(Operation::Truncate, kind, &self.shared.name, what));
            }
            self.shared.base.truncate(size).await
        })
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        Io::future(async move {
            // The layers stay while this holds a range, however small.
            let _guard = self.shared.locks.lock(0..1, LockMode::Shared).await;
            if let Some(stack) = self.shared.stack() {
                stack.top.flush(level).await?;
            }
            self.shared.base.flush(level).await
        })
    }
}
