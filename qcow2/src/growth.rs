//! Moving the refcount table when it is full (specification §4, §10).

use brep_block::{ErrorKind, Operation, Result};
use bytes::{BufMut, Bytes, BytesMut};

use crate::alloc::Allocator;
use crate::geometry::Geometry;
use crate::header::{REFCOUNT_TABLE_MAX, encode_table, field};
use crate::image::{Image, lock};
use crate::refcount;
use crate::regions::Kind;

/// Sizes of a new refcount structure, in clusters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    pub(crate) blocks: u64,
    pub(crate) table: u64,
}

impl Layout {
    /// The smallest structure that describes `others` clusters from some block boundary on, and
    /// itself, if the table has `entries_before` entries for what lies before that boundary.
    pub(crate) fn new(g: &Geometry, others: u64, entries_before: u64, table_min: u64) -> Layout {
        let mut layout = Layout { blocks: 1, table: table_min.max(1) };
        loop {
            let total = others + layout.blocks + layout.table;
            let blocks = total.div_ceil(g.block_entries());
            let table = g.clusters((entries_before + blocks) * 8).max(table_min);
            if blocks <= layout.blocks && table <= layout.table {
                return layout;
            }
            layout = Layout { blocks: blocks.max(layout.blocks), table: table.max(layout.table) };
        }
    }
}

/// Refcount blocks, as one buffer, that count the first `used` clusters once.
pub(crate) fn blocks_of_ones(g: &Geometry, blocks: u64, used: u64) -> Vec<u8> {
    let mut data = vec![0; (blocks as usize) << g.cluster_bits];
    (0..used).for_each(|i| refcount::set(&mut data, g.refcount_order, i, 1));
    data
}

impl Image {
    /// Makes a larger refcount table behind everything that the old one describes, with blocks
    /// that describe it; switches to it with one write of the header.
    pub(crate) async fn grow_table(&self, alloc: &mut Allocator) -> Result<()> {
        let g = &self.g;
        let old_entries = alloc.table.len() as u64;
        let old_clusters = g.clusters(old_entries * 8);
        let max = REFCOUNT_TABLE_MAX >> g.cluster_bits;
        let comfortable = (old_clusters + old_clusters / 2 + 1).min(max);
        let layout = Layout::new(g, 0, old_entries, comfortable);
        if layout.table > max {
            let what = "the refcount table cannot grow any more";
            return Err(self.error(Operation::Write, ErrorKind::NoSpace, what));
        }
        let base = old_entries * g.block_entries();
        let used = layout.blocks + layout.table;
        self.check_unclaimed(base..base + used).await?;

        let mut table = alloc.table.clone();
        table.extend((0..layout.blocks).map(|i| (base + i) << g.cluster_bits));
        table.resize((layout.table << g.cluster_bits) as usize / 8, 0);
        let table_offset = (base + layout.blocks) << g.cluster_bits;
        let blocks = blocks_of_ones(g, layout.blocks, used);
        self.file.write(base << g.cluster_bits, Bytes::from(blocks)).await?;
        self.file.write(table_offset, encode_table(&table)).await?;
        self.order().await?;
        self.switch_table(table_offset, layout.table as u32).await?;
        self.order().await?;

        let old_first = alloc.table_offset >> g.cluster_bits;
        {
            let mut regions = lock(&self.regions);
            regions.remove_fixed(old_first);
            let start = base + layout.blocks;
            // Cannot fail: the place was unclaimed a moment ago, under the same lock.
            let _ = regions.insert_fixed(start..start + layout.table, Kind::RefcountTable);
            (0..layout.blocks).for_each(|i| regions.insert_table(base + i, Kind::RefcountBlock));
        }
        alloc.table = table;
        alloc.table_offset = table_offset;
        self.touch(base + used);
        let old: Vec<u64> = (old_first..old_first + old_clusters).collect();
        self.release_sorted(alloc, &old, false).await
    }

    async fn switch_table(&self, offset: u64, clusters: u32) -> Result<()> {
        let _io = self.header_io.lock().await;
        let mut data = BytesMut::with_capacity(12);
        data.put_u64(offset);
        data.put_u32(clusters);
        let what = "switch of the refcount table";
        self.write_live(what, field::REFCOUNT_TABLE, data.freeze()).await?;
        let mut header = lock(&self.header);
        header.refcount_table_offset = offset;
        header.refcount_table_clusters = clusters;
        Ok(())
    }
}
