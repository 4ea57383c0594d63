//! The state of an open image, and what all operations share: health, ordering, corrupt bit.
//!
//! # Locks, in the order in which they may be taken
//!
//! 1. `ranges`: guest ranges, in whole clusters. Who changes a cluster's mapping holds it
//!    exclusively, who uses the mapping holds it shared; so nothing is in flight on a host
//!    cluster when its reference is dropped. Emptying holds all of them.
//! 2. `structure`: the L1 table, creation and relocation of L2 tables.
//! 3. `alloc`: refcounts.
//! 4. `header_io`, `flush`: leaves.
//!
//! Locks of the standard library protect memory only and are never held over an await.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{
    BlockDevice, Error, ErrorKind, FlushLevel, LockMode, Operation, RangeGuard, RangeLock, Result,
};
use bytes::Bytes;
use tokio::sync::Mutex as AsyncMutex;

use crate::Snapshot;
use crate::alloc::{Allocator, Pool};
use crate::file::File;
use crate::geometry::Geometry;
use crate::header::{Header, field, incompatible};
use crate::map::Map;
use crate::regions::Regions;

/// An open image.
#[derive(Debug)]
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) file: File,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    pub(crate) g: Geometry,
    pub(crate) read_only: bool,
    /// Order what reaches stable storage too, not only what reaches the file.
    pub(crate) ordered: bool,
    pub(crate) snapshots: Vec<Snapshot>,
    /// Virtual size in bytes.
    pub(crate) size: AtomicU64,
    pub(crate) header: Mutex<Header>,
    pub(crate) header_io: AsyncMutex<()>,
    pub(crate) ranges: RangeLock,
    pub(crate) structure: AsyncMutex<()>,
    pub(crate) map: Map,
    pub(crate) alloc: AsyncMutex<Allocator>,
    pub(crate) pool: Mutex<Pool>,
    pub(crate) regions: Mutex<Regions>,
    pub(crate) flusher: Flusher,
    /// References that may be dropped once what no longer needs them is on stable storage.
    pub(crate) deferred: Mutex<Deferred>,
    /// Where clusters lie that have been staged and not published: guest to host cluster.
    pub(crate) staged: Mutex<BTreeMap<u64, u64>>,
    /// The cluster that was inflated last.
    pub(crate) inflated: Mutex<Option<Inflated>>,
    health: Health,
}

/// An inflated cluster and where its data came from.
#[derive(Debug, Clone)]
pub(crate) struct Inflated {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) data: Bytes,
}

/// Clusters that wait for a durable flush before they lose a reference.
#[derive(Debug, Default)]
pub(crate) struct Deferred {
    pub(crate) recycle: Vec<u64>,
    pub(crate) punch: Vec<u64>,
}

impl Deferred {
    pub(crate) fn len(&self) -> usize {
        self.recycle.len() + self.punch.len()
    }
}

/// Joins durable flushes: one serves everybody who asked before it began.
#[derive(Debug, Default)]
pub(crate) struct Flusher {
    requested: AtomicU64,
    /// Highest request that a completed flush has served.
    served: AsyncMutex<u64>,
}

/// Whether the image takes requests.
#[derive(Debug, Default)]
struct Health {
    /// Set before the reason is stored: a hint that is checked without a lock.
    ill: AtomicBool,
    reason: Mutex<Option<Illness>>,
}

#[derive(Debug, Clone)]
struct Illness {
    kind: ErrorKind,
    detail: String,
    /// Not even reads are answered.
    ejected: bool,
}

/// What `Image::new` takes from the opening.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) file: File,
    pub(crate) backing: Option<Arc<dyn BlockDevice>>,
    pub(crate) read_only: bool,
    pub(crate) ordered: bool,
    pub(crate) header: Header,
    pub(crate) snapshots: Vec<Snapshot>,
    pub(crate) map: Map,
    pub(crate) alloc: Allocator,
    pub(crate) regions: Regions,
}

impl Image {
    pub(crate) fn new(parts: Parts) -> Image {
        let file_clusters = parts.header.geometry.clusters(parts.file.size());
        Image {
            name: parts.name,
            file: parts.file,
            backing: parts.backing,
            g: parts.header.geometry,
            read_only: parts.read_only,
            ordered: parts.ordered,
            snapshots: parts.snapshots,
            size: AtomicU64::new(parts.header.size),
            header: Mutex::new(parts.header),
            header_io: AsyncMutex::new(()),
            ranges: RangeLock::new(),
            structure: AsyncMutex::new(()),
            map: parts.map,
            alloc: AsyncMutex::new(parts.alloc),
            pool: Mutex::new(Pool::new(file_clusters)),
            regions: Mutex::new(parts.regions),
            flusher: Flusher::default(),
            deferred: Mutex::new(Deferred::default()),
            staged: Mutex::default(),
            inflated: Mutex::new(None),
            health: Health::default(),
        }
    }

    /// Keeps the L2 tables in their places, without waiting for anything but an emptying. For
    /// those who look at the mapping and do not mind that it changes meanwhile.
    pub(crate) async fn hold_tables(&self) -> RangeGuard {
        // Beyond every disk, so that only who locks everything stands in the way.
        self.ranges.lock(u64::MAX - 1..u64::MAX, LockMode::Shared).await
    }

    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    pub(crate) fn error(
        &self,
        operation: Operation,
        kind: ErrorKind,
        detail: impl Into<String>,
    ) -> Error {
        Error::new(operation, kind, &*self.name, detail)
    }

