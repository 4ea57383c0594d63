//! What an image is: header fields for people and programs, and the header extensions.

use brep_block::{ErrorKind, Operation, Result};
use bytes::Bytes;

use crate::header::incompatible;
use crate::image::{Image, lock};
use crate::{Qcow2, Snapshot};

/// A summary of an open image.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk, in bytes.
    pub virtual_size: u64,
    /// Size of the file, in bytes.
    pub file_size: u64,
    /// In bytes.
    pub cluster_size: u64,
    /// In bytes; the cluster size if there are no sub-clusters.
    pub subcluster_size: u64,
    /// 32 sub-clusters per cluster.
    pub extended_l2: bool,
    /// Width of a refcount.
    pub refcount_bits: u32,
    /// Refcounts may be wrong.
    pub dirty: bool,
    /// Damage was found; the image can only be read or repaired.
    pub corrupt: bool,
    /// Somebody else's lazy refcounts; this crate keeps them exact.
    pub lazy_refcounts: bool,
    /// The backing file that the header names.
    pub backing_name: Option<String>,
    /// The backing file's format that the header names.
    pub backing_format: Option<String>,
    /// Internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// There are persistent bitmaps, but somebody has written who did not keep them.
    pub bitmaps_outdated: bool,
    /// Kind and length in bytes of each header extension.
    pub extensions: Vec<(u32, usize)>,
}

impl Qcow2 {
    /// Cluster size in bytes.
    #[must_use]
    pub fn cluster_size(&self) -> u64 {
        self.image.g.cluster_size()
    }

    /// What is allocated at a time, in bytes; the cluster size if there are no sub-clusters.
    #[must_use]
    pub fn subcluster_size(&self) -> u64 {
        self.image.g.subcluster_size()
    }

    /// Internal snapshots; their contents are kept, but cannot be read here.
    #[must_use]
    pub fn snapshots(&self) -> &[Snapshot] {
        &self.image.snapshots
    }

    /// The backing file that the header names. It is never opened by this crate.
    #[must_use]
    pub fn backing_name(&self) -> Option<String> {
        let header = lock(&self.image.header);
        header.backing_name.as_ref().map(|name| String::from_utf8_lossy(name).into_owned())
    }

    /// The contents of the first header extension of a kind.
    #[must_use]
    pub fn header_extension(&self, kind: u32) -> Option<Bytes> {
        lock(&self.image.header).extension(kind).cloned()
    }

    /// Replaces a header extension, or adds it. The header is rewritten with one write: after a
    /// crash of the process it is the old or the new one. Durable after a durable flush.
    ///
    /// # Errors
    /// The extensions do not fit into the first cluster; or a failure of the file.
    pub async fn set_header_extension(&self, kind: u32, data: Bytes) -> Result<()> {
        self.image.set_header_extension(kind, data).await
    }

    /// A summary of the image.
    #[must_use]
    pub fn info(&self) -> Info {
        let image = &self.image;
        let header = lock(&image.header);
        let format = header.extension(crate::extension::BACKING_FORMAT);
        let text = |bytes: &Bytes| String::from_utf8_lossy(bytes).into_owned();
        Info {
            version: image.g.version,
            virtual_size: image.size(),
            file_size: image.file.size(),
            cluster_size: image.g.cluster_size(),
            subcluster_size: image.g.subcluster_size(),
            extended_l2: image.g.extended_l2,
            refcount_bits: 1 << image.g.refcount_order,
            dirty: header.incompatible & incompatible::DIRTY != 0,
            corrupt: header.incompatible & incompatible::CORRUPT != 0,
            lazy_refcounts: header.compatible & 1 != 0,
            backing_name: header.backing_name.as_ref().map(text),
            backing_format: format.map(text),
            snapshots: image.snapshots.clone(),
            bitmaps_outdated: header.extension(crate::extension::BITMAPS).is_some()
                && header.bitmaps().is_none(),
            extensions: header.extensions.iter().map(|(k, d)| (*k, d.len())).collect(),
        }
    }
}

impl Image {
    async fn set_header_extension(&self, kind: u32, data: Bytes) -> Result<()> {
        self.check_writable(Operation::Control)?;
        let _io = self.header_io.lock().await;
        let mut new = lock(&self.header).clone();
        match new.extensions.iter_mut().find(|(k, _)| *k == kind) {
            Some((_, old)) => *old = data,
            None => new.extensions.push((kind, data)),
        }
        let encoded = new.encode().map_err(|error| {
            self.error(Operation::Control, ErrorKind::InvalidInput, error.to_string())
        })?;
        self.write_live("rewrite of the header", 0, encoded).await?;
        *lock(&self.header) = new;
        Ok(())
    }
}
