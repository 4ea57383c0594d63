use bytes::Bytes;

/// Zeroes up to this length are slices of one static buffer.
const STATIC_ZEROES_LEN: usize = 1 << 20;

/// Aligned, so that direct I/O takes it as it is.
#[repr(align(4096))]
struct Aligned([u8; STATIC_ZEROES_LEN]);

static STATIC_ZEROES: Aligned = Aligned([0; STATIC_ZEROES_LEN]);

/// `len` bytes of zeroes. Up to 1 MiB this neither allocates nor copies.
#[must_use]
pub fn zeroes(len: usize) -> Bytes {
    match STATIC_ZEROES.0.get(..len) {
        Some(slice) => Bytes::from_static(slice),
        None => Bytes::from(vec![0; len]),
    }
}

/// Whether all bytes are zero. True for an empty buffer.
#[must_use]
pub fn is_zero(data: &[u8]) -> bool {
    // Blocks without an early exit inside become vector instructions.
    let (blocks, rest) = data.as_chunks::<128>();
    blocks.iter().all(|block| block.iter().fold(0, |sum, &byte| sum | byte) == 0)
        && rest.iter().all(|&byte| byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_set_bit_anywhere_is_not_zero() {
        for len in [1, 7, 8, 127, 128, 129, 300] {
            let mut data = vec![0; len];
            assert!(is_zero(&data));
            for index in 0..len {
                data[index] = 0x80;
                assert!(!is_zero(&data), "{index} of {len}");
                data[index] = 0;
            }
        }
        assert!(is_zero(&[]));
    }

    #[test]
    fn zeroes_of_every_length_class_are_zero() {
        for len in [0, 1, 4096, STATIC_ZEROES_LEN, STATIC_ZEROES_LEN + 1] {
            let data = zeroes(len);
            assert_eq!(data.len(), len);
            assert!(is_zero(&data));
        }
        assert_eq!(zeroes(512).as_ptr(), zeroes(4096).as_ptr(), "short ones share memory");
    }
}
