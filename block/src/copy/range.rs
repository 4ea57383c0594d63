use crate::{BlockDevice, Result, WriteFlags, ZeroFlags};

/// Copies a range from one device to the same place on another. Returns how many bytes were
/// read and written; the rest was zero.
///
/// What reads as zeroes on both sides is skipped, what does so on the source only is zeroed on
/// the target (space may be given back). Nothing is flushed. At most `buffer_max` bytes are held
/// at a time (at least one block of the devices). The range must not change meanwhile: whoever
/// cannot promise that holds a lock on it.
///
/// # Errors
/// The first failure of either device; the target then holds a part of the range.
pub async fn copy_range(
    source: &dyn BlockDevice,
    target: &dyn BlockDevice,
    offset: u64,
    len: u64,
    buffer_max: usize,
) -> Result<u64> {
    source.check_range(crate::Operation::Read, offset, len)?;
    let piece_max = piece_max(source, target, buffer_max);
    let end = offset + len;
    let (mut at, mut copied) = (offset, 0);
    while at < end {
        let status = source.block_status(at, end - at).await?;
        // A device that claims more than was asked, or nothing, must not lead us astray.
        let extent_end = at + status.len.clamp(1, end - at);
        if status.flags.zero {
            zero_range(target, at, extent_end).await?;
            at = extent_end;
            continue;
        }
        while at < extent_end {
            // Up to a multiple of the piece, so that the next one starts aligned.
            let piece = (piece_max - at % piece_max).min(extent_end - at);
            let data = source.read(at, piece as usize).await?;
            target.write(at, data, WriteFlags::default()).await?;
            at += piece;
            copied += piece;
        }
    }
    Ok(copied)
}

/// The longest transfer that both devices take, in whole blocks of both.
fn piece_max(source: &dyn BlockDevice, target: &dyn BlockDevice, buffer_max: usize) -> u64 {
    let (from, to) = (source.limits(), target.limits());
    let longest = (buffer_max as u64).min(from.transfer_max.into()).min(to.transfer_max.into());
    let block = u64::from(from.block_size.max(to.block_size).max(1));
    (longest - longest % block).max(block)
}

/// Zeroes what does not read as zeroes already; space may be given back.
pub(super) async fn zero_range(target: &dyn BlockDevice, start: u64, end: u64) -> Result<()> {
    let mut at = start;
    while at < end {
        // Beyond the end of a target that grows there is nothing to ask.
        let known = target.size().min(end).saturating_sub(at);
        let (len, zero) = if known == 0 {
            (end - at, false)
        } else {
            let status = target.block_status(at, known).await?;
            (status.len.clamp(1, known), status.flags.zero)
        };
        if !zero {
            let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
            target.write_zeroes(at, len, flags).await?;
        }
        at += len;
    }
    Ok(())
}
