//! The header and its extensions (specification §1, §2): decoding, limits, encoding.

use bytes::{BufMut, Bytes, BytesMut};

use crate::FormatError;
use crate::geometry::Geometry;

pub(crate) const MAGIC: u32 = 0x5146_49fb;
/// Length of the header that is written for version 3.
pub(crate) const V3_LENGTH: u32 = 112;
pub(crate) const V2_LENGTH: u32 = 72;

/// Refcount table: at most 8 MiB.
pub(crate) const REFCOUNT_TABLE_MAX: u64 = 8 << 20;
/// L1 table: at most 32 MiB.
pub(crate) const L1_ENTRIES_MAX: u64 = (32 << 20) / 8;
pub(crate) const SNAPSHOTS_MAX: u32 = 65536;
const BACKING_NAME_MAX: u64 = 1023;

pub(crate) mod incompatible {
    pub(crate) const DIRTY: u64 = 1;
    pub(crate) const CORRUPT: u64 = 1 << 1;
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    pub(crate) const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Kinds of header extensions that the format defines.
pub mod extension {
    /// Name of the backing file's format.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Persistent bitmaps.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Where the encryption header lies.
    pub const CRYPTO: u32 = 0x0537_be77;
    /// Name of the external data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// Byte offsets of the fields that are written on their own.
pub(crate) mod field {
    pub(crate) const SIZE: u64 = 24;
    pub(crate) const REFCOUNT_TABLE: u64 = 48;
    pub(crate) const INCOMPATIBLE: u64 = 72;
    pub(crate) const AUTOCLEAR: u64 = 88;
    pub(crate) const L1_OFFSET: u64 = 40;
}

/// A decoded header.
#[derive(Debug, Clone)]
pub(crate) struct Header {
    pub(crate) geometry: Geometry,
    pub(crate) size: u64,
    pub(crate) crypt_method: u32,
    pub(crate) l1_entries: u32,
    pub(crate) l1_offset: u64,
    pub(crate) refcount_table_offset: u64,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshots: u32,
    pub(crate) snapshots_offset: u64,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) header_length: u32,
    pub(crate) compression_type: u8,
    /// Bytes of the header beyond the known fields; kept as they are.
    pub(crate) unknown_tail: Bytes,
    /// In file order; unknown ones are kept.
    pub(crate) extensions: Vec<(u32, Bytes)>,
    pub(crate) backing_name: Option<Bytes>,
}

/// For whom the header is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose {
    ReadOnly,
    ReadWrite,
    /// Checking: damage that the check itself reports is let through.
    Check,
}

/// The fields that say how long the first cluster's contents can be.
pub(crate) fn first_cluster_len(start: &[u8]) -> Result<usize, FormatError> {
    let geometry = decode_prefix(start)?;
    Ok(geometry.1)
}

/// Reads magic, version and cluster size.
fn decode_prefix(data: &[u8]) -> Result<(u32, usize), FormatError> {
    if data.len() < V2_LENGTH as usize || u32_at(data, 0) != MAGIC {
        return Err(FormatError::BadMagic);
    }
    let version = u32_at(data, 4);
    if version != 2 && version != 3 {
        return Err(FormatError::UnsupportedVersion(version));
    }
    let bits = u32_at(data, 20);
    if !(9..=21).contains(&bits) {
        return Err(FormatError::UnsupportedClusterSize(bits));
    }
    Ok((version, 1 << bits))
}

