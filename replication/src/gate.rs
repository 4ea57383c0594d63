use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use brep_block::{
    BlockDevice, BlockStatus, FlushLevel, Io, Limits, Operation, Result, WriteFlags, ZeroFlags,
    detach,
};
use bytes::Bytes;

use crate::door::{Door, Hold};

/// A device behind a [`Door`], which can be replaced while the door is held.
///
/// A commit moves the secondary's guest to a new active disk this way, and a failover moves it to
/// the promoted disk. Requests that are inside when the door is held go on; [`hold`](Self::hold)
/// waits for them.
pub(crate) struct Gate {
    door: Arc<Door>,
    name: String,
    behind: Mutex<Arc<dyn BlockDevice>>,
    /// A change has passed, or is passing.
    written: AtomicBool,
}

impl Gate {
    pub(crate) fn new(name: &str, behind: Arc<dyn BlockDevice>) -> Arc<Self> {
        Arc::new(Gate {
            door: Door::new(name),
            name: name.to_owned(),
            behind: Mutex::new(behind),
            written: AtomicBool::new(false),
        })
    }

    fn device(&self) -> Arc<dyn BlockDevice> {
        Arc::clone(&self.behind.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn door(&self) -> &Arc<Door> {
        &self.door
    }

    /// Holds new requests and waits until none is inside.
    ///
    /// # Errors
    /// Some were still inside after `limit`; the door is open again.
    pub(crate) async fn hold(&self, limit: Duration) -> Result<()> {
        self.door.hold(Hold::Switch, limit).await
    }

    /// Puts another device behind the door. Call it while the door is held.
    pub(crate) fn replace(&self, device: Arc<dyn BlockDevice>) {
        *self.behind.lock().unwrap_or_else(PoisonError::into_inner) = device;
    }

    /// Lets requests in again.
    pub(crate) fn open(&self) {
        self.door.open(Hold::Switch);
    }

    /// Whether a change has passed since this was last set to false.
    pub(crate) fn was_written(&self) -> bool {
        self.written.load(Ordering::Acquire)
    }

    pub(crate) fn set_written(&self, written: bool) {
        self.written.store(written, Ordering::Release);
    }
}

impl fmt::Debug for Gate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gate").field("name", &self.name).field("behind", &self.device()).finish()
    }
}

/// The device that guests see.
#[derive(Debug, Clone)]
pub(crate) struct Gated(pub(crate) Arc<Gate>);

/// Runs one operation behind the door. A change is inside until it has ended, also if nobody
/// waits for it any more: who holds the door relies on nothing being written.
macro_rules! through {
    ($self:ident, $operation:ident, changes, |$device:ident| $call:expr) => {{
        let gate = Arc::clone(&$self.0);
        Io::future(detach(async move {
            let _inside = Door::enter(&gate.door, Operation::$operation).await?;
            gate.set_written(true);
            let $device = gate.device();
            $call.await
        }))
    }};
    ($self:ident, $operation:ident, |$device:ident| $call:expr) => {{
        let gate = Arc::clone(&$self.0);
        Io::future(async move {
            let _inside = Door::enter(&gate.door, Operation::$operation).await?;
            let $device = gate.device();
            $call.await
        })
    }};
}

impl BlockDevice for Gated {
    fn name(&self) -> &str {
        &self.0.name
    }
    fn size(&self) -> u64 {
        self.0.device().size()
    }
    fn limits(&self) -> Limits {
        self.0.device().limits()
    }
    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        through!(self, Read, |device| device.read(offset, len))
    }
    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        through!(self, Write, changes, |device| device.write(offset, data, flags))
    }
    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        through!(self, WriteZeroes, changes, |device| device.write_zeroes(offset, len, flags))
    }
    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        through!(self, Discard, changes, |device| device.discard(offset, len))
    }
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        through!(self, BlockStatus, |device| device.block_status(offset, len))
    }
    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        through!(self, Flush, |device| device.flush(level))
    }
}

#[cfg(test)]
mod tests {
    use brep_block::{Fault, Memory, Rule};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_change_that_its_caller_gave_up_is_still_inside() {
        let fault = Fault::new(Memory::new("disk", 4096));
        let gate = Gate::new("disk", Arc::clone(&fault) as Arc<dyn BlockDevice>);
        let hang = fault.hang(Rule::new(Operation::Write));
        let gated = Gated(Arc::clone(&gate));
        let mut write = gated.write(0, Bytes::from_static(&[1; 512]), WriteFlags::default());
        assert!(futures_util::poll!(&mut write).is_pending());
        drop(write);
        gate.hold(Duration::from_secs(5)).await.unwrap_err();
        hang.release();
        gate.hold(Duration::from_secs(5)).await.unwrap();
    }
}
