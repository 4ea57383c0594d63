//! What follows from the sizes in the header.

/// The sizes that an image is built from. All of them are validated when it is made, so that the
/// arithmetic below cannot overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Geometry {
    pub(crate) version: u32,
    /// 9 to 21.
    pub(crate) cluster_bits: u32,
    /// 0 to 6; a refcount has `1 << refcount_order` bits.
    pub(crate) refcount_order: u32,
    pub(crate) extended_l2: bool,
}

/// Bits 9 to 55: where a host offset stands in an L1 or L2 entry.
pub(crate) const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;
/// Bit 63: the refcount is exactly 1, so the cluster may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;

impl Geometry {
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Cluster size as a buffer length.
    pub(crate) fn cluster_len(&self) -> usize {
        1 << self.cluster_bits
    }

    pub(crate) fn cluster_start(&self, offset: u64) -> u64 {
        offset & !(self.cluster_size() - 1)
    }

    pub(crate) fn in_cluster(&self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    pub(crate) fn is_aligned(&self, offset: u64) -> bool {
        self.in_cluster(offset) == 0
    }

    /// Number of clusters that `bytes` bytes take.
    pub(crate) fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size())
    }

    /// Sub-clusters per cluster; a cluster of a standard image is its own only sub-cluster.
    pub(crate) fn subclusters(&self) -> u32 {
        if self.extended_l2 { 32 } else { 1 }
    }

    pub(crate) fn subcluster_size(&self) -> u64 {
        self.cluster_size() / u64::from(self.subclusters())
    }

    /// The bitmap with a bit for every sub-cluster.
    pub(crate) fn all_subclusters(&self) -> u32 {
        if self.extended_l2 { u32::MAX } else { 1 }
    }

    /// Bits of the sub-clusters that `from..to` (bytes inside one cluster) touches.
    pub(crate) fn touched(&self, from: u64, to: u64) -> u32 {
        if from >= to {
            return 0;
        }
        mask(self.subcluster_of(from), self.subcluster_of(to - 1) + 1)
    }

    /// Bits of the sub-clusters that lie wholly in `from..to` (bytes inside one cluster).
    pub(crate) fn covered(&self, from: u64, to: u64) -> u32 {
        let size = self.subcluster_size();
        let (first, end) = (from.div_ceil(size), to / size);
        if first >= end { 0 } else { mask(first as u32, end as u32) }
    }

    /// The sub-cluster that a byte inside a cluster belongs to.
    pub(crate) fn subcluster_of(&self, in_cluster: u64) -> u32 {
        (in_cluster / self.subcluster_size()) as u32
    }

    /// Bytes per L2 entry.
    pub(crate) fn entry_size(&self) -> u64 {
        if self.extended_l2 { 16 } else { 8 }
    }

    /// 64-bit words per L2 entry.
    pub(crate) fn entry_words(&self) -> usize {
        if self.extended_l2 { 2 } else { 1 }
    }

    pub(crate) fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.entry_size()
    }

    /// Guest bytes that one L2 table maps.
    pub(crate) fn l2_coverage(&self) -> u64 {
        self.cluster_size() * self.l2_entries()
    }

    pub(crate) fn l1_index(&self, guest: u64) -> usize {
        (guest / self.l2_coverage()) as usize
    }

    pub(crate) fn l2_index(&self, guest: u64) -> usize {
        ((guest >> self.cluster_bits) % self.l2_entries()) as usize
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub(crate) fn l1_entries(&self, size: u64) -> u64 {
        size.div_ceil(self.l2_coverage())
    }

    /// Refcounts per refcount block.
    pub(crate) fn block_entries(&self) -> u64 {
        (self.cluster_size() * 8) >> self.refcount_order
    }
}

fn mask(first: u32, end: u32) -> u32 {
    let low = |n: u32| if n >= 32 { u32::MAX } else { (1 << n) - 1 };
    low(end) & !low(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn partly_touched_subclusters_are_touched_but_not_covered() {
        let g = Geometry { version: 3, cluster_bits: 16, refcount_order: 4, extended_l2: true };
        assert_eq!(g.touched(0, 65536), u32::MAX);
        assert_eq!(g.covered(0, 65536), u32::MAX);
        assert_eq!(g.touched(2047, 2049), 0b11);
        assert_eq!(g.covered(2047, 2049), 0);
        assert_eq!(g.covered(1, 6144), 0b110);
        assert_eq!(g.touched(5, 5), 0);
    }
}
