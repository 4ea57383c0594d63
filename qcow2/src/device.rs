//! The image as a block device.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    Result, Staging, WriteFlags, ZeroFlags, start,
};
use bytes::Bytes;

use crate::image::Image;
use crate::{CreateOptions, MakeEmpty, OpenError, OpenOptions};

/// Longest read or write.
const TRANSFER_MAX: u32 = 32 << 20;

/// An open qcow2 image.
///
/// A request that has completed is in the file, data and mapping: the end of the process loses
/// nothing. See [`OpenOptions::ordered`] for power losses, and [`Staging`] for writes of which not
/// even a power loss finds the mapping without the data.
///
/// Operations run to their end even if their [`Io`] is dropped, as long as they run inside a
/// tokio runtime. Dropping the handle writes nothing: call [`close`](Self::close), or some
/// clusters that were set aside stay allocated without use until the image is repaired.
pub struct Qcow2 {
    pub(crate) image: Arc<Image>,
}

impl fmt::Debug for Qcow2 {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Qcow2")
            .field("name", &self.image.name)
            .field("size", &self.image.size())
            .finish_non_exhaustive()
    }
}

impl Qcow2 {
    pub(crate) fn new(image: Image) -> Self {
        Qcow2 { image: Arc::new(image) }
    }

    /// Makes `file` an empty image, whatever it held before. Durable after a flush of the file.
    ///
    /// # Errors
    /// Options that the format does not allow, or a failure of the file.
    pub async fn create(
        file: &Arc<dyn BlockDevice>,
        options: &CreateOptions,
    ) -> std::result::Result<(), OpenError> {
        crate::create::create(file, options).await
    }

    /// Opens the image in `file`, which is a device that grows as it is written.
    ///
    /// Header fields are checked against the limits of the format before anything is read by
    /// them. A dirty image is repaired first, unless it is opened read-only.
    ///
    /// # Errors
    /// A [`FormatError`](crate::FormatError) that says which limit is broken or what is not
    /// supported, or a failure of the file.
    pub async fn open(
        file: Arc<dyn BlockDevice>,
        options: OpenOptions,
    ) -> std::result::Result<Arc<Qcow2>, OpenError> {
        crate::open::open(file, options).await
    }

    /// Makes everything fall through to the layer below, in time proportional to what was
    /// allocated. Waits for all requests, and holds up new ones, while it runs.
    ///
    /// With [`MakeEmpty::Keep`] a crash in between leaves an image that is empty, or still whole;
    /// what was allocated may be leaked. With [`MakeEmpty::Release`] it may also leave an image
    /// that is dirty, and that is repaired when it is opened.
    ///
    /// # Errors
    /// A failure of the file. With `Release` the handle may be of no use any more.
    pub async fn make_empty(&self, how: MakeEmpty) -> Result<()> {
        let image = Arc::clone(&self.image);
        start(async move { image.make_empty(how).await }).await
    }

    /// Gives space of free clusters back to the file system, apart from about `keep` bytes. A
    /// call deals with a bounded piece and returns its length in bytes; 0 when nothing is left.
    ///
    /// # Errors
    /// A failure to read refcounts.
    pub async fn release_space(&self, keep: u64) -> Result<u64> {
        let image = Arc::clone(&self.image);
        start(async move { image.release_space(keep).await }).await
    }

    /// Why this handle takes no changes any more, if it does not: a write of metadata has failed, so
    /// that it is not known what the file holds; or the contents contradict the format. The first
    /// is mended by opening the file again, which looks.
    pub fn failure(&self) -> Option<Error> {
        self.image.check_health(Operation::Control).err()
    }

    /// Makes everything durable, and gives back what had been set aside. Later changes fail with
    /// [`ErrorKind::Shutdown`]. Does nothing to an image that is open read-only.
    ///
    /// # Errors
    /// A failure of the file; the image then needs a check.
    pub async fn close(&self) -> Result<()> {
        let image = Arc::clone(&self.image);
        start(async move { image.close().await }).await
    }

    /// The first range at or after `offset` that this layer holds; skips what it does not hold
    /// without I/O where whole L2 tables are missing.
    ///
    /// # Errors
    /// A failure to read L2 tables.
    pub async fn next_allocated(&self, offset: u64) -> Result<Option<Range<u64>>> {
        let _guard = self.image.hold_tables().await;
        self.image.check_readable(Operation::BlockStatus)?;
        self.image.next_allocated(offset).await
    }

    /// Whether nothing is allocated in this layer.
    ///
    /// # Errors
    /// A failure to read L2 tables.
    pub async fn is_empty(&self) -> Result<bool> {
        Ok(self.next_allocated(0).await?.is_none())
    }

    /// Guest bytes that this layer holds, zeroes included.
    ///
    /// # Errors
    /// A failure to read L2 tables.
    pub async fn allocated_bytes(&self) -> Result<u64> {
        let mut bytes = 0;
        let mut at = 0;
        while let Some(range) = self.next_allocated(at).await? {
            bytes += range.end - range.start;
            at = range.end;
        }
        Ok(bytes)
    }

