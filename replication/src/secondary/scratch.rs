//! The device of a test view: it can be ended at any moment, and its guests then get errors.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Result,
    WriteFlags, ZeroFlags, detach,
};
use bytes::Bytes;
use tokio::sync::RwLock;

use super::group::Group;

/// A disk of a test view.
#[derive(Debug)]
pub(super) struct ScratchDevice(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    name: String,
    below: Arc<dyn BlockDevice>,
    /// Its requests are shared holders.
    users: RwLock<()>,
    ended: AtomicBool,
    /// Bytes that were written, each write counted by itself since they were counted last.
    written: AtomicU64,
    group: Weak<Group>,
}

impl ScratchDevice {
    pub(super) fn new(name: &str, below: Arc<dyn BlockDevice>, group: &Arc<Group>) -> Arc<Self> {
        Arc::new(ScratchDevice(Arc::new(Shared {
            name: name.to_owned(),
            below,
            users: RwLock::new(()),
            ended: AtomicBool::new(false),
            written: AtomicU64::new(0),
            group: Arc::downgrade(group),
        })))
    }

    pub(super) fn written_bytes(&self) -> u64 {
        self.0.written.load(Ordering::Relaxed)
    }

    /// Of what had been counted as `before` bytes there are `bytes`.
    pub(super) fn counted(&self, before: u64, bytes: u64) {
        self.0.written.fetch_add(bytes, Ordering::Relaxed);
        self.0.written.fetch_sub(before, Ordering::Relaxed);
    }

    /// From now on every request fails.
    pub(super) fn end(&self) {
        self.0.ended.store(true, Ordering::Release);
    }

    /// Waits until the requests that run now have ended.
    pub(super) async fn unused(&self) {
        let _all = self.0.users.write().await;
    }

    /// Writes outlive whoever asked for them.
    fn change<'a, F>(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        change: impl FnOnce(Arc<Shared>) -> F + Send + 'static,
    ) -> Io<'a, ()>
    where
        F: Future<Output = Result<()>> + Send,
    {
        let shared = Arc::clone(&self.0);
        Io::future(detach(async move {
            let _user = shared.users.read().await;
            shared.check(operation, offset, len)?;
            shared.check_room(operation, offset, len).await?;
            change(Arc::clone(&shared)).await.map_err(|error| shared.refused(error))?;
            shared.written.fetch_add(len, Ordering::Relaxed);
            shared.check(operation, offset, len)
        }))
    }
}

impl Shared {
    fn check(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        match self.ended.load(Ordering::Acquire) {
            false => Ok(()),
            true => Err(self.error(operation, "the test view has ended").at(offset, len)),
        }
    }

    /// A view that has no room ends.
    async fn check_room(&self, operation: Operation, offset: u64, len: u64) -> Result<()> {
        let Some(group) = self.group.upgrade() else {
            return Err(self.error(operation, "the secondary ends").at(offset, len));
        };
        group.check_test_room(len).await.map_err(|error| {
            let reason = error.to_string();
            group.test_is_over(&reason);
            self.error(operation, &reason).at(offset, len)
        })
    }

    fn refused(&self, error: Error) -> Error {
        if error.kind() == ErrorKind::NoSpace
            && let Some(group) = self.group.upgrade()
        {
            group.test_is_over(&error.to_string());
        }
        error
    }

    fn error(&self, operation: Operation, reason: &str) -> Error {
        Error::new(operation, ErrorKind::Io, &self.name, reason.to_owned())
    }
}

impl BlockDevice for ScratchDevice {
    fn name(&self) -> &str {
        &self.0.name
    }

    fn size(&self) -> u64 {
        self.0.below.size()
    }

    fn limits(&self) -> Limits {
        Limits { growable: false, ..self.0.below.limits() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        Io::future(async move {
            let _user = self.0.users.read().await;
            self.0.check(Operation::Read, offset, len as u64)?;
            let data = self.0.below.read(offset, len).await?;
            // What lies below may have changed since it ended.
            self.0.check(Operation::Read, offset, len as u64)?;
            Ok(data)
        })
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len() as u64;
        self.change(Operation::Write, offset, len, move |shared| async move {
            shared.below.write(offset, data, flags).await
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.change(Operation::WriteZeroes, offset, len, move |shared| async move {
            shared.below.write_zeroes(offset, len, flags).await
        })
    }

    /// As zeroing: what lies below would show up.
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.change(Operation::Discard, offset, len, move |shared| async move {
            shared.below.write_zeroes(offset, len, flags).await
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        Io::future(async move {
            let _user = self.0.users.read().await;
            self.0.check(Operation::BlockStatus, offset, len)?;
            self.0.below.block_status(offset, len).await
        })
    }

    /// A test view does not outlive its process: nothing has to be put on stable storage.
    fn flush(&self, _: FlushLevel) -> Io<'_, ()> {
        Io::future(async move {
            let _user = self.0.users.read().await;
            self.0.check(Operation::Flush, 0, 0)?;
            self.0.below.flush(FlushLevel::Process).await
        })
    }
}
