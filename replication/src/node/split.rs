use std::ops::Range;
use std::sync::Arc;

use brep_block::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, LockMode, RangeLock, Result, WriteFlags,
    ZeroFlags,
};
use brep_qcow2::Qcow2;
use bytes::Bytes;

use crate::change::Change;
use crate::view::ChainView;

/// The disk after a merge that failed: it is read through its layers, and what active or hidden
/// disk have is written to the active disk, all else to the secondary disk.
///
/// A request holds whole clusters of the active disk. A write to one part of a cluster may copy
/// the rest of it from below; nobody may be writing there, or his write would be covered by what
/// was copied.
#[derive(Debug)]
pub(super) struct SplitDisk {
    pub(super) active: Arc<Qcow2>,
    pub(super) view: Arc<ChainView>,
    pub(super) base: Arc<dyn BlockDevice>,
    pub(super) locks: RangeLock,
}

impl SplitDisk {
    /// The clusters of the active disk that a range touches.
    fn clusters(&self, offset: u64, len: u64) -> Range<u64> {
        let cluster = self.active.cluster_size();
        let end = offset.saturating_add(len);
        let end = end.checked_next_multiple_of(cluster).unwrap_or(u64::MAX);
        offset - offset % cluster..end
    }

    /// How many bytes from the start of a range are to be written to the same place, and whether
    /// that is the active disk.
    async fn place(&self, offset: u64, len: u64) -> Result<(bool, u64)> {
        let own = self.active.layer_status(offset, len).await?;
        let len = own.len.clamp(1, len);
        if own.flags.allocated {
            return Ok((true, len));
        }
        let hidden = self.view.layer_status(offset, len).await?;
        Ok((hidden.flags.allocated, hidden.len.clamp(1, len)))
    }

    fn change(&self, offset: u64, change: Change) -> Io<'_, ()> {
        let len = change.len();
        let me: &dyn BlockDevice = self;
        if let Err(error) = me.check_range(change.operation(), offset, len) {
            return Io::err(error);
        }
        Io::future(async move {
            let _guard = self.locks.lock(self.clusters(offset, len), LockMode::Exclusive).await;
            let mut done = 0;
            while done < len {
                let at = offset + done;
                let (layered, part) = self.place(at, len - done).await?;
                let device: &dyn BlockDevice = if layered { &*self.active } else { &*self.base };
                change.part(done, part).apply(device, at).await?;
                done += part;
            }
            Ok(())
        })
    }
}

impl BlockDevice for SplitDisk {
    fn name(&self) -> &str {
        self.active.name()
    }

    fn size(&self) -> u64 {
        self.active.size()
    }

    fn limits(&self) -> Limits {
        self.active.limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        Io::future(async move {
            let clusters = self.clusters(offset, len as u64);
            let _guard = self.locks.lock(clusters, LockMode::Shared).await;
            self.active.read(offset, len).await
        })
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.change(offset, Change::Write(data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.change(offset, Change::Zeroes(len, flags))
    }

    /// Carried out as zeroing: what lies below must not shine through.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.change(offset, Change::Zeroes(len, flags))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        Io::future(async move {
            let clusters = self.clusters(offset, len);
            let _guard = self.locks.lock(clusters, LockMode::Shared).await;
            self.active.block_status(offset, len).await
        })
    }

    /// Writes have gone to both.
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        Io::future(async move {
            self.active.flush(level).await?;
            self.base.flush(level).await
        })
    }
}
