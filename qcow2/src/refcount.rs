//! Refcounts inside a refcount block (specification §4), for every width.

/// Reads entry `index` of a block whose entries have `1 << order` bits. 0 beyond its end.
pub(crate) fn get(block: &[u8], order: u32, index: u64) -> u64 {
    if order < 3 {
        let per_byte = 8 >> order;
        let byte = block.get((index / per_byte) as usize).copied().unwrap_or(0);
        let shift = (index % per_byte) << order;
        return u64::from(byte >> shift) & ((1 << (1 << order)) - 1);
    }
    let len = 1usize << (order - 3);
    let bytes = block.get(index as usize * len..(index as usize + 1) * len).unwrap_or_default();
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Writes entry `index`; `value` must fit into the width.
pub(crate) fn set(block: &mut [u8], order: u32, index: u64, value: u64) {
    debug_assert!(value <= max(order));
    if order < 3 {
        let per_byte = 8 >> order;
        let shift = (index % per_byte) << order;
        let mask = (((1u16 << (1 << order)) - 1) as u8) << shift;
        if let Some(byte) = block.get_mut((index / per_byte) as usize) {
            *byte = *byte & !mask | (value as u8) << shift;
        }
        return;
    }
    let len = 1usize << (order - 3);
    if let Some(bytes) = block.get_mut(index as usize * len..(index as usize + 1) * len) {
        bytes.copy_from_slice(&value.to_be_bytes()[8 - len..]);
    }
}

/// The highest count that an entry can hold.
pub(crate) fn max(order: u32) -> u64 {
    u64::MAX >> (64 - (1u32 << order))
}

/// The bytes of a block that the entries `first..=last` occupy.
pub(crate) fn byte_span(order: u32, first: u64, last: u64) -> std::ops::Range<usize> {
    ((first << order) / 8) as usize..(((last + 1) << order).div_ceil(8)) as usize
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_keep_their_counts_at_every_width() {
        for order in 0..=6 {
            let mut block = vec![0u8; 512];
            let entries = (512 * 8) >> order;
            let value = |i: u64| (i * 7 + 1) & max(order);
            (0..entries).for_each(|i| set(&mut block, order, i, value(i)));
            (0..entries).for_each(|i| assert_eq!(get(&block, order, i), value(i), "{order} {i}"));
            set(&mut block, order, 5, 0);
            assert_eq!(get(&block, order, 5), 0);
            assert_eq!(get(&block, order, 4), value(4));
            assert_eq!(get(&block, order, 6), value(6));
        }
    }

    #[test]
    fn low_order_bits_come_first() {
        let mut block = [0u8; 2];
        set(&mut block, 0, 1, 1);
        set(&mut block, 0, 8, 1);
        assert_eq!(block, [0b10, 1]);
    }

    #[test]
    fn spans_cover_their_entries() {
        assert_eq!(byte_span(4, 3, 4), 6..10);
        assert_eq!(byte_span(0, 7, 8), 0..2);
        assert_eq!(byte_span(6, 0, 0), 0..8);
    }
}
