use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Replication,
    ReplicationMode, Result, WriteFlags, ZeroFlags,
};
use bytes::Bytes;

use super::all::unsupported;
use super::control;

/// A secondary disk as a node of its own, to which one active disk may refer.
///
/// While it is a backing reference's target the replication calls do nothing to it and succeed:
/// whoever calls all disks of a machine meets the target too, and the disk that refers to it is
/// the one that replicates. A target is no guest device's disk, and a guest device's disk is no
/// target.
#[derive(Debug)]
pub struct ReferenceTarget {
    device: Arc<dyn BlockDevice>,
    user: Mutex<Option<User>>,
}

#[derive(Debug, Clone)]
enum User {
    GuestDevice,
    /// Holds the name of the disk that refers to the target.
    Reference(String),
}

/// A use of a [`ReferenceTarget`], which is given back when this is dropped.
#[derive(Debug)]
#[must_use = "the target is given back when this is dropped"]
pub struct TargetUse(Arc<ReferenceTarget>);

impl Drop for TargetUse {
    fn drop(&mut self) {
        *self.0.user() = None;
    }
}

impl ReferenceTarget {
    /// A disk that nobody uses.
    pub fn new(device: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(ReferenceTarget { device, user: Mutex::new(None) })
    }

    /// Makes it the target of the backing reference of the disk called `by`.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if it is a guest device's disk, or a target already.
    pub fn refer(self: &Arc<Self>, by: &str) -> Result<TargetUse> {
        self.take(User::Reference(by.to_owned()))
    }

    /// Gives it to a guest device.
    ///
    /// # Errors
    /// [`ErrorKind::Locked`] if it is a backing reference's target, or has a guest device.
    pub fn attach(self: &Arc<Self>) -> Result<TargetUse> {
        self.take(User::GuestDevice)
    }

    fn take(self: &Arc<Self>, new: User) -> Result<TargetUse> {
        let mut user = self.user();
        let name = self.device.name();
        let why = match (&*user, &new) {
            (None, _) => {
                *user = Some(new);
                drop(user);
                return Ok(TargetUse(Arc::clone(self)));
            }
            (Some(User::GuestDevice), _) => {
                format!("backing_hd {name} is used by the other device model")
            }
            (Some(User::Reference(by)), _) => {
                format!("Node '{name}' is busy: it is used as the backing reference of {by}")
            }
        };
        Err(control(name, ErrorKind::Locked, why))
    }

    fn user(&self) -> MutexGuard<'_, Option<User>> {
        self.user.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Nothing to do, for a target.
    fn skip(&self) -> Io<'_, ()> {
        match &*self.user() {
            Some(User::Reference(_)) => Io::ok(()),
            _ => Io::err(self.unsupported()),
        }
    }

    fn unsupported(&self) -> Error {
        unsupported(&*self.device)
    }
}

impl BlockDevice for ReferenceTarget {
    fn name(&self) -> &str {
        self.device.name()
    }
    fn size(&self) -> u64 {
        self.device.size()
    }
    fn limits(&self) -> Limits {
        self.device.limits()
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.device.read(offset, len)
    }
    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.device.write(offset, data, flags)
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.device.write_zeroes(offset, len, flags)
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.device.discard(offset, len)
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.device.block_status(offset, len)
    }
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.device.flush(level)
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        match &*self.user() {
            Some(User::Reference(_)) => {
                let why = "Block device is in use by internal backup job";
                Io::err(control(self.name(), ErrorKind::Locked, why))
            }
            _ => self.device.truncate(size),
        }
    }

    fn replication(&self) -> Option<&dyn Replication> {
        Some(self)
    }
}

impl Replication for ReferenceTarget {
    fn start(&self, _: ReplicationMode) -> Io<'_, ()> {
        self.skip()
    }
    fn checkpoint(&self) -> Io<'_, ()> {
        self.skip()
    }
    fn stop(&self, _: bool) -> Io<'_, ()> {
        self.skip()
    }
    fn error(&self) -> Io<'_, ()> {
        self.skip()
    }
}