    /// Whether the image may be changed.
    pub(crate) fn check_writable(&self, operation: Operation) -> Result<()> {
        if self.read_only {
            return Err(self.error(operation, ErrorKind::ReadOnly, "image is open read-only"));
        }
        self.check_health(operation)
    }

    /// Whether flushes and writes may succeed.
    pub(crate) fn check_health(&self, operation: Operation) -> Result<()> {
        if !self.health.ill.load(Ordering::Acquire) {
            return Ok(());
        }
        match &*lock(&self.health.reason) {
            Some(illness) => Err(self.error(operation, illness.kind, illness.detail.clone())),
            None => Ok(()),
        }
    }

    /// Whether reads may be answered.
    pub(crate) fn check_readable(&self, operation: Operation) -> Result<()> {
        if !self.health.ill.load(Ordering::Acquire) {
            return Ok(());
        }
        match &*lock(&self.health.reason) {
            Some(i) if i.ejected => Err(self.error(operation, i.kind, i.detail.clone())),
            _ => Ok(()),
        }
    }

    /// Refuses all further changes; the first reason stays.
    fn fall_ill(&self, kind: ErrorKind, detail: String, ejected: bool) {
        let mut reason = lock(&self.health.reason);
        self.health.ill.store(true, Ordering::Release);
        match &mut *reason {
            Some(old) => old.ejected |= ejected,
            None => *reason = Some(Illness { kind, detail, ejected }),
        }
    }

    /// The handle cannot be used any more after a failed write of metadata: what the file holds
    /// is not known.
    pub(crate) fn fail_sticky(&self, what: &str, error: Error) -> Error {
        tracing::error!(image = %self.name, %error, "{what} failed; no further writes");
        self.fall_ill(ErrorKind::Sticky, format!("{what} failed before: {error}"), false);
        error
    }

    /// Nothing can be read any more either.
    pub(crate) fn eject(&self, error: &Error) {
        self.fall_ill(ErrorKind::Sticky, format!("emptying failed before: {error}"), true);
    }

    pub(crate) fn mark_closed(&self) {
        self.fall_ill(ErrorKind::Shutdown, "image is closed".into(), false);
    }

    /// Notes that the contents contradict the format: sets the corrupt bit, refuses all further
    /// writes, and returns the error for the request that met it.
    pub(crate) async fn corrupt(
        &self,
        operation: Operation,
        offset: u64,
        len: u64,
        what: impl Into<String>,
    ) -> Error {
        let what = what.into();
        let error = self.error(operation, ErrorKind::Corrupt, what.clone()).at(offset, len);
        if self.read_only {
            return error;
        }
        tracing::error!(image = %self.name, %error, "image is corrupt; no further writes");
        self.fall_ill(ErrorKind::Corrupt, format!("image is corrupt: {what}"), false);
        if self.g.version >= 3 {
            let _io = self.header_io.lock().await;
            let bits = {
                let mut header = lock(&self.header);
                header.incompatible |= incompatible::CORRUPT;
                header.incompatible
            };
            let data = Bytes::copy_from_slice(&bits.to_be_bytes());
            if let Err(error) = self.file.write(field::INCOMPATIBLE, data).await {
                tracing::error!(image = %self.name, %error, "setting the corrupt bit failed");
            }
        }
        error
    }

    /// Writes metadata that is in use; a failure makes the handle refuse further writes.
    pub(crate) async fn write_live(&self, what: &str, offset: u64, data: Bytes) -> Result<()> {
        match self.file.write(offset, data).await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.fail_sticky(what, error)),
        }
    }

    /// Everything that was written before this call is on stable storage when it returns. Calls
    /// that overlap share flushes. A failure is sticky.
    pub(crate) async fn barrier(&self) -> Result<()> {
        let ticket = self.flusher.requested.fetch_add(1, Ordering::AcqRel) + 1;
        let mut served = self.flusher.served.lock().await;
        if *served >= ticket {
            return Ok(());
        }
        self.check_health(Operation::Flush)?;
        let upto = self.flusher.requested.load(Ordering::Acquire);
        match self.file.flush(FlushLevel::Durable).await {
            Ok(()) => {
                *served = upto;
                Ok(())
            }
            Err(error) => Err(self.fail_sticky("durable flush", error)),
        }
    }

    /// A barrier, if the order on stable storage matters for this image.
    pub(crate) async fn order(&self) -> Result<()> {
        if self.ordered { self.barrier().await } else { Ok(()) }
    }

    /// A durable flush on behalf of the user: also drops the references that waited for one.
    pub(crate) async fn flush_durable(&self) -> Result<()> {
        if self.read_only {
            return self.file.flush(FlushLevel::Durable).await;
        }
        self.check_health(Operation::Flush)?;
        let waiting = std::mem::take(&mut *lock(&self.deferred));
        self.barrier().await?;
        self.release(waiting.recycle, false).await?;
        self.release(waiting.punch, true).await
    }
}

/// Locks memory; no code that can panic runs under such a lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
