//! Copying ahead of sequential changes, so that few of them wait for a copy.

use std::ops::Range;

/// Streams of changes that are followed at a time.
const STREAMS_MAX: usize = 8;

/// Finds sequential changes, and says how far ahead of them to copy: as far as they have come, up to
/// a limit. So at most as much is copied for nothing as was changed.
#[derive(Debug)]
pub(crate) struct Ahead {
    limit_bytes: u64,
    /// The one that was continued last is the last.
    streams: Vec<Stream>,
}

#[derive(Debug)]
struct Stream {
    /// Where the next change of the stream begins.
    next: u64,
    /// Bytes changed one after the other.
    len: u64,
    /// Everything before this has been changed, or asked for.
    asked: u64,
}

impl Ahead {
    /// Copies up to `limit_bytes` ahead; 0: never.
    pub(crate) fn new(limit_bytes: u64) -> Self {
        Ahead { limit_bytes, streams: Vec::new() }
    }

    /// A change begins. Returns what is to be copied ahead of the stream that it continues: whenever
    /// half of the distance is used up, all of it.
    pub(crate) fn follow(&mut self, bytes: &Range<u64>, size: u64) -> Option<Range<u64>> {
        if self.limit_bytes == 0 {
            return None;
        }
        let known = self.streams.iter().position(|stream| stream.next == bytes.start);
        let mut stream = match known {
            Some(index) => self.streams.remove(index),
            None => Stream { next: bytes.start, len: 0, asked: bytes.start },
        };
        stream.next = bytes.end;
        stream.len += bytes.end - bytes.start;
        stream.asked = stream.asked.max(bytes.end);
        let distance = stream.len.min(self.limit_bytes);
        let end = bytes.end.saturating_add(distance).min(size);
        let is_due = known.is_some() && stream.asked.saturating_sub(bytes.end) < distance / 2;
        let wanted = (is_due && stream.asked < end).then_some(stream.asked..end);
        if wanted.is_some() {
            stream.asked = end;
        }
        if self.streams.len() == STREAMS_MAX {
            self.streams.remove(0);
        }
        self.streams.push(stream);
        wanted
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const K: u64 = 1024;
    const SIZE: u64 = 1 << 30;

    /// What is asked for while `count` changes of `len` bytes follow each other from `start` on.
    fn asked(ahead: &mut Ahead, start: u64, len: u64, count: u64) -> Vec<Range<u64>> {
        let changes = (0..count).map(|i| start + i * len..start + (i + 1) * len);
        changes.filter_map(|bytes| ahead.follow(&bytes, SIZE)).collect()
    }

    #[test]
    fn a_stream_is_asked_for_without_gaps_and_never_further_than_it_has_come() {
        let mut ahead = Ahead::new(64 * K);
        let mut end = 0;
        let mut calls = 0;
        for i in 0..1000 {
            let bytes = i * 4 * K..(i + 1) * 4 * K;
            if let Some(wanted) = ahead.follow(&bytes, SIZE) {
                assert!(wanted.start == end.max(bytes.end), "{wanted:?} after {end}");
                assert!(wanted.end - bytes.end <= bytes.end.min(64 * K));
                end = wanted.end;
                calls += 1;
            }
            assert!(i < 2 || end >= bytes.end, "the stream has caught up");
        }
        assert!(calls < 1000 / 8 + 10, "{calls} calls: half of the distance at a time");
    }

    #[test]
    fn changes_that_do_not_follow_each_other_ask_for_nothing() {
        let mut ahead = Ahead::new(64 * K);
        for i in 0..100 {
            let start = i * 7919 % 100 * 128 * K;
            assert_eq!(ahead.follow(&(start..start + 4 * K), SIZE), None);
        }
        assert!(ahead.streams.len() <= STREAMS_MAX);
    }

    #[test]
    fn streams_are_followed_side_by_side_and_the_one_that_rests_longest_is_forgotten() {
        let mut ahead = Ahead::new(64 * K);
        let start = |stream: u64| stream << 20;
        for step in 0..8 {
            for stream in 0..STREAMS_MAX as u64 {
                let at = start(stream) + step * 4 * K;
                ahead.follow(&(at..at + 4 * K), SIZE);
            }
        }
        assert_eq!(asked(&mut ahead, start(0) + 32 * K, 4 * K, 4).len(), 1, "it went on");
        assert_eq!(asked(&mut ahead, start(99), 4 * K, 1), []);
        assert_eq!(asked(&mut ahead, start(1) + 32 * K, 4 * K, 1), [], "it was forgotten");
    }

    #[test]
    fn nothing_is_asked_for_beyond_the_end_or_if_switched_off() {
        let mut ahead = Ahead::new(64 * K);
        for i in 0..8 {
            let end = SIZE - 32 * K + (i + 1) * 4 * K;
            let wanted = ahead.follow(&(end - 4 * K..end), SIZE);
            assert!(wanted.is_none_or(|wanted| wanted.end <= SIZE && wanted.start < SIZE));
        }
        assert_eq!(asked(&mut Ahead::new(0), 0, 4 * K, 100), []);
    }
}
