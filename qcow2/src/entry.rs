//! L2 entries (specification §3).
//!
//! A cluster of a standard image is treated as one that has a single sub-cluster, so that both
//! kinds of entries share all code above this module.

use crate::geometry::{COPIED, Geometry, OFFSET_MASK};

const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// The host cluster of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Host {
    None,
    /// A whole cluster at this host offset (bytes).
    Cluster {
        offset: u64,
        /// Nobody else refers to it: it may be written in place.
        copied: bool,
    },
    /// Deflated data.
    Compressed {
        offset: u64,
        /// Upper limit of the length: up to the end of the last 512-byte sector.
        len: u64,
    },
}

/// A decoded L2 entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) host: Host,
    /// Sub-clusters whose data lies in the host cluster. Empty for compressed clusters.
    pub(crate) alloc: u32,
    /// Sub-clusters that read as zeroes.
    pub(crate) zero: u32,
}

/// Why an entry cannot be used.
pub(crate) type BadEntry = &'static str;

/// What an entry in a file turns out to be.
pub(crate) type Decoded = Result<Entry, BadEntry>;

impl Entry {
    pub(crate) const UNALLOCATED: Entry = Entry { host: Host::None, alloc: 0, zero: 0 };

    pub(crate) fn decode(g: &Geometry, word: u64, bitmap: u64) -> Decoded {
        if word & COMPRESSED != 0 {
            let host = decode_compressed(g, word)?;
            if g.extended_l2 && bitmap != 0 {
                return Err("compressed cluster with sub-cluster bits");
            }
            return Ok(Entry { host, alloc: 0, zero: 0 });
        }
        let offset = word & OFFSET_MASK;
        if !g.is_aligned(offset) {
            return Err("data cluster is not aligned");
        }
        let copied = word & COPIED != 0;
        if offset == 0 && copied {
            return Err("data cluster at offset 0");
        }
        let host = if offset == 0 { Host::None } else { Host::Cluster { offset, copied } };
        let (alloc, zero) = if g.extended_l2 {
            (bitmap as u32, (bitmap >> 32) as u32)
        } else if g.version >= 3 && word & ZERO != 0 {
            (0, 1)
        } else {
            (u32::from(offset != 0), 0)
        };
        if alloc & zero != 0 {
            return Err("sub-cluster both allocated and zero");
        }
        if alloc != 0 && offset == 0 {
            return Err("allocated sub-clusters without a host cluster");
        }
        Ok(Entry { host, alloc, zero })
    }

    /// The two words of the entry; the second is unused in standard images. Compressed clusters
    /// are never written, so never encoded.
    pub(crate) fn encode(&self, g: &Geometry) -> (u64, u64) {
        let word = match self.host {
            Host::Cluster { offset, copied } => offset | if copied { COPIED } else { 0 },
            Host::None | Host::Compressed { .. } => 0,
        };
        if g.extended_l2 {
            return (word, u64::from(self.zero) << 32 | u64::from(self.alloc));
        }
        (if self.zero != 0 { word | ZERO } else { word }, 0)
    }

    /// The host cluster, if this entry may write to it in place.
    pub(crate) fn own_host(&self) -> Option<u64> {
        match self.host {
            Host::Cluster { offset, copied: true } => Some(offset),
            _ => None,
        }
    }

    /// The host clusters that this entry holds a reference to, as (first cluster index, count).
    pub(crate) fn references(&self, g: &Geometry) -> Option<(u64, u64)> {
        match self.host {
            Host::None => None,
            Host::Cluster { offset, .. } => Some((offset >> g.cluster_bits, 1)),
            Host::Compressed { offset, len } => {
                let first = offset >> g.cluster_bits;
                let last = (offset + len - 1) >> g.cluster_bits;
                Some((first, last - first + 1))
            }
        }
    }
}

fn decode_compressed(g: &Geometry, word: u64) -> Result<Host, BadEntry> {
    // cluster_bits is 9 to 21, so x is 49 to 61.
    let x = 62 - (g.cluster_bits - 8);
    let offset = word & ((1 << x) - 1);
    let sectors = (word & (COMPRESSED - 1)) >> x;
    if word & COPIED != 0 {
        return Err("compressed cluster marked as writable in place");
    }
    if offset >= 1 << 56 || offset == 0 {
        return Err("compressed cluster at an invalid offset");
    }
    let len = (sectors + 1) * 512 - (offset & 511);
    Ok(Host::Compressed { offset, len })
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: Geometry =
        Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended_l2: false };
    const EXTENDED: Geometry = Geometry { extended_l2: true, ..STANDARD };

    #[test]
    fn entries_survive_encoding() {
        let host = Host::Cluster { offset: 0x50000, copied: true };
        for (g, entry) in [
            (STANDARD, Entry::UNALLOCATED),
            (STANDARD, Entry { host, alloc: 1, zero: 0 }),
            (STANDARD, Entry { host, alloc: 0, zero: 1 }),
            (EXTENDED, Entry { host, alloc: 0xf0, zero: 0x0f }),
            (EXTENDED, Entry { host: Host::None, alloc: 0, zero: u32::MAX }),
        ] {
            let (word, bitmap) = entry.encode(&g);
            assert_eq!(Entry::decode(&g, word, bitmap), Ok(entry));
        }
    }

    #[test]
    fn contradicting_entries_are_refused() {
        assert!(Entry::decode(&EXTENDED, 0x50000 | COPIED, 1 << 32 | 1).is_err());
        assert!(Entry::decode(&EXTENDED, 0, 1).is_err());
        assert!(Entry::decode(&EXTENDED, COMPRESSED | 512, 1).is_err());
        assert!(Entry::decode(&STANDARD, 0x50200 | COPIED, 0).is_err());
        assert!(Entry::decode(&STANDARD, COPIED, 0).is_err());
        assert!(Entry::decode(&STANDARD, COMPRESSED | COPIED | 512, 0).is_err());
    }

    #[test]
    fn a_version_2_image_has_no_zero_flag() {
        let v2 = Geometry { version: 2, ..STANDARD };
        let entry = Entry::decode(&v2, 0x50000 | COPIED | 1, 0);
        assert_eq!(entry.map(|e| (e.alloc, e.zero)), Ok((1, 0)));
    }

    #[test]
    fn compressed_length_ends_with_its_last_sector() {
        let x = 62 - 8;
        let entry = Entry::decode(&STANDARD, COMPRESSED | 2 << x | 1000, 0);
        let host = Host::Compressed { offset: 1000, len: 3 * 512 - (1000 - 512) };
        assert_eq!(entry.map(|e| e.host), Ok(host));
    }
}