impl Header {
    /// Decodes the first cluster, obeying every limit of specification §11.
    pub(crate) fn decode(cluster: &[u8], purpose: Purpose) -> Result<Header, FormatError> {
        let (version, cluster_len) = decode_prefix(cluster)?;
        let cluster_size = cluster_len as u64;
        let header_length = check_header_length(cluster, version, cluster_len)?;
        let backing_offset = u64_at(cluster, 8);
        if backing_offset > cluster_size {
            return Err(FormatError::BackingOffset(backing_offset));
        }
        let v3 = |at: usize| if version >= 3 { u64_at(cluster, at) } else { 0 };
        let (incompatible, compatible, autoclear) = (v3(72), v3(80), v3(88));
        let compression_type = if header_length > 104 { byte_at(cluster, 104) } else { 0 };
        let refcount_order = if version >= 3 { u32_at(cluster, 96) } else { 4 };
        let tail_start = (V3_LENGTH as usize).min(header_length as usize);
        let mut header = Header {
            geometry: Geometry {
                version,
                cluster_bits: u32_at(cluster, 20),
                refcount_order,
                extended_l2: incompatible & incompatible::EXTENDED_L2 != 0,
            },
            size: u64_at(cluster, 24),
            crypt_method: u32_at(cluster, 32),
            l1_entries: u32_at(cluster, 36),
            l1_offset: u64_at(cluster, 40),
            refcount_table_offset: u64_at(cluster, 48),
            refcount_table_clusters: u32_at(cluster, 56),
            snapshots: u32_at(cluster, 60),
            snapshots_offset: u64_at(cluster, 64),
            incompatible,
            compatible,
            autoclear,
            header_length,
            compression_type,
            unknown_tail: Bytes::copy_from_slice(
                cluster.get(tail_start..header_length as usize).unwrap_or_default(),
            ),
            extensions: Vec::new(),
            backing_name: None,
        };
        let ext_end = if backing_offset == 0 { cluster_size } else { backing_offset };
        let extensions = decode_extensions(cluster, header_length as usize, ext_end as usize);
        header.check_features(extensions.as_deref().unwrap_or_default(), purpose)?;
        header.check_tables(purpose)?;
        header.extensions = extensions?;
        header.check_extensions()?;
        header.backing_name = decode_backing_name(cluster, backing_offset)?;
        Ok(header)
    }

    fn check_features(
        &self,
        extensions: &[(u32, Bytes)],
        purpose: Purpose,
    ) -> Result<(), FormatError> {
        let unknown = self.incompatible & !incompatible::KNOWN;
        if unknown != 0 {
            return Err(FormatError::UnsupportedFeatures(feature_names(unknown, extensions)));
        }
        let bit = self.incompatible & incompatible::COMPRESSION != 0;
        if bit != (self.compression_type != 0) {
            return Err(FormatError::CompressionBit(bit));
        }
        if self.compression_type != 0 {
            return Err(FormatError::UnknownCompressionType(self.compression_type));
        }
        if self.incompatible & incompatible::CORRUPT != 0 && purpose == Purpose::ReadWrite {
            return Err(FormatError::MarkedCorrupt);
        }
        if self.geometry.extended_l2 && self.geometry.cluster_bits < 14 {
            return Err(FormatError::SubclusterSize(self.geometry.subcluster_size()));
        }
        if self.geometry.refcount_order > 6 {
            return Err(FormatError::RefcountOrder(self.geometry.refcount_order));
        }
        let has_name = extensions.iter().any(|(kind, _)| *kind == extension::DATA_FILE);
        if self.incompatible & incompatible::DATA_FILE != 0 {
            return Err(FormatError::ExternalDataFile);
        }
        if has_name {
            return Err(FormatError::SuperfluousDataFile);
        }
        if self.crypt_method == 2 && !extensions.iter().any(|(kind, _)| *kind == extension::CRYPTO)
        {
            return Err(FormatError::CryptoExtension("missing CRYPTO header"));
        }
        if self.crypt_method != 0 {
            return Err(FormatError::Encrypted(self.crypt_method));
        }
        Ok(())
    }

    fn check_tables(&self, purpose: Purpose) -> Result<(), FormatError> {
        let g = &self.geometry;
        let bounded = |offset: u64, bytes: u64| {
            g.is_aligned(offset) && offset.checked_add(bytes).is_some_and(|end| end < 1 << 63)
        };
        let table_bytes = u64::from(self.refcount_table_clusters) << g.cluster_bits;
        if self.refcount_table_clusters == 0 && purpose != Purpose::Check {
            return Err(FormatError::NoRefcountTable);
        }
        if table_bytes > REFCOUNT_TABLE_MAX {
            return Err(FormatError::RefcountTableTooLarge(self.refcount_table_clusters));
        }
        if !bounded(self.refcount_table_offset, table_bytes) {
            return Err(FormatError::RefcountTableOffset(self.refcount_table_offset));
        }
        if self.snapshots > SNAPSHOTS_MAX && purpose != Purpose::Check {
            return Err(FormatError::TooManySnapshots(self.snapshots));
        }
        if !bounded(self.snapshots_offset, u64::from(self.snapshots) * 40) {
            return Err(FormatError::SnapshotTableOffset(self.snapshots_offset));
        }
        if u64::from(self.l1_entries) > L1_ENTRIES_MAX {
            return Err(FormatError::L1TooLarge(self.l1_entries));
        }
        if !bounded(self.l1_offset, u64::from(self.l1_entries) * 8) {
            return Err(FormatError::L1Offset(self.l1_offset));
        }
        let need = g.l1_entries(self.size);
        if need > i32::MAX as u64 || self.size > i64::MAX as u64 {
            return Err(FormatError::TooBig(self.size));
        }
        if need > u64::from(self.l1_entries) {
            return Err(FormatError::L1TooSmall { have: self.l1_entries, need });
        }
        Ok(())
    }

