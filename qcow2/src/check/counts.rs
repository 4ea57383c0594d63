//! References per cluster.

use std::collections::BTreeMap;

const PAGE: u64 = 1024;

/// Counts by cluster index; memory grows with the clusters that are counted.
#[derive(Debug, Default)]
pub(super) struct Counts {
    pages: BTreeMap<u64, Box<[u32; PAGE as usize]>>,
}

impl Counts {
    pub(super) fn add(&mut self, cluster: u64, times: u32) {
        let page = self.pages.entry(cluster / PAGE).or_insert_with(|| Box::new([0; PAGE as usize]));
        let count = &mut page[(cluster % PAGE) as usize];
        *count = count.saturating_add(times);
    }

    pub(super) fn get(&self, cluster: u64) -> u64 {
        self.pages.get(&(cluster / PAGE)).map_or(0, |p| u64::from(p[(cluster % PAGE) as usize]))
    }

    pub(super) fn clear(&mut self, cluster: u64) {
        if let Some(page) = self.pages.get_mut(&(cluster / PAGE)) {
            page[(cluster % PAGE) as usize] = 0;
        }
    }

    /// Counted clusters from `from` on, ascending, with their counts.
    pub(super) fn counted(&self, from: u64) -> impl Iterator<Item = (u64, u64)> + '_ {
        let pages = self.pages.range(from / PAGE..);
        let all = pages.flat_map(|(page, counts)| {
            let numbered = (page * PAGE..).zip(counts.iter());
            numbered.filter(|(_, count)| **count != 0).map(|(c, count)| (c, u64::from(*count)))
        });
        all.skip_while(move |(cluster, _)| *cluster < from)
    }

    /// The index after the last counted cluster.
    pub(super) fn end(&self) -> u64 {
        let mut pages = self.pages.iter().rev();
        pages
            .find_map(|(page, counts)| {
                let last = counts.iter().rposition(|count| *count != 0)?;
                Some(page * PAGE + last as u64 + 1)
            })
            .unwrap_or(0)
    }
}
