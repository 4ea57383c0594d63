//! `brep image compare`: where two images differ, and by how much.
use std::sync::Arc;

use brep_block::{BlockDevice, FlushLevel, is_zero};
use indicatif::ProgressBar;
use serde_json::json;

use super::{Source, USAGE};
use crate::args::CompareArgs;
use crate::cmd::runtime::current_thread;
use crate::exit::{Failure, Outcome};
use crate::output;

const EQUAL: u8 = 0;
const DIFFERENT: u8 = 1;
const CANNOT_OPEN: u8 = 2;
const CANNOT_READ: u8 = 4;

/// How much is read at a time, in bytes.
const CHUNK_LEN: u64 = 2 << 20;

pub(crate) fn run(args: &CompareArgs) -> Outcome {
    for (image, format) in [(&args.first, args.format), (&args.second, args.second_format)] {
        Source::check(image, format).map_err(|failure| failure.with_code(USAGE))?;
    }
    current_thread()?.block_on(async {
        let open = async |image: &String, format| {
            let opened = Source::open(image, format, true).await;
            opened.map_err(|failure| failure.with_code(CANNOT_OPEN))
        };
        let first = open(&args.first, args.format).await?;
        let second = open(&args.second, args.second_format).await?;
        let comparison =
            compare(&first.device, &second.device, args.strict, output::progress("comparing"))
                .await
                .map_err(|error| Failure::from(error).with_code(CANNOT_READ));
        // Nothing was written: there is nothing in it to go wrong.
        let _ =
            (first.close_to(FlushLevel::Process).await, second.close_to(FlushLevel::Process).await);
        let comparison = comparison?;
        report(args, &comparison)?;
        Ok(if comparison.equal(args.strict) { EQUAL } else { DIFFERENT })
    })
}

/// What a comparison has found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Comparison {
    /// The sizes, in bytes.
    pub(crate) sizes: (u64, u64),
    /// Offset of the first byte that differs.
    pub(crate) first_difference: Option<u64>,
    /// How many bytes differ; what lies beyond the shorter image counts where it is not zero.
    pub(crate) different_bytes: u64,
}

impl Comparison {
    fn equal(&self, strict: bool) -> bool {
        self.different_bytes == 0 && (!strict || self.sizes.0 == self.sizes.1)
    }

    fn note(&mut self, offset: u64, a: &[u8], b: &[u8]) {
        if a == b {
            return;
        }
        let mut different = a.iter().zip(b).enumerate().filter(|(_, (a, b))| a != b);
        if let (None, Some((index, _))) = (self.first_difference, different.clone().next()) {
            self.first_difference = Some(offset + index as u64);
        }
        self.different_bytes += different.by_ref().count() as u64;
    }
}

/// Compares two devices to their ends.
///
/// # Errors
/// If one of them cannot be read.
pub(crate) async fn compare(
    a: &Arc<dyn BlockDevice>,
    b: &Arc<dyn BlockDevice>,
    strict: bool,
    progress: ProgressBar,
) -> brep_block::Result<Comparison> {
    let sizes = (a.size(), b.size());
    let mut found = Comparison { sizes, first_difference: None, different_bytes: 0 };
    if strict && sizes.0 != sizes.1 {
        return Ok(found);
    }
    let (common, end) = (sizes.0.min(sizes.1), sizes.0.max(sizes.1));
    progress.set_length(end);
    let mut offset = 0;
    while offset < common {
        let zero = (zeroes(a, offset, common).await, zeroes(b, offset, common).await);
        let both_zero = zero.0.min(zero.1);
        if both_zero > 0 {
            offset += both_zero;
            progress.set_position(offset);
            continue;
        }
        let len = CHUNK_LEN.min(common - offset);
        let (left, right) = tokio::try_join!(read(a, offset, len), read(b, offset, len))?;
        found.note(offset, &left, &right);
        offset += len;
        progress.set_position(offset);
    }
    let longer = if sizes.0 > sizes.1 { a } else { b };
    while offset < end {
        let zero = zeroes(longer, offset, end).await;
        let len = if zero > 0 { zero } else { CHUNK_LEN.min(end - offset) };
        if zero == 0 {
            let tail = read(longer, offset, len).await?;
            if !is_zero(&tail) {
                found.note(offset, &tail, &vec![0; tail.len()]);
            }
        }
        offset += len;
        progress.set_position(offset);
    }
    progress.finish_and_clear();
    Ok(found)
}

async fn read(
    device: &Arc<dyn BlockDevice>,
    offset: u64,
    len: u64,
) -> brep_block::Result<bytes::Bytes> {
    // At most `CHUNK_LEN`, which fits.
    device.read(offset, len as usize).await
}

/// How many bytes from `offset` on are known to be zero, without reading them. A device that
/// cannot tell is read.
async fn zeroes(device: &Arc<dyn BlockDevice>, offset: u64, end: u64) -> u64 {
    match device.block_status(offset, end - offset).await {
        Ok(status) if status.flags.zero => status.len.min(end - offset),
        _ => 0,
    }
}

fn report(args: &CompareArgs, found: &Comparison) -> Result<(), Failure> {
    if args.json {
        return output::json(&json!({
            "equal": found.equal(args.strict),
            "sizes": [found.sizes.0, found.sizes.1],
            "first-difference": found.first_difference,
            "different-bytes": found.different_bytes,
        }));
    }
    let (a, b) = found.sizes;
    if args.strict && a != b {
        return output::line(&format!("The sizes differ: {a} and {b} bytes."));
    }
    if a != b {
        output::line(&format!("The sizes differ ({a} and {b} bytes); the rest counts as zeroes."))?;
    }
    match found.first_difference {
        None => output::line("The images are equal."),
        Some(offset) => {
            let count = found.different_bytes;
            output::line(&format!(
                "The images differ: first at offset {offset}, {count} bytes in all."
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use brep_block::{Memory, WriteFlags};

    fn memory(contents: &[u8]) -> Arc<dyn BlockDevice> {
        let device = Memory::new("m", contents.len() as u64);
        let data = bytes::Bytes::copy_from_slice(contents);
        current_thread().unwrap().block_on(device.write(0, data, WriteFlags::default())).unwrap();
        device
    }

    fn compared(a: &[u8], b: &[u8], strict: bool) -> Comparison {
        let (a, b) = (memory(a), memory(b));
        let comparing = compare(&a, &b, strict, ProgressBar::hidden());
        current_thread().unwrap().block_on(comparing).unwrap()
    }

    #[test]
    fn the_first_difference_and_their_number_are_found() {
        let a = vec![7; (2 * CHUNK_LEN + 1000) as usize];
        let mut b = a.clone();
        assert!(compared(&a, &b, true).equal(true));
        for index in [CHUNK_LEN - 1, CHUNK_LEN, 2 * CHUNK_LEN + 999] {
            b[index as usize] = 8;
        }
        let found = compared(&a, &b, false);
        assert_eq!(found.first_difference, Some(CHUNK_LEN - 1));
        assert_eq!(found.different_bytes, 3);
    }

    #[test]
    fn a_longer_image_is_equal_as_far_as_it_is_zero() {
        let mut long = vec![1; 1000];
        long.resize(3000, 0);
        assert!(compared(&[1; 1000], &long, false).equal(false));
        assert!(!compared(&[1; 1000], &long, true).equal(true));
        long[2999] = 1;
        for found in [compared(&[1; 1000], &long, false), compared(&long, &[1; 1000], false)] {
            assert_eq!((found.first_difference, found.different_bytes), (Some(2999), 1));
        }
    }
}
