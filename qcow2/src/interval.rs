//! Sets of cluster indexes, kept as intervals.

use std::collections::BTreeMap;
use std::ops::Range;

/// A set of numbers; memory grows with the number of separate intervals.
#[derive(Debug, Clone, Default)]
pub(crate) struct IntervalSet {
    /// Start to end; neither empty nor touching.
    spans: BTreeMap<u64, u64>,
    len: u64,
}

impl IntervalSet {
    /// How many numbers are in the set.
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.len == 0
    }

    pub(crate) fn intervals(&self) -> usize {
        self.spans.len()
    }

    pub(crate) fn iter(&self) -> impl DoubleEndedIterator<Item = Range<u64>> + '_ {
        self.spans.iter().map(|(&start, &end)| start..end)
    }

    pub(crate) fn first(&self) -> Option<Range<u64>> {
        self.spans.first_key_value().map(|(&start, &end)| start..end)
    }

    pub(crate) fn last(&self) -> Option<Range<u64>> {
        self.spans.last_key_value().map(|(&start, &end)| start..end)
    }

    pub(crate) fn clear(&mut self) {
        self.spans.clear();
        self.len = 0;
    }

    pub(crate) fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        if let Some((&s, &e)) = self.spans.range(..=start).next_back()
            && e >= start
        {
            start = s;
            end = end.max(e);
            self.spans.remove(&s);
            self.len -= e - s;
        }
        while let Some((&s, &e)) = self.spans.range(start..=end).next() {
            end = end.max(e);
            self.spans.remove(&s);
            self.len -= e - s;
        }
        self.spans.insert(start, end);
        self.len += end - start;
    }

    pub(crate) fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        if let Some((&s, &e)) = self.spans.range(..range.start).next_back()
            && e > range.start
        {
            self.spans.insert(s, range.start);
            self.len -= e.min(range.end) - range.start;
            if e > range.end {
                self.spans.insert(range.end, e);
                return;
            }
        }
        while let Some((&s, &e)) = self.spans.range(range.clone()).next() {
            self.spans.remove(&s);
            if e > range.end {
                self.spans.insert(range.end, e);
                self.len -= range.end - s;
                return;
            }
            self.len -= e - s;
        }
    }

    #[cfg(test)]
    pub(crate) fn contains(&self, value: u64) -> bool {
        self.spans.range(..=value).next_back().is_some_and(|(_, &end)| end > value)
    }

    /// Takes the lowest numbers out: one run of at most `max`.
    pub(crate) fn take_first(&mut self, max: u64) -> Option<Range<u64>> {
        let first = self.first()?;
        let taken = first.start..first.end.min(first.start.saturating_add(max));
        self.remove(taken.clone());
        Some(taken)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set_of_numbers(
            ops in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 1..60),
        ) {
            let mut set = IntervalSet::default();
            let mut model = BTreeSet::new();
            for (insert, start, len) in ops {
                let range = start..start + len;
                if insert {
                    set.insert(range.clone());
                    model.extend(range);
                } else {
                    set.remove(range.clone());
                    model.retain(|n| !range.contains(n));
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                prop_assert!(set.iter().flatten().eq(model.iter().copied()));
                prop_assert!((0..90).all(|n| set.contains(n) == model.contains(&n)));
                let spans: Vec<_> = set.iter().collect();
                prop_assert!(spans.windows(2).all(|w| w[0].end < w[1].start));
            }
        }
    }
}
