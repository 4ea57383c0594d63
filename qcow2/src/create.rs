//! Creating an image.

use std::sync::Arc;

use brep_block::{BlockDevice, FlushLevel, zeroes};
use bytes::Bytes;

use crate::error::{FormatError, OpenError};
use crate::file::File;
use crate::geometry::Geometry;
use crate::growth::{Layout, blocks_of_ones};
use crate::header::{
    Header, L1_ENTRIES_MAX, REFCOUNT_TABLE_MAX, V2_LENGTH, V3_LENGTH, encode_table, extension,
    incompatible,
};

/// What a new image is like.
#[derive(Debug, Clone)]
pub struct CreateOptions {
    /// Virtual size in bytes, a multiple of 512.
    pub size: u64,
    /// Cluster size as a power of two: 9 to 21, with extended L2 entries at least 14.
    pub cluster_bits: u32,
    /// 32 sub-clusters per cluster: what a small write copies becomes smaller.
    pub extended_l2: bool,
    /// 3, or 2 for programs that know no newer one.
    pub version: u32,
    /// Width of a refcount as a power of two: 0 to 6, in version 2 always 4.
    pub refcount_order: u32,
    /// Kind and contents of additional header extensions.
    pub header_extensions: Vec<(u32, Bytes)>,
    /// Written into the header, for other programs; never followed.
    pub backing_name: Option<BackingName>,
}

/// The backing file as the header names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackingName {
    /// File name, at most 1023 bytes.
    pub name: String,
    /// Name of its format, such as `raw` or `qcow2`; at most 15 bytes.
    pub format: String,
}

impl Default for CreateOptions {
    fn default() -> Self {
        CreateOptions {
            size: 0,
            cluster_bits: 16,
            extended_l2: false,
            version: 3,
            refcount_order: 4,
            header_extensions: Vec::new(),
            backing_name: None,
        }
    }
}

impl CreateOptions {
    /// A standard image of `size` bytes.
    #[must_use]
    pub fn new(size: u64) -> Self {
        CreateOptions { size, ..Self::default() }
    }

    /// An image that takes many small writes over a backing device: 64 KiB clusters with
    /// sub-clusters of 2 KiB.
    #[must_use]
    pub fn buffer(size: u64) -> Self {
        CreateOptions { size, extended_l2: true, ..Self::default() }
    }

    fn geometry(&self) -> Result<Geometry, FormatError> {
        let bad = |what: &str| Err(FormatError::InvalidOption(what.to_owned()));
        if self.version != 2 && self.version != 3 {
            return Err(FormatError::UnsupportedVersion(self.version));
        }
        if !(9..=21).contains(&self.cluster_bits) {
            return Err(FormatError::UnsupportedClusterSize(self.cluster_bits));
        }
        if !self.size.is_multiple_of(512) {
            return bad("the size must be a multiple of 512 bytes");
        }
        if self.refcount_order > 6 {
            return Err(FormatError::RefcountOrder(self.refcount_order));
        }
        if self.version == 2 && (self.refcount_order != 4 || self.extended_l2) {
            return bad("version 2 has 16-bit refcounts and no extended L2 entries");
        }
        let g = Geometry {
            version: self.version,
            cluster_bits: self.cluster_bits,
            refcount_order: self.refcount_order,
            extended_l2: self.extended_l2,
        };
        if self.extended_l2 && self.cluster_bits < 14 {
            return Err(FormatError::SubclusterSize(g.subcluster_size()));
        }
        if self.size > i64::MAX as u64 || g.l1_entries(self.size) > L1_ENTRIES_MAX {
            return Err(FormatError::TooBig(self.size));
        }
        Ok(g)
    }
}

pub(crate) async fn create(
    device: &Arc<dyn BlockDevice>,
    options: &CreateOptions,
) -> Result<(), OpenError> {
    let name = device.name();
    let format = |error| OpenError::format(name, error);
    let g = options.geometry().map_err(format)?;
    let bits = g.cluster_bits;
    // The L1 table is never empty, so that it has a place.
    let l1_entries = g.l1_entries(options.size).max(1);
    let l1_clusters = g.clusters(l1_entries * 8);
    let layout = Layout::new(&g, 1 + l1_clusters, 0, 1);
    if layout.table << bits > REFCOUNT_TABLE_MAX {
        return Err(format(FormatError::TooBig(options.size)));
    }
    let table_first = 1;
    let blocks_first = table_first + layout.table;
    let l1_first = blocks_first + layout.blocks;
    let used = l1_first + l1_clusters;
    let header = new_header(options, g, l1_entries as u32, l1_first << bits, layout.table as u32);
    let first = header.encode().map_err(format)?;
    Header::decode(&pad(&first, g.cluster_len()), crate::header::Purpose::ReadWrite)
        .map_err(format)?;

    let file = File::new(Arc::clone(device));
    if file.size() > 0 {
        file.truncate(0).await?;
    }
    let mut table: Vec<u64> = (0..layout.blocks).map(|i| (blocks_first + i) << bits).collect();
    table.resize((layout.table << bits) as usize / 8, 0);
    file.write(table_first << bits, encode_table(&table)).await?;
    let blocks = blocks_of_ones(&g, layout.blocks, used);
    file.write(blocks_first << bits, Bytes::from(blocks)).await?;
    file.write(l1_first << bits, zeroes((l1_clusters << bits) as usize)).await?;
    // Whoever finds a header finds an image.
    file.flush(FlushLevel::Process).await?;
    file.write(0, pad(&first, g.cluster_len())).await?;
    file.flush(FlushLevel::Process).await?;
    Ok(())
}

fn pad(data: &[u8], len: usize) -> Bytes {
    let mut padded = data.to_vec();
    padded.resize(len, 0);
    Bytes::from(padded)
}

fn new_header(
    options: &CreateOptions,
    g: Geometry,
    l1_entries: u32,
    l1_offset: u64,
    table_clusters: u32,
) -> Header {
    let mut extensions = Vec::new();
    if let Some(backing) = &options.backing_name {
        let format = Bytes::copy_from_slice(backing.format.as_bytes());
        extensions.push((extension::BACKING_FORMAT, format));
    }
    extensions.extend(options.header_extensions.iter().cloned());
    let name = options.backing_name.as_ref();
    Header {
        geometry: g,
        size: options.size,
        crypt_method: 0,
        l1_entries,
        l1_offset,
        refcount_table_offset: 1 << g.cluster_bits,
        refcount_table_clusters: table_clusters,
        snapshots: 0,
        snapshots_offset: 0,
        incompatible: if g.extended_l2 { incompatible::EXTENDED_L2 } else { 0 },
        compatible: 0,
        autoclear: 0,
        header_length: if g.version >= 3 { V3_LENGTH } else { V2_LENGTH },
        compression_type: 0,
        unknown_tail: Bytes::new(),
        extensions,
        backing_name: name.map(|b| Bytes::copy_from_slice(b.name.as_bytes())),
    }
}
