//! What the extents of `base:allocation` say to users of a device.
use brep_block::{BlockStatus, StatusFlags};

use crate::proto::client::Extent;
use crate::proto::wire::AllocationFlags;

/// What is always a safe answer.
pub(super) const DATA: StatusFlags = StatusFlags { data: true, zero: false, allocated: true };

/// Cuts extents to the request, of `asked` bytes, and to whole blocks: a server's own granularity
/// may be finer than the one that it has agreed on. A block that lies in several extents, or of
/// which only a part is known, counts as data. At least one, if `asked` is not 0.
pub(super) fn statuses(extents: &[Extent], asked: u64, block: u64) -> Vec<BlockStatus> {
    let mut found = Vec::with_capacity(extents.len());
    let mut at = 0;
    let mut end = 0_u64;
    let mut add = |from: &mut u64, to: u64, flags| {
        if to > *from {
            found.push(BlockStatus { len: to - *from, flags });
            *from = to;
        }
    };
    for extent in extents {
        let start = end;
        end = end.saturating_add(extent.len).min(asked);
        let begun = (at + block).min(asked);
        if start > at && end >= begun {
            add(&mut at, begun, DATA);
        }
        if start <= at {
            let whole = if end == asked { end } else { end - end % block };
            add(&mut at, whole, flags(extent));
        }
    }
    if at == 0 {
        add(&mut at, block.min(asked), DATA);
    }
    found
}

fn flags(extent: &Extent) -> StatusFlags {
    // Its flags are in the lower half.
    let flags = AllocationFlags(extent.flags as u32);
    StatusFlags {
        data: !flags.contains(AllocationFlags::HOLE),
        zero: flags.contains(AllocationFlags::ZERO),
        allocated: true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLE: u64 = 3;

    fn cut(extents: &[(u64, u64)], asked: u64, block: u64) -> Vec<(u64, bool)> {
        let extents: Vec<_> = extents.iter().map(|&(len, flags)| Extent { len, flags }).collect();
        let found = statuses(&extents, asked, block);
        found.iter().map(|status| (status.len, status.flags.zero)).collect()
    }

    #[test]
    fn extents_are_cut_to_the_request_and_to_whole_blocks() {
        let all = |len| vec![(len, true)];
        assert_eq!(cut(&[(100, HOLE)], 60, 1), all(60));
        assert_eq!(cut(&[(u64::MAX, HOLE), (5, 0)], 60, 1), all(60));
        assert_eq!(
            cut(&[(10, HOLE), (20, 0), (40, HOLE)], 60, 1),
            [(10, true), (20, false), (30, true)]
        );
        // Blocks of 8: the one from 8 on is zero in part only, and so is the one from 24 on.
        assert_eq!(
            cut(&[(10, HOLE), (20, 0), (34, HOLE)], 64, 8),
            [(8, true), (8, false), (8, false), (8, false), (32, true)]
        );
        // What is shorter than a block, one after the other.
        assert_eq!(
            cut(&[(3, HOLE), (3, 0), (3, HOLE), (55, HOLE)], 64, 8),
            [(8, false), (8, false), (48, true)]
        );
        // The end of a disk that is no whole number of blocks.
        assert_eq!(cut(&[(8, HOLE), (4, HOLE)], 12, 8), [(8, true), (4, true)]);
    }

    #[test]
    fn a_block_that_is_known_in_part_is_data() {
        assert_eq!(cut(&[(4, HOLE)], 64, 8), [(8, false)]);
        assert_eq!(cut(&[], 64, 8), [(8, false)]);
        assert_eq!(cut(&[(4, HOLE)], 4, 8), [(4, true)], "all that was asked for is known");
    }

    /// Against bytes: what is called zero is zero.
    #[test]
    fn nothing_is_called_zero_that_is_not() {
        let mut seed = 7_u64;
        let mut next = |bound: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) % bound
        };
        for _ in 0..2000 {
            let block = 1 << next(5);
            let asked = (1 + next(20)) * block + if next(4) == 0 { next(block) } else { 0 };
            let extents: Vec<(u64, u64)> =
                (0..1 + next(12)).map(|_| (1 + next(40), next(2) * HOLE)).collect();
            let bytes: Vec<bool> =
                extents.iter().flat_map(|&(len, f)| vec![f == HOLE; len as usize]).collect();
            let mut at = 0;
            for (len, zero) in cut(&extents, asked, block) {
                assert!(len > 0 && at + len <= asked);
                assert!((at + len).is_multiple_of(block) || at + len == asked, "{extents:?}");
                let is_zero = |at| bytes.get(at as usize).copied().unwrap_or(false);
                assert!(!zero || (at..at + len).all(is_zero), "{extents:?} {block} {asked}");
                at += len;
            }
            assert!(at > 0);
        }
    }
}
