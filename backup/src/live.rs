use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, LockMode, Operation,
    Result, WriteFlags, ZeroFlags, start,
};
use bytes::Bytes;
use tokio::sync::{OwnedRwLockWriteGuard, RwLock};

use crate::bitmap::Bitmaps;
use crate::change::Change;
use crate::filter::CopyBeforeWrite;

/// A disk in use: the device that guests are given, for as long as they run.
///
/// Its [`bitmaps`](Self::bitmaps) record what guests change. A [`Job`](crate::Job) puts its filter
/// under it and takes it away again: at that moment no change is in flight, so the state that the
/// job keeps is one that the disk really had. Without a job and without bitmaps it only passes
/// requests on.
pub struct LiveDisk {
    name: String,
    source: Arc<dyn BlockDevice>,
    bitmaps: Arc<Bitmaps>,
    /// Held shared by every change, exclusively by whoever wants none in flight.
    door: Door,
}

type Door = Arc<RwLock<Option<Arc<CopyBeforeWrite>>>>;
/// No change is in flight, and none begins, while this is held.
pub(crate) type Quiet = OwnedRwLockWriteGuard<Option<Arc<CopyBeforeWrite>>>;

impl LiveDisk {
    /// The disk in `source`, which nobody else may change from now on.
    #[must_use]
    pub fn new(name: impl Into<String>, source: Arc<dyn BlockDevice>) -> Arc<Self> {
        let bitmaps = Arc::new(Bitmaps::new(source.size()));
        Arc::new(LiveDisk { name: name.into(), source, bitmaps, door: Door::default() })
    }

    /// The device below.
    #[must_use]
    pub fn source(&self) -> &Arc<dyn BlockDevice> {
        &self.source
    }

    /// Where guests have written.
    #[must_use]
    pub fn bitmaps(&self) -> &Bitmaps {
        &self.bitmaps
    }

    /// Holds the guests' changes back, and waits until none is in flight.
    pub(crate) async fn quiet(&self) -> Quiet {
        Arc::clone(&self.door).write_owned().await
    }

    /// Takes a job's filter away.
    pub(crate) async fn remove_filter(&self) {
        let mut quiet = self.quiet().await;
        if let Some(filter) = quiet.take() {
            // A reader of the snapshot that is half-way through still relies on the filter.
            drop(filter.locks().lock(0..self.source.size(), LockMode::Exclusive).await);
        }
    }

    fn change(&self, offset: u64, len: u64, change: Change) -> Io<'_, ()> {
        if len == 0 {
            return Io::ok(());
        }
        if let Err(error) = <dyn BlockDevice>::check_range(self, change.operation(), offset, len) {
            return Io::err(error);
        }
        let bytes = offset..offset + len;
        let (door, bitmaps) = (Arc::clone(&self.door), Arc::clone(&self.bitmaps));
        start(pass(door, bitmaps, Arc::clone(&self.source), bytes, change))
    }
}

async fn pass(
    door: Door,
    bitmaps: Arc<Bitmaps>,
    source: Arc<dyn BlockDevice>,
    bytes: Range<u64>,
    change: Change,
) -> Result<()> {
    let filter = door.read_owned().await;
    let result = match &*filter {
        Some(filter) => change.apply(&**filter, &bytes).await,
        None => change.apply(&*source, &bytes).await,
    };
    // Afterwards, so that whoever clears a bitmap meanwhile does not lose this change; a failed
    // one may have changed something, too. Whoever goes by a bitmap waits for quiet first.
    bitmaps.record(&bytes);
    result
}

impl BlockDevice for LiveDisk {
    fn name(&self) -> &str {
        &self.name
    }

    fn size(&self) -> u64 {
        self.source.size()
    }

    fn limits(&self) -> Limits {
        // Bitmaps have the size of the disk: it grows by `truncate` only.
        Limits { growable: false, ..self.source.limits() }
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.source.read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len() as u64;
        self.change(offset, len, Change::Write(data, flags))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.change(offset, len, Change::Zeroes(flags))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.change(offset, len, Change::Discard)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.source.block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.source.flush(level)
    }

    /// Refused while a job runs, and while a job has one of the bitmaps.
    fn truncate(&self, size: u64) -> Io<'_, ()> {
        Io::future(async move {
            let quiet = self.quiet().await;
            if let Some(filter) = &*quiet {
                let why = format!("job {} runs: its size must not change", filter.name());
                let error = Error::new(Operation::Truncate, ErrorKind::Locked, &self.name, why);
                return Err(error.at(size, 0));
            }
            self.source.truncate(size).await?;
            self.bitmaps.truncate(size).map_err(|error| {
                let why = error.to_string();
                Error::new(Operation::Truncate, ErrorKind::InvalidInput, &self.name, why)
            })
        })
    }
}

impl fmt::Debug for LiveDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LiveDisk")
            .field("name", &self.name)
            .field("source", &self.source.name())
            .field("bitmaps", &self.bitmaps.query().len())
            .finish_non_exhaustive()
    }
}
