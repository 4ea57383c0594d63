use std::ops::Range;

use brep_block::{Error, Operation, is_zero};
use bytes::Bytes;

use crate::epoch::{Epoch, Side};
use crate::filter::Shared;
use crate::target::Target;

/// Most bytes read and written by one call.
const PIECE_BYTES_MAX: u64 = 1 << 20;
/// From this length on it pays to ask for the block status before reading.
const STATUS_BYTES_MIN: u64 = 256 << 10;
/// Most zeroes asked for or written by one call: a multiple of every unit.
const ZERO_BYTES_MAX: u64 = 1 << 30;

/// Which device made a copy fail.
#[derive(Debug, Clone)]
pub(crate) struct CopyFailure {
    /// A read of the source, or a write to the target.
    pub(crate) operation: Operation,
    pub(crate) error: Error,
}

type CopyResult<T> = std::result::Result<T, CopyFailure>;

fn of_source(error: Error) -> CopyFailure {
    CopyFailure { operation: Operation::Read, error }
}

fn of_target(error: Error) -> CopyFailure {
    CopyFailure { operation: Operation::Write, error }
}

/// Copies what is still to copy of some units; the caller holds them exclusively. On failure
/// every unit of the request counts as not copied; what is in the target already does no harm.
pub(crate) async fn copy_units(
    shared: &Shared,
    epoch: &Epoch,
    units: &Range<u64>,
) -> CopyResult<()> {
    let bytes = epoch.unit.bytes_of(units, shared.source.size());
    let result = copy_and_secure(shared, epoch, units, &bytes).await;
    result.map_err(|failure| {
        let nodes = format!(
            "copy of the pre-image from {} to {}",
            shared.source.name(),
            epoch.target.name()
        );
        let len = bytes.end - bytes.start;
        let error = failure.error.within(Operation::Write, &nodes, bytes.start, len);
        shared.counters.failed(&error);
        CopyFailure { error, ..failure }
    })
}

async fn copy_and_secure(
    shared: &Shared,
    epoch: &Epoch,
    units: &Range<u64>,
    bytes: &Range<u64>,
) -> CopyResult<()> {
    #[cfg(feature = "simulation")]
    if units.start % 8 == 3 && brep_block::plant::is(brep_block::plant::Plant::PreImageSkipped) {
        epoch.mark(units);
        return Ok(());
    }
    let mut at = bytes.start;
    let mut copied_units = 0;
    let mut target = Target::new(&*epoch.target, shared.barrier);
    while at < bytes.end {
        let located = epoch.locate(&(at..bytes.end), bytes.end).await;
        let (side, len) = located.map_err(of_target)?;
        if side == Side::Source {
            copy_run(shared, epoch, &mut target, at..at + len).await?;
            copied_units += len.div_ceil(epoch.unit.bytes());
        }
        at += len;
    }
    // Also if nothing was copied now: what a restart found in the target may not be safe yet.
    if let Some(level) = shared.barrier
        && (copied_units > 0 || !epoch.assumes_nothing())
    {
        target.secure(level).await.map_err(of_target)?;
    }
    epoch.mark(units);
    shared.counters.copied(copied_units);
    Ok(())
}

/// Copies a range of which nothing has been copied, in pieces of bounded size.
async fn copy_run(
    shared: &Shared,
    epoch: &Epoch,
    target: &mut Target<'_>,
    run: Range<u64>,
) -> CopyResult<()> {
    let piece_max = piece_bytes_max(shared, epoch);
    let mut at = run.start;
    while at < run.end {
        let left = run.end - at;
        let zeroes =
            if left >= STATUS_BYTES_MIN { known_zeroes(shared, epoch, at, left).await } else { 0 };
        if zeroes > 0 {
            write_zeroes(shared, target, at, zeroes).await?;
            at += zeroes;
        } else {
            let len = left.min(piece_max);
            copy_piece(shared, epoch, target, at, len).await?;
            at += len;
        }
    }
    Ok(())
}

/// How many bytes, in whole units, the source knows to be zero without reading them.
async fn known_zeroes(shared: &Shared, epoch: &Epoch, at: u64, left: u64) -> u64 {
    // Asked in bounded steps too: the cost of an answer may grow with the question.
    let asked = left.min(ZERO_BYTES_MAX);
    match shared.source.block_status(at, asked).await {
        Ok(status) if status.flags.zero && status.len >= asked => asked,
        Ok(status) if status.flags.zero => status.len - status.len % epoch.unit.bytes(),
        // The status is only a hint: reading tells.
        _ => 0,
    }
}

async fn copy_piece(
    shared: &Shared,
    epoch: &Epoch,
    target: &mut Target<'_>,
    at: u64,
    len: u64,
) -> CopyResult<()> {
    let _memory = shared.memory.take(len).await;
    let data = shared.read_source(at, len).await.map_err(of_source)?;
    let unit = usize::try_from(epoch.unit.bytes()).unwrap_or(usize::MAX);
    let mut from = 0;
    while from < data.len() {
        let (zero, end) = zero_run(&data, from, unit);
        let (offset, part) = (at + from as u64, data.slice(from..end));
        if zero {
            write_zeroes(shared, target, offset, part.len() as u64).await?;
        } else {
            let len = part.len() as u64;
            target.write(offset, part).await.map_err(of_target)?;
            shared.counters.wrote_data(len);
        }
        from = end;
    }
    Ok(())
}

async fn write_zeroes(shared: &Shared, target: &Target<'_>, at: u64, len: u64) -> CopyResult<()> {
    target.write_zeroes(at, len).await.map_err(of_target)?;
    shared.counters.wrote_zeroes(len);
    Ok(())
}

/// Whether the units from `from` on are zero or not, and where that changes.
fn zero_run(data: &Bytes, from: usize, unit: usize) -> (bool, usize) {
    let mut end = from;
    let mut zero = None;
    for unit in data[from..].chunks(unit) {
        let this = is_zero(unit);
        if *zero.get_or_insert(this) != this {
            break;
        }
        end += unit.len();
    }
    (zero == Some(true), end)
}

/// A multiple of the unit where the devices allow it, else of what both accept.
fn piece_bytes_max(shared: &Shared, epoch: &Epoch) -> u64 {
    let (source, target) = (shared.source.limits(), epoch.target.limits());
    let max = PIECE_BYTES_MAX.min(source.transfer_max.into()).min(target.transfer_max.into());
    let unit = epoch.unit.bytes();
    let step = if max >= unit { unit } else { source.block_size.max(target.block_size).into() };
    (max - max % step).max(step)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_zero_units_are_joined() {
        let data = Bytes::from([[0u8; 4], [0; 4], [1; 4], [2; 4], [0; 4]].concat());
        assert_eq!(zero_run(&data, 0, 4), (true, 8));
        assert_eq!(zero_run(&data, 8, 4), (false, 16));
        assert_eq!(zero_run(&data, 16, 4), (true, 20));
    }
}
