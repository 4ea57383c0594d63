use crate::{Commit, Epoch, Generation};

/// The lines of writes that a side has come along: the earlier ones, each with the epoch at which
/// it was left, and the present one.
#[derive(Debug, Clone, Copy)]
pub struct Lines<'a> {
    /// Earlier lines, the newest last.
    pub history: &'a [Commit],
    /// The present line.
    pub cur: Option<Generation>,
    /// The highest epoch that was used on it.
    pub epoch: Epoch,
}

/// A point on a side's way: the line's number, and the epoch.
pub type Position = (usize, Epoch);

impl Lines<'_> {
    /// The last epoch of a line, as far as this side has come on it. None: not its line, or one
    /// that is forgotten.
    #[must_use]
    pub fn last_epoch(&self, cur: Generation) -> Option<Epoch> {
        self.find(cur).map(|(_, last)| last)
    }

    /// Whether a line is one of them.
    #[must_use]
    pub fn contains(&self, cur: Generation) -> bool {
        self.find(cur).is_some()
    }

    /// Where a commit lies. None: not on this side's way.
    #[must_use]
    pub fn position(&self, commit: Commit) -> Option<Position> {
        let (line, last) = self.find(commit.cur)?;
        (commit.epoch <= last).then_some((line, commit.epoch))
    }

    /// The last point that both ways have in common.
    #[must_use]
    pub fn common(&self, other: &Lines<'_>) -> Option<Commit> {
        let lines = self.cur.into_iter().chain(self.history.iter().rev().map(|fork| fork.cur));
        lines.into_iter().find_map(|cur| {
            let epoch = self.last_epoch(cur)?.min(other.last_epoch(cur)?);
            Some(Commit { cur, epoch })
        })
    }

    fn find(&self, cur: Generation) -> Option<Position> {
        if self.cur == Some(cur) {
            return Some((self.history.len(), self.epoch));
        }
        let line = self.history.iter().position(|fork| fork.cur == cur)?;
        Some((line, self.history[line].epoch))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_ways_part_where_the_earlier_of_them_left_the_last_line_of_both() {
        let [a, b, c, d] = std::array::from_fn(|_| Generation::random());
        let at = |cur, epoch| Commit { cur, epoch: Epoch(epoch) };
        let history = [at(a, 5), at(b, 9)];
        let me = Lines { history: &history, cur: Some(c), epoch: Epoch(20) };
        let other = [at(a, 5)];
        let other = Lines { history: &other, cur: Some(b), epoch: Epoch(12) };
        assert_eq!(me.common(&other), Some(at(b, 9)));
        assert_eq!(other.common(&me), Some(at(b, 9)));
        let behind = Lines { epoch: Epoch(7), ..other };
        assert_eq!(me.common(&behind), Some(at(b, 7)));
        assert_eq!(me.position(at(b, 10)), None, "left before");
        assert!(me.position(at(a, 5)) < me.position(at(b, 6)));
        let stranger = Lines { history: &[], cur: Some(d), epoch: Epoch(7) };
        assert_eq!(me.common(&stranger), None);
    }
}
