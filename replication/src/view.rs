use std::sync::{Arc, Mutex, PoisonError};

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    RangeLock, Result, StatusFlags, WriteFlags, ZeroFlags, zeroes,
};
use bytes::{Bytes, BytesMut};

/// The disk as it was at a checkpoint: the hidden disks of the chain, the oldest first, over the
/// secondary disk. Read-only.
///
/// Every read takes its range lock over look-up and read together: between the two, a primary
/// write could move the old content to a hidden disk and overwrite it.
#[derive(Debug)]
pub(crate) struct ChainView {
    name: String,
    layers: Mutex<Vec<Arc<dyn BlockDevice>>>,
    base: Arc<dyn BlockDevice>,
    /// Of the copy-before-write filter on `base`.
    locks: RangeLock,
}

impl ChainView {
    pub(crate) fn new(
        name: &str,
        layers: Vec<Arc<dyn BlockDevice>>,
        base: Arc<dyn BlockDevice>,
        locks: RangeLock,
    ) -> Arc<Self> {
        Arc::new(ChainView { name: name.to_owned(), layers: Mutex::new(layers), base, locks })
    }

    /// Replaces the layers, the oldest first. What the view shows must not change by it, or
    /// nobody may be reading.
    pub(crate) fn set_layers(&self, layers: Vec<Arc<dyn BlockDevice>>) {
        *self.layers.lock().unwrap_or_else(PoisonError::into_inner) = layers;
    }

    /// The state of a range in the hidden disks alone.
    pub(crate) async fn layer_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let found = self.locate(&self.layers(), offset, len).await?;
        Ok(BlockStatus { len: found.len, flags: found.flags })
    }

    fn layers(&self) -> Vec<Arc<dyn BlockDevice>> {
        self.layers.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Where the first bytes of a range come from: a layer, or the base.
    async fn locate(
        &self,
        layers: &[Arc<dyn BlockDevice>],
        offset: u64,
        len: u64,
    ) -> Result<Located> {
        let mut len = len;
        for layer in layers {
            let status = layer.block_status(offset, len).await?;
            len = status.len.clamp(1, len);
            if status.flags.allocated {
                return Ok(Located { layer: Some(Arc::clone(layer)), len, flags: status.flags });
            }
        }
        Ok(Located { layer: None, len, flags: StatusFlags::default() })
    }

    async fn read_locked(&self, offset: u64, len: usize) -> Result<Bytes> {
        let layers = self.layers();
        let mut whole = BytesMut::new();
        let mut done = 0;
        while done < len {
            let at = offset + done as u64;
            let found = self.locate(&layers, at, (len - done) as u64).await?;
            // At most what is left of `len`, so it fits.
            let part = found.len as usize;
            let data = match found.layer {
                Some(_) if found.flags.zero => zeroes(part),
                Some(layer) => layer.read(at, part).await?,
                None => self.base.read(at, part).await?,
            };
            if part == len {
                return Ok(data);
            }
            whole.extend_from_slice(&data);
            done += part;
        }
        Ok(whole.freeze())
    }

    fn read_only(&self, operation: Operation, offset: u64, len: u64) -> Error {
        Error::new(operation, ErrorKind::ReadOnly, &self.name, "a checkpoint is read-only")
            .at(offset, len)
    }
}

struct Located {
    layer: Option<Arc<dyn BlockDevice>>,
    len: u64,
    flags: StatusFlags,
}

impl BlockDevice for ChainView {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.base.size()
    }

    fn limits(&self) -> Limits {
        Limits { read_only: true, ..self.base.limits() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let me: &dyn BlockDevice = self;
        if let Err(error) = me.check_range(Operation::Read, offset, len as u64) {
            return Io::err(error);
        }
        Io::future(async move {
            let _guard = self.locks.lock(offset..offset + len as u64, LockMode::Shared).await;
            self.read_locked(offset, len).await
        })
    }

    fn write(&self, offset: u64, data: Bytes, _: WriteFlags) -> Io<'_, ()> {
        Io::err(self.read_only(Operation::Write, offset, data.len() as u64))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: ZeroFlags) -> Io<'_, ()> {
        Io::err(self.read_only(Operation::WriteZeroes, offset, len))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        Io::err(self.read_only(Operation::Discard, offset, len))
    }

    /// `allocated` is true for what comes from a hidden disk.
    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        let me: &dyn BlockDevice = self;
        if let Err(error) = me.check_range(Operation::BlockStatus, offset, len) {
            return Io::err(error);
        }
        Io::future(async move {
            let _guard = self.locks.lock(offset..offset + len, LockMode::Shared).await;
            let found = self.locate(&self.layers(), offset, len).await?;
            if found.layer.is_some() {
                return Ok(BlockStatus { len: found.len, flags: found.flags });
            }
            let mut status = self.base.block_status(offset, found.len).await?;
            status.flags.allocated = false;
            Ok(status)
        })
    }

    fn flush(&self, _: FlushLevel) -> Io<'_, ()> {
        Io::ok(())
    }
}