    fn check_extensions(&self) -> Result<(), FormatError> {
        for (kind, data) in &self.extensions {
            match *kind {
                extension::BACKING_FORMAT if data.len() >= 16 => {
                    return Err(FormatError::BackingFormatName(data.len()));
                }
                extension::BITMAPS => {
                    BitmapsExtension::decode(data, &self.geometry)?;
                }
                extension::CRYPTO if self.crypt_method != 2 => {
                    return Err(FormatError::CryptoExtension("only with LUKS encryption"));
                }
                _ => {}
            }
        }
        Ok(())
    }

    pub(crate) fn extension(&self, kind: u32) -> Option<&Bytes> {
        self.extensions.iter().find(|(k, _)| *k == kind).map(|(_, data)| data)
    }

    /// The bitmaps extension, if the image says that it is to be trusted.
    pub(crate) fn bitmaps(&self) -> Option<BitmapsExtension> {
        if self.autoclear & 1 == 0 {
            return None;
        }
        BitmapsExtension::decode(self.extension(extension::BITMAPS)?, &self.geometry).ok()
    }

    /// The first bytes of the first cluster: header, extensions, backing name.
    ///
    /// # Errors
    /// They do not fit into a cluster.
    pub(crate) fn encode(&self) -> Result<Bytes, FormatError> {
        let g = &self.geometry;
        let mut ext = BytesMut::new();
        for (kind, data) in &self.extensions {
            let len =
                u32::try_from(data.len()).map_err(|_| FormatError::ExtensionTooLarge(*kind))?;
            ext.put_u32(*kind);
            ext.put_u32(len);
            ext.put_slice(data);
            ext.put_bytes(0, data.len().next_multiple_of(8) - data.len());
        }
        ext.put_u64(0);
        let name_offset = self.header_length as usize + ext.len();
        let name = self.backing_name.clone().unwrap_or_default();
        if name.len() as u64 > BACKING_NAME_MAX {
            return Err(FormatError::BackingNameTooLong(name.len() as u32));
        }
        if name_offset + name.len() > g.cluster_len() {
            return Err(FormatError::InvalidOption(
                "header extensions do not fit into the first cluster".into(),
            ));
        }
        let has_name = self.backing_name.is_some();
        let mut out = BytesMut::with_capacity(name_offset + name.len());
        out.put_u32(MAGIC);
        out.put_u32(g.version);
        out.put_u64(if has_name { name_offset as u64 } else { 0 });
        out.put_u32(name.len() as u32);
        out.put_u32(g.cluster_bits);
        out.put_u64(self.size);
        out.put_u32(self.crypt_method);
        out.put_u32(self.l1_entries);
        out.put_u64(self.l1_offset);
        out.put_u64(self.refcount_table_offset);
        out.put_u32(self.refcount_table_clusters);
        out.put_u32(self.snapshots);
        out.put_u64(self.snapshots_offset);
        if g.version >= 3 {
            out.put_u64(self.incompatible);
            out.put_u64(self.compatible);
            out.put_u64(self.autoclear);
            out.put_u32(g.refcount_order);
            out.put_u32(self.header_length);
            if self.header_length > 104 {
                out.put_u8(self.compression_type);
            }
            out.resize(self.header_length as usize - self.unknown_tail.len(), 0);
            out.put_slice(&self.unknown_tail);
        }
        out.put_slice(&ext);
        out.put_slice(&name);
        Ok(out.freeze())
    }
}

fn check_header_length(
    cluster: &[u8],
    version: u32,
    cluster_len: usize,
) -> Result<u32, FormatError> {
    let length = if version >= 3 { u32_at(cluster, 100) } else { V2_LENGTH };
    if version >= 3 && length < 104 {
        return Err(FormatError::HeaderTooShort(length));
    }
    if length as usize > cluster_len {
        return Err(FormatError::HeaderTooLong(length));
    }
    Ok(length)
}

