use std::sync::Arc;
use std::sync::atomic::Ordering;

use brep_block::{
    BlockDevice, BlockStatus, Error as BlockError, FlushLevel, Io, Limits, Operation, Result,
    WriteFlags, ZeroFlags,
};
use bytes::Bytes;
use futures_util::future::join;

use super::group::{DiskPart, Group};
use crate::change::Change;
use crate::config::Ack;
use crate::door::{Door, Inside};

/// Longest change in bytes that is tracked and sent as one. An activity log cannot have all of a much
/// longer one at a time, so that it would never begin.
const ZEROES_LEN_MAX: u64 = 1 << 30;

/// The guest's disk: the local image, with every change forwarded to the secondary.
///
/// Reads are the local disk's alone. A change goes to both at once; it is acknowledged when the
/// local disk has it and, with `--ack sync`, the secondary too. It fails if the local disk fails,
/// whatever the secondary did. TRIM and zeroes are carried out as zeroing on both sides, unmapped
/// where possible, so that both read the same.
///
/// A change has to be polled to its end, as the NBD server does and [`Gated`](crate::gate::Gated): it
/// holds its range and counts as in flight until then.
#[derive(Debug, Clone)]
pub(crate) struct PrimaryDisk {
    group: Arc<Group>,
    part: Arc<DiskPart>,
}

impl PrimaryDisk {
    /// A disk of the group.
    pub(crate) fn new(group: &Arc<Group>, part: Arc<DiskPart>) -> Self {
        PrimaryDisk { group: Arc::clone(group), part }
    }

    fn start_change(&self, offset: u64, change: Change) -> Io<'_, ()> {
        let me: &dyn BlockDevice = self;
        if let Err(error) = me.check_range(change.operation(), offset, change.len()) {
            return Io::err(error);
        }
        match change {
            change if change.len() == 0 => Io::ok(()),
            Change::Zeroes(len, flags) if len > ZEROES_LEN_MAX => {
                Io::future(self.clone().zero_in_pieces(offset, len, flags))
            }
            change => Io::future(self.clone().change(offset, change)),
        }
    }

    /// One after the other, as long as they succeed: each is a request of its own to the peer.
    async fn zero_in_pieces(self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        let mut done = 0;
        while done < len {
            let piece = ZEROES_LEN_MAX.min(len - done);
            self.clone().change(offset + done, Change::Zeroes(piece, flags)).await?;
            done += piece;
        }
        Ok(())
    }

    /// A request that is the local disk's alone.
    fn pass<'a, T: Send + 'a>(
        &'a self,
        operation: Operation,
        start: impl FnOnce(&'a dyn BlockDevice) -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        if let Err(error) = self.group.check_superseded(self.part.number, operation) {
            return Io::err(error);
        }
        let Some(inside) = Door::try_enter(&self.group.door) else {
            return Io::future(async move {
                let _inside = self.enter(operation).await?;
                start(&*self.part.device).await
            });
        };
        match start(&*self.part.device) {
            Io::Pending(request) => Io::future(async move {
                let _inside = inside;
                request.await
            }),
            done => done,
        }
    }

    /// Goes inside, when the guest's requests are not held.
    ///
    /// # Errors
    /// The process ends, or this side is the disk no more.
    async fn enter(&self, operation: Operation) -> Result<Inside> {
        if let Some(inside) = Door::try_enter(&self.group.door) {
            return Ok(inside);
        }
        let entered = Door::enter(&self.group.door, operation);
        self.group.unless_superseded(self.part.number, operation, entered).await
    }

    async fn change(self, offset: u64, change: Change) -> Result<()> {
        let len = change.len();
        let operation = change.operation();
        self.group.until_writable(self.part.number, operation).await?;
        // Before it counts as a request: a guest that is stopped does not wait for the peer.
        let _inside = self.enter(operation).await?;
        let counters = &self.group.counters;
        counters.guest_writes.fetch_add(1, Ordering::Relaxed);
        counters.guest_write_bytes.fetch_add(len, Ordering::Relaxed);
        let timed = self.group.time_write();
        let admission = self.group.admit(len).await;
        let guard = admission.lock(&self.part.locks, offset..offset + len).await;
        let begun = self.group.begin(&admission, self.part.number, offset, &change).await?;
        let ticket = begun.ticket;
        let local = async {
            let local = self.apply(offset, change).await;
            self.group.local_done(ticket, offset, len, &local);
            // The order on the way to the peer is fixed; only the local leg needs the range.
            drop(guard);
            local
        };
        // Beside the local leg: a local disk that is slow is not to be taken for a lost peer.
        let group = Arc::clone(&self.group);
        let finish = async move { group.finish_remote(begun, offset, len, admission).await };
        let (local, replicated) = match self.group.config.ack {
            Ack::Sync => join(local, finish).await,
            Ack::Async => {
                // Bounded by the window: the admission goes with it.
                tokio::spawn(finish);
                (local.await, false)
            }
        };
        self.group.note_write(timed);
        let at = |e: BlockError| e.at(offset, len);
        self.group.may_acknowledge(self.part.number, operation).await.map_err(at)?;
        if !replicated {
            // It was on its way, and that may be known to be in vain now.
            self.group.until_writable(self.part.number, operation).await.map_err(at)?;
        }
        // The peer was lost on the way, and that could not be recorded: whoever starts this side
        // again must not find that it acknowledged this.
        local.and(self.group.check_fatal(self.part.number, operation).map_err(at))
    }

    async fn apply(&self, offset: u64, change: Change) -> Result<()> {
        match change {
            Change::Write(data, flags) => self.part.device.write(offset, data, flags).await,
            Change::Zeroes(len, flags) => self.part.device.write_zeroes(offset, len, flags).await,
        }
    }
}

impl BlockDevice for PrimaryDisk {
    fn name(&self) -> &str {
        self.part.device.name()
    }

    fn size(&self) -> u64 {
        self.part.size()
    }

    fn limits(&self) -> Limits {
        Limits { growable: false, ..self.part.device.limits() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.pass(Operation::Read, move |device| device.read(offset, len))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.start_change(offset, Change::Write(data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        if flags.fast && !self.part.device.limits().fast_zero {
            // Refused before anything is sent: the peer must not be zeroed if this side is not.
            return self.part.device.write_zeroes(offset, len, flags);
        }
        // Accepted here, it must not fail later for not being fast.
        self.start_change(offset, Change::Zeroes(len, ZeroFlags { fast: false, ..flags }))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.start_change(offset, Change::Zeroes(len, flags))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.pass(Operation::BlockStatus, move |device| device.block_status(offset, len))
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.pass(Operation::Flush, move |_| {
            Io::future(async move {
                let peer = async {
                    if level == FlushLevel::Durable {
                        self.group.flush_peer(&self.part).await;
                    }
                };
                let (local, ()) = join(self.group.flush_disk(&self.part, level), peer).await;
                local
            })
        })
    }
}
