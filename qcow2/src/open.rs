//! Opening an image.

use std::sync::Arc;

use brep_block::{BlockDevice, Error, ErrorKind, Operation};
use bytes::Bytes;

use crate::alloc::{Allocator, TABLE_MASK};
use crate::check::{CheckMode, check};
use crate::error::{FormatError, OpenError};
use crate::file::File;
use crate::geometry::OFFSET_MASK;
use crate::header::{
    Header, Purpose, V2_LENGTH, decode_table, field, first_cluster_len, incompatible,
};
use crate::image::{Image, Parts, lock};
use crate::map::{L1, Map};
use crate::regions::{Kind, Regions};
use crate::snapshot::{self, LoadError};
use crate::{Qcow2, Snapshot};

/// How an image is opened.
#[derive(Debug, Clone)]
pub struct OpenOptions {
    /// What errors and events call the device.
    pub name: String,
    /// The layer below. The name in the header is never followed.
    pub backing: Option<Arc<dyn BlockDevice>>,
    /// Change nothing, not even bits in the header.
    pub read_only: bool,
    /// Also survive a power loss: order what reaches stable storage, at the price of a durable
    /// flush now and then. Without it, the end of the process loses nothing, but a power loss may
    /// leave an image that has to be repaired, or that is damaged.
    pub ordered: bool,
    /// Open an image that names a backing file although no backing device is given: what is not
    /// allocated then reads as zeroes.
    pub ignore_backing_name: bool,
    /// Memory for L2 tables, in bytes. At least two tables are kept.
    pub l2_cache_bytes: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        OpenOptions {
            name: "qcow2".into(),
            backing: None,
            read_only: false,
            ordered: true,
            ignore_backing_name: false,
            l2_cache_bytes: 32 << 20,
        }
    }
}

/// Reads and decodes the header.
pub(crate) async fn read_header(
    file: &File,
    name: &str,
    purpose: Purpose,
) -> Result<Header, OpenError> {
    let format = |error| OpenError::format(name, error);
    if file.size() < u64::from(V2_LENGTH) {
        return Err(format(FormatError::BadMagic));
    }
    let start = file.read(0, V2_LENGTH as usize).await?;
    let len = first_cluster_len(&start).map_err(format)?;
    let cluster = file.read(0, len).await?;
    Header::decode(&cluster, purpose).map_err(format)
}

pub(crate) async fn open(
    device: Arc<dyn BlockDevice>,
    options: OpenOptions,
) -> Result<Arc<Qcow2>, OpenError> {
    let file = File::new(Arc::clone(&device));
    let name = options.name.clone();
    let format = |error| OpenError::format(&name, error);
    if !options.read_only && file.read_only() {
        let what = "the file is read-only, the image was to be opened for writing";
        return Err(Error::new(Operation::Open, ErrorKind::ReadOnly, &*name, what).into());
    }
    let purpose = if options.read_only { Purpose::ReadOnly } else { Purpose::ReadWrite };
    let mut header = read_header(&file, &name, purpose).await?;
    if let Some(backing) = &header.backing_name
        && options.backing.is_none()
        && !options.ignore_backing_name
    {
        let backing = String::from_utf8_lossy(backing).into_owned();
        return Err(format(FormatError::BackingNotGiven(backing)));
    }
    if header.incompatible & incompatible::DIRTY != 0 && !options.read_only {
        repair_dirty(&device, &name).await?;
        header = read_header(&file, &name, purpose).await?;
    }
    let loaded = snapshot::load(&file, &header).await;
    let (snapshots, snapshot_table_len) = loaded.map_err(|error| match error {
        LoadError::Format(error) => format(error),
        LoadError::Device(error) => OpenError::Device(error),
    })?;
    // The offset is below 2^63 and the table at most 32 MiB: the header was checked.
    let l1_end = header.l1_offset + u64::from(header.l1_entries) * 8;
    if l1_end > file.size() {
        // Read as zeroes it would be an empty disk.
        return Err(format(FormatError::L1BeyondEnd { end: l1_end, file: file.size() }));
    }
    let l1 = file.read(header.l1_offset, header.l1_entries as usize * 8).await?;
    let l1 = L1 { offset: header.l1_offset, entries: decode_table(&l1) };
    let table_len = (header.refcount_table_clusters as usize) << header.geometry.cluster_bits;
    let table = if options.read_only {
        Vec::new()
    } else {
        decode_table(&file.read(header.refcount_table_offset, table_len).await?)
    };
    let (regions, overlap) = find_regions(&header, &l1, &table, &snapshots, snapshot_table_len);
    if let Some(what) = overlap.filter(|_| !options.read_only) {
        return Err(format(FormatError::Overlap(what)));
    }
    let cache_tables = options.l2_cache_bytes >> header.geometry.cluster_bits;
    let alloc = Allocator::new(header.refcount_table_offset, table, &header.geometry);
    let image = Image::new(Parts {
        name: options.name,
        file,
        backing: options.backing,
        read_only: options.read_only,
        ordered: options.ordered,
        header,
        snapshots,
        map: Map::new(l1, cache_tables),
        alloc,
        regions,
    });
    if !image.read_only {
        clear_autoclear(&image).await?;
    }
    Ok(Arc::new(Qcow2::new(image)))
}

