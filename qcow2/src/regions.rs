//! Where the metadata lies: what no data write may touch (specification §10, overlap checks).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;

/// What a metadata cluster holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Header,
    L1,
    L2,
    RefcountTable,
    RefcountBlock,
    SnapshotTable,
    InactiveL1,
    BitmapDirectory,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Header => "image header",
            Kind::L1 => "active L1 table",
            Kind::L2 => "active L2 table",
            Kind::RefcountTable => "refcount table",
            Kind::RefcountBlock => "refcount block",
            Kind::SnapshotTable => "snapshot table",
            Kind::InactiveL1 => "inactive L1 table",
            Kind::BitmapDirectory => "bitmap directory",
        }
    }
}

/// The metadata clusters of an open image, by cluster index.
#[derive(Debug, Default)]
pub(crate) struct Regions {
    /// Start to (end, kind) of the few long ones; they never overlap each other.
    fixed: BTreeMap<u64, (u64, Kind)>,
    /// L2 tables and refcount blocks.
    tables: HashMap<u64, Kind>,
    /// Tables that something else claims too: they cannot be written safely.
    contested: HashSet<u64>,
}

impl Regions {
    /// Adds a long region. False, and nothing is added, if it overlaps another one.
    #[must_use]
    pub(crate) fn insert_fixed(&mut self, range: Range<u64>, kind: Kind) -> bool {
        if range.is_empty() {
            return true;
        }
        if self.fixed_overlapping(&range).is_some() {
            return false;
        }
        self.fixed.insert(range.start, (range.end, kind));
        true
    }

    pub(crate) fn remove_fixed(&mut self, start: u64) {
        self.fixed.remove(&start);
    }

    /// Adds a table of one cluster. One that overlaps something is remembered as contested.
    pub(crate) fn insert_table(&mut self, cluster: u64, kind: Kind) {
        let fixed = self.fixed_overlapping(&(cluster..cluster.saturating_add(1))).is_some();
        if fixed || self.tables.contains_key(&cluster) {
            self.contested.insert(cluster);
        }
        self.tables.entry(cluster).or_insert(kind);
    }

    pub(crate) fn remove_table(&mut self, cluster: u64) {
        self.tables.remove(&cluster);
        self.contested.remove(&cluster);
    }

    /// Whether the table may be written: it is of this kind, and nothing else claims its place.
    pub(crate) fn is_sole_table(&self, cluster: u64, kind: Kind) -> bool {
        self.tables.get(&cluster) == Some(&kind) && !self.contested.contains(&cluster)
    }

    /// What metadata lies in the range, if any.
    pub(crate) fn find(&self, range: Range<u64>) -> Option<Kind> {
        if let Some(kind) = self.fixed_overlapping(&range) {
            return Some(kind);
        }
        range.into_iter().find_map(|cluster| self.tables.get(&cluster).copied())
    }

    fn fixed_overlapping(&self, range: &Range<u64>) -> Option<Kind> {
        let (_, &(end, kind)) = self.fixed.range(..range.end).next_back()?;
        (end > range.start).then_some(kind)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_that_two_claim_is_not_written() {
        let mut regions = Regions::default();
        assert!(regions.insert_fixed(0..1, Kind::Header));
        assert!(regions.insert_fixed(3..6, Kind::L1));
        assert!(!regions.insert_fixed(5..7, Kind::RefcountTable));
        regions.insert_table(8, Kind::L2);
        assert!(regions.is_sole_table(8, Kind::L2));
        regions.insert_table(8, Kind::RefcountBlock);
        assert!(!regions.is_sole_table(8, Kind::L2));
        regions.insert_table(4, Kind::L2);
        assert!(!regions.is_sole_table(4, Kind::L2));
        assert_eq!(regions.find(1..3), None);
        assert_eq!(regions.find(1..4), Some(Kind::L1));
        assert_eq!(regions.find(6..20), Some(Kind::L2));
    }
}
