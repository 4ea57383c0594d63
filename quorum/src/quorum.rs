use std::sync::{Arc, Mutex};

use brep_block::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, Operation, RangeLock, Replication,
    StatusFlags, WriteFlags, ZeroFlags, start,
};
use bytes::Bytes;

use crate::changes::Change;
use crate::events::Events;
use crate::join::inline;
use crate::members::{Member, Members};
use crate::{Child, QuorumError, QuorumOptions, Settings};

/// Several devices with the same content, used as one (spec: quorum).
///
/// Writes go to all children, reads to all that vote or to the first that answers. See
/// [`QuorumOptions`] for the rules, and [`QuorumEvent`](crate::QuorumEvent) for how a failing
/// child is noticed. Dropping the [`Io`] of a write does not stop it: the children stay equal.
#[derive(Debug)]
pub struct Quorum {
    pub(crate) shared: Arc<Shared>,
}

#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) name: String,
    pub(crate) settings: Settings,
    pub(crate) discard_as_zeroes: bool,
    /// Orders requests that overlap, if that is our business.
    pub(crate) locks: Option<RangeLock>,
    pub(crate) members: Members,
    pub(crate) events: Events,
    /// The child that replicates.
    pub(crate) replicating: Mutex<Option<Arc<Member>>>,
}

impl Quorum {
    /// Joins the children.
    ///
    /// # Errors
    /// If the options contradict each other or the children do not agree on their size.
    pub fn new(options: QuorumOptions) -> Result<Arc<Self>, QuorumError> {
        options.check()?;
        let shared = Shared {
            name: options.name,
            settings: options.settings,
            discard_as_zeroes: options.discard_as_zeroes,
            locks: options.serialise_overlaps.then(RangeLock::new),
            members: Members::new(options.children),
            events: Events::new(options.events),
            replicating: Mutex::new(None),
        };
        Ok(Arc::new(Quorum { shared: Arc::new(shared) }))
    }

    /// Adds a child behind the others, while nothing is in flight, and returns its name.
    /// Requests that come meanwhile wait. The child must hold the same content already; neither
    /// that nor its size is checked.
    ///
    /// # Errors
    /// [`QuorumError::BlkverifyAdd`], [`QuorumError::HasParent`].
    pub async fn add_child(&self, child: Child) -> Result<String, QuorumError> {
        if self.shared.settings.compares() {
            return Err(QuorumError::BlkverifyAdd);
        }
        self.shared.members.add(child).await
    }

    /// Removes a child by name, while nothing is in flight, and returns its device. The others
    /// keep their names. Replication that it took part in counts as ended.
    ///
    /// # Errors
    /// [`QuorumError::NoSuchChild`], [`QuorumError::TooFewChildren`].
    pub async fn remove_child(&self, name: &str) -> Result<Arc<dyn BlockDevice>, QuorumError> {
        let shared = &self.shared;
        let member =
            shared.members.remove(&shared.name, name, shared.settings.vote_threshold).await?;
        let mut replicating = shared.replicating();
        if replicating.as_ref().is_some_and(|child| Arc::ptr_eq(child, &member)) {
            *replicating = None;
        }
        drop(replicating);
        Ok(Arc::clone(&member.device))
    }

    /// The names of the children and of their devices, in order.
    #[must_use]
    pub fn children(&self) -> Vec<(String, String)> {
        let list = self.shared.members.list();
        list.iter().map(|m| (m.name.clone(), m.device.name().to_owned())).collect()
    }

    /// Waits until nothing is in flight. Holds nothing back.
    pub async fn drain(&self) {
        self.shared.members.drain().await;
    }

    fn change(&self, offset: u64, len: u64, change: Change) -> Io<'_, ()> {
        if len == 0 {
            return Io::ok(());
        }
        if let Err(error) = <dyn BlockDevice>::check_range(self, change.operation(), offset, len) {
            return Io::err(error);
        }
        start(Arc::clone(&self.shared).change(offset, len, change))
    }
}

impl BlockDevice for Quorum {
    fn name(&self) -> &str {
        &self.shared.name
    }

    /// The size of the first child that has a say in it.
    fn size(&self) -> u64 {
        let list = self.shared.members.list();
        let sizes = list.iter().map(|m| (m.device.size(), m.ignore_errors));
        sizes
            .filter(|&(size, ignore)| size > 0 || !ignore)
            .map(|(size, _)| size)
            .next()
            .unwrap_or(0)
    }

    fn limits(&self) -> Limits {
        let list = self.shared.members.list();
        let limits = list.iter().map(|member| member.device.limits());
        let common = limits.reduce(|a, b| Limits {
            block_size: a.block_size.max(b.block_size),
            preferred_size: a.preferred_size.max(b.preferred_size),
            transfer_max: a.transfer_max.min(b.transfer_max),
            read_only: a.read_only || b.read_only,
            growable: false,
            can_discard: a.can_discard && b.can_discard,
            fast_zero: a.fast_zero && b.fast_zero,
        });
        Limits { growable: false, ..common.unwrap_or_default() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let bytes = len as u64;
        if let Err(error) = <dyn BlockDevice>::check_range(self, Operation::Read, offset, bytes) {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(Bytes::new());
        }
        if self.shared.settings.repairs() {
            // A repair that has begun ends under its lock, also if nobody waits for the read.
            let shared = Arc::clone(&self.shared);
            return start(async move { shared.read(offset, len).await });
        }
        inline(self.shared.read(offset, len))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.change(offset, data.len() as u64, Change::Write(data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.change(offset, len, Change::Zeroes(flags))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let change = if self.shared.discard_as_zeroes {
            Change::Zeroes(ZeroFlags { may_unmap: true, ..ZeroFlags::default() })
        } else {
            Change::Discard
        };
        self.change(offset, len, change)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        if let Err(error) =
            <dyn BlockDevice>::check_range(self, Operation::BlockStatus, offset, len)
        {
            return Io::err(error);
        }
        if len == 0 {
            return Io::ok(BlockStatus { len: 0, flags: StatusFlags::default() });
        }
        inline(self.shared.block_status(offset, len))
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        start(Arc::clone(&self.shared).flush(level))
    }

    fn replication(&self) -> Option<&dyn Replication> {
        Some(self)
    }
}