/// Bits that say "this part of the image is consistent" must go before somebody who does not
/// keep that part consistent writes.
async fn clear_autoclear(image: &Image) -> Result<(), Error> {
    if image.g.version < 3 || lock(&image.header).autoclear == 0 {
        return Ok(());
    }
    if lock(&image.header).bitmaps().is_some() {
        tracing::warn!(
            image = image.name,
            "the image's persistent bitmaps are outdated from now on"
        );
    }
    image.file.write(field::AUTOCLEAR, Bytes::from_static(&[0; 8])).await?;
    image.order().await?;
    lock(&image.header).autoclear = 0;
    Ok(())
}

/// Refcounts of a dirty image may be wrong: nothing may be allocated before they are right.
async fn repair_dirty(device: &Arc<dyn BlockDevice>, name: &str) -> Result<(), OpenError> {
    tracing::warn!(image = name, "image is dirty; repairing it");
    let failed = |what: String| OpenError::format(name, FormatError::DirtyNotRepaired(what));
    let report = check(device, CheckMode::RepairAll).await?;
    if report.corruptions > 0 || report.check_errors > 0 {
        let first = report.messages.first().cloned().unwrap_or_default();
        return Err(failed(first));
    }
    Ok(())
}

/// Where the metadata lies; also what of it overlaps, apart from single tables.
fn find_regions(
    header: &Header,
    l1: &L1,
    table: &[u64],
    snapshots: &[Snapshot],
    snapshot_table_len: u64,
) -> (Regions, Option<&'static str>) {
    let g = &header.geometry;
    let mut regions = Regions::default();
    let mut overlap = None;
    let mut add = |offset: u64, bytes: u64, kind: Kind| {
        let first = offset >> g.cluster_bits;
        if !regions.insert_fixed(first..first + g.clusters(bytes), kind) {
            overlap = Some(kind.name());
        }
    };
    add(0, 1, Kind::Header);
    add(header.refcount_table_offset, table.len() as u64 * 8, Kind::RefcountTable);
    add(l1.offset, l1.entries.len() as u64 * 8, Kind::L1);
    add(header.snapshots_offset, snapshot_table_len, Kind::SnapshotTable);
    for snapshot in snapshots {
        add(snapshot.l1_offset, u64::from(snapshot.l1_entries) * 8, Kind::InactiveL1);
    }
    if let Some(bitmaps) = header.bitmaps() {
        add(bitmaps.directory_offset, bitmaps.directory_size, Kind::BitmapDirectory);
    }
    let offsets = |words: &[u64], mask: u64| {
        let offsets = words.iter().map(|entry| entry & mask).filter(|offset| *offset != 0);
        offsets.map(|offset| offset >> g.cluster_bits).collect::<Vec<_>>()
    };
    for cluster in offsets(table, TABLE_MASK) {
        regions.insert_table(cluster, Kind::RefcountBlock);
    }
    for cluster in offsets(&l1.entries, OFFSET_MASK) {
        regions.insert_table(cluster, Kind::L2);
    }
    (regions, overlap)
}
