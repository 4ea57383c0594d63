use std::sync::Arc;

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Replication,
    ReplicationMode, Result, WriteFlags, ZeroFlags, detach,
};
use brep_qcow2::{OpenOptions, Qcow2};
use bytes::Bytes;

use super::calls::Shared;
use super::{Stage, control, not_running};
use crate::gate::Gated;
use crate::layer::Below;

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
///
/// Every call first waits, a bounded time, for the requests in flight on both sides, and holds
/// new ones back. So a request is served as before the call or as after it, and never in between.
/// A call that has begun runs to its end, also if nobody waits for it.
#[derive(Debug)]
pub struct SecondaryNode {
    shared: Arc<Shared>,
}

impl SecondaryNode {
    /// Opens the images. Nothing is changed in them.
    ///
    /// # Errors
    /// An image that cannot be opened, that has internal snapshots, or whose header names a
    /// backing file (the relation exists only at run time).
    pub async fn open(options: SecondaryOptions) -> Result<Arc<Self>> {
        let size = options.base.as_ref().map_or(0, |base| base.size());
        let below_active = Below::nothing(size);
        let backing = Arc::clone(&below_active) as Arc<dyn BlockDevice>;
        let active = open_image(&options.name, Arc::clone(&options.active), Some(backing)).await?;
        let refuse = |text| Err(control(&options.name, ErrorKind::Unsupported, text));
        if !active.snapshots().is_empty() {
            return refuse(
                "the active disk has internal snapshots, which replication does not support",
            );
        }
        if active.backing_name().is_some() {
            return refuse(
                "the header of the active disk names a backing file, which replication does not \
                 support",
            );
        }
        let hidden = match &options.hidden {
            Some(file) => Some(open_image(&options.name, Arc::clone(file), None).await?),
            None => None,
        };
        Ok(Arc::new(SecondaryNode { shared: Shared::new(options, active, below_active, hidden) }))
    }

    /// How far it has come.
    pub fn stage(&self) -> Stage {
        self.shared.stage()
    }

    /// The secondary disk as the primary may write to it, while the node runs and its copy job
    /// lives. Afterwards every request to it fails: no late write of the primary can reach a disk
    /// that is no longer replicated.
    pub fn local(&self) -> Option<Arc<dyn BlockDevice>> {
        self.shared.local()
    }

    /// Ends the copy job from outside, as an operator's cancel would. Without it no pre-image can
    /// be kept, so the primary's writes fail from then on. [`Replication::error`] says so,
    /// checkpoints fail, and a failover still leads to the last one.
    pub fn cancel_job(&self) {
        self.shared.cancel_job();
    }

    /// Ends the node: a merge that runs is cancelled before this returns, and images are written
    /// out. Requests fail afterwards.
    ///
    /// # Errors
    /// An image that cannot be written, or requests that do not end; it may be called again then.
    pub async fn close(&self) -> Result<()> {
        detach(Arc::clone(&self.shared).close()).await
    }

    fn guest(&self) -> &Gated {
        &self.shared.guest
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

impl BlockDevice for SecondaryNode {
    fn name(&self) -> &str {
        &self.shared.options.name
    }

    fn size(&self) -> u64 {
        self.shared.active.size()
    }

    /// What both the active and the secondary disk accept: after a failover requests go to the
    /// latter.
    fn limits(&self) -> Limits {
        let active = self.shared.active.limits();
        let Some(base) = &self.shared.options.base else { return active };
        let base = base.limits();
        Limits {
            block_size: active.block_size.max(base.block_size),
            preferred_size: active.preferred_size.max(base.preferred_size),
            transfer_max: active.transfer_max.min(base.transfer_max),
            fast_zero: active.fast_zero && base.fast_zero,
            ..active
        }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.guest().read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.guest().write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        if flags.fast && !self.limits().fast_zero {
            let text = "writing zeroes is not faster than writing";
            let error =
                Error::new(Operation::WriteZeroes, ErrorKind::Unsupported, self.name(), text);
            return Io::err(error.at(offset, len));
        }
        // One that goes to several disks must not be refused by one of them.
        self.guest().write_zeroes(offset, len, ZeroFlags { fast: false, ..flags })
    }

    /// Carried out as zeroing: what lies below must not shine through.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.guest().write_zeroes(offset, len, flags)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.guest().block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.guest().flush(level)
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
        Io::future(detach(Arc::clone(&self.shared).start(mode)))
    }

    fn checkpoint(&self) -> Io<'_, ()> {
        Io::future(detach(Arc::clone(&self.shared).checkpoint()))
    }

    fn stop(&self, failover: bool) -> Io<'_, ()> {
        Io::future(detach(Arc::clone(&self.shared).stop(failover)))
    }

    fn error(&self) -> Io<'_, ()> {
        match self.shared.error() {
            Some(error) => Io::err(error),
            None if self.stage() == Stage::None => Io::err(not_running(self.name())),
            None => Io::ok(()),
        }
    }
}