/// Decodes `start..end`, whose bounds lie inside the cluster.
fn decode_extensions(
    cluster: &[u8],
    start: usize,
    end: usize,
) -> Result<Vec<(u32, Bytes)>, FormatError> {
    let mut extensions = Vec::new();
    let mut rest = cluster.get(start..end).unwrap_or_default();
    while rest.len() >= 8 {
        let (kind, len) = (u32_at(rest, 0), u32_at(rest, 4) as usize);
        if kind == 0 {
            break;
        }
        let data = &rest[8..];
        if len > data.len() {
            return Err(FormatError::ExtensionTooLarge(kind));
        }
        extensions.push((kind, Bytes::copy_from_slice(&data[..len])));
        rest = data.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    Ok(extensions)
}

fn decode_backing_name(cluster: &[u8], offset: u64) -> Result<Option<Bytes>, FormatError> {
    if offset == 0 {
        return Ok(None);
    }
    let len = u32_at(cluster, 16);
    let room = (cluster.len() as u64).saturating_sub(offset);
    if u64::from(len) > room.min(BACKING_NAME_MAX) {
        return Err(FormatError::BackingNameTooLong(len));
    }
    let name = &cluster[offset as usize..offset as usize + len as usize];
    Ok(Some(Bytes::copy_from_slice(name)))
}

/// Names of unknown incompatible bits, from the image's own table where it has them.
fn feature_names(bits: u64, extensions: &[(u32, Bytes)]) -> String {
    let table = extensions.iter().find(|(kind, _)| *kind == extension::FEATURE_NAMES);
    let name = |bit: u32| {
        let entries = table.map(|(_, data)| data.chunks_exact(48)).into_iter().flatten();
        let entry = entries.into_iter().find(|e| e[0] == 0 && u32::from(e[1]) == bit);
        match entry {
            Some(e) => {
                let text = e[2..].split(|b| *b == 0).next().unwrap_or_default();
                String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect()
            }
            None => format!("incompatible bit {bit}"),
        }
    };
    let names: Vec<String> = (0..64).filter(|bit| bits >> bit & 1 == 1).map(name).collect();
    names.join(", ")
}

/// Where the persistent bitmaps are described (specification §6).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BitmapsExtension {
    pub(crate) count: u32,
    pub(crate) directory_size: u64,
    pub(crate) directory_offset: u64,
}

impl BitmapsExtension {
    fn decode(data: &[u8], g: &Geometry) -> Result<Self, FormatError> {
        let bad = |what| Err(FormatError::BitmapsExtension(what));
        if data.len() != 24 {
            return bad("invalid length");
        }
        let this = BitmapsExtension {
            count: u32_at(data, 0),
            directory_size: u64_at(data, 8),
            directory_offset: u64_at(data, 16),
        };
        if u32_at(data, 4) != 0 {
            return bad("reserved field is not zero");
        }
        if this.count == 0 {
            return bad("no bitmaps");
        }
        if this.count > 65535 {
            return bad("too many bitmaps");
        }
        if this.directory_size > 1024 * 65535 || this.directory_size < 24 {
            return bad("invalid directory size");
        }
        if !g.is_aligned(this.directory_offset) || this.directory_offset >= 1 << 56 {
            return bad("invalid directory offset");
        }
        Ok(this)
    }
}

pub(crate) fn byte_at(data: &[u8], at: usize) -> u8 {
    data.get(at).copied().unwrap_or(0)
}

/// Reads a big-endian number; 0 beyond the end, which callers exclude by their length checks.
pub(crate) fn u16_at(data: &[u8], at: usize) -> u16 {
    data.get(at..at + 2).and_then(|b| b.try_into().ok()).map_or(0, u16::from_be_bytes)
}

pub(crate) fn u32_at(data: &[u8], at: usize) -> u32 {
    data.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_be_bytes)
}

pub(crate) fn u64_at(data: &[u8], at: usize) -> u64 {
    data.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_be_bytes)
}

/// A table of big-endian numbers in memory.
pub(crate) fn decode_table(data: &[u8]) -> Vec<u64> {
    data.chunks_exact(8).map(|b| u64_at(b, 0)).collect()
}

/// A table of numbers as it stands in the file.
pub(crate) fn encode_table(words: &[u64]) -> Bytes {
    let mut out = BytesMut::with_capacity(words.len() * 8);
    words.iter().for_each(|w| out.put_u64(*w));
    out.freeze()
}