    /// The state of this layer alone, without asking the layer below.
    ///
    /// # Errors
    /// As for [`BlockDevice::block_status`].
    pub async fn layer_status(&self, offset: u64, len: u64) -> Result<BlockStatus> {
        let device: &dyn BlockDevice = self;
        device.check_range(Operation::BlockStatus, offset, len)?;
        if len == 0 {
            return Err(self.bad_request(Operation::BlockStatus, offset, 0, "empty range"));
        }
        self.image.check_readable(Operation::BlockStatus)?;
        let _guard = self.image.hold_tables().await;
        self.image.layer_status(offset, len).await
    }

    fn bad_request(&self, operation: Operation, offset: u64, len: u64, what: &str) -> Error {
        self.image.error(operation, ErrorKind::InvalidInput, what).at(offset, len)
    }

    /// Checks a request; false if there is nothing to do.
    fn admit(&self, operation: Operation, offset: u64, len: u64) -> Result<bool> {
        let device: &dyn BlockDevice = self;
        device.check_range(operation, offset, len)?;
        let data = matches!(operation, Operation::Read | Operation::Write);
        if data && len > u64::from(TRANSFER_MAX) {
            return Err(self.bad_request(operation, offset, len, "request is too long"));
        }
        match operation {
            Operation::Read | Operation::BlockStatus => self.image.check_readable(operation)?,
            _ => self.image.check_writable(operation)?,
        }
        Ok(len > 0)
    }
}

impl BlockDevice for Qcow2 {
    fn name(&self) -> &str {
        &self.image.name
    }

    fn size(&self) -> u64 {
        self.image.size()
    }

    fn limits(&self) -> Limits {
        Limits {
            block_size: 1,
            preferred_size: self.subcluster_size() as u32,
            transfer_max: TRANSFER_MAX,
            read_only: self.image.read_only,
            growable: false,
            can_discard: !self.image.read_only,
            fast_zero: self.image.g.version >= 3 && !self.image.read_only,
        }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        match self.admit(Operation::Read, offset, len as u64) {
            Ok(true) => {}
            Ok(false) => return Io::ok(Bytes::new()),
            Err(error) => return Io::err(error),
        }
        let image = Arc::clone(&self.image);
        start(async move {
            let clusters = image.whole_clusters(offset, len as u64);
            let _guard = image.ranges.lock(clusters, LockMode::Shared).await;
            image.read_mapped(offset, len).await
        })
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        match self.admit(Operation::Write, offset, data.len() as u64) {
            Ok(true) => {}
            Ok(false) => return Io::ok(()),
            Err(error) => return Io::err(error),
        }
        let image = Arc::clone(&self.image);
        start(async move { image.write(offset, data, flags.fua).await })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        match self.admit(Operation::WriteZeroes, offset, len) {
            Ok(true) => {}
            Ok(false) => return Io::ok(()),
            Err(error) => return Io::err(error),
        }
        let image = Arc::clone(&self.image);
        start(async move { image.write_zeroes(offset, len, flags).await })
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        match self.admit(Operation::Discard, offset, len) {
            Ok(true) => {}
            Ok(false) => return Io::ok(()),
            Err(error) => return Io::err(error),
        }
        let image = Arc::clone(&self.image);
        start(async move { image.discard(offset, len).await })
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        match self.admit(Operation::BlockStatus, offset, len) {
            Ok(true) => {}
            Ok(false) => {
                let what = "status of an empty range";
                return Io::err(self.bad_request(Operation::BlockStatus, offset, len, what));
            }
            Err(error) => return Io::err(error),
        }
        let image = Arc::clone(&self.image);
        start(async move {
            let _guard = image.hold_tables().await;
            image.status(offset, len).await
        })
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        let image = Arc::clone(&self.image);
        start(async move {
            match level {
                // Whatever has completed is in the file already.
                FlushLevel::Process => {
                    image.check_health(Operation::Flush)?;
                    image.file.flush(FlushLevel::Process).await
                }
                FlushLevel::Durable => image.flush_durable().await,
            }
        })
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        if let Err(error) = self.image.check_writable(Operation::Truncate) {
            return Io::err(error);
        }
        let image = Arc::clone(&self.image);
        start(async move { image.grow(size).await })
    }

    /// Not for version 2, where zeroes are data.
    fn staging(&self) -> Option<&dyn Staging> {
        (self.image.g.version >= 3).then_some(self)
    }
}

impl Staging for Qcow2 {
    fn stage(&self, offset: u64, data: Bytes) -> Io<'_, ()> {
        match self.admit(Operation::Write, offset, data.len() as u64) {
            Ok(true) => {}
            Ok(false) => return Io::ok(()),
            Err(error) => return Io::err(error),
        }
        let image = Arc::clone(&self.image);
        start(async move { image.stage(offset, data).await })
    }

    fn publish(&self, offset: u64, len: u64) -> Io<'_, ()> {
        // Not data, whose length is limited.
        match self.admit(Operation::WriteZeroes, offset, len) {
            Ok(true) => {}
            Ok(false) => return Io::ok(()),
            Err(error) => return Io::err(error),
        }
        let image = Arc::clone(&self.image);
        start(async move { image.publish(offset, len).await })
    }
}
