use std::sync::Arc;

use brep_block::{BlockDevice, Error, ErrorKind, Operation, Result};
use bytes::Bytes;

/// Reads at any alignment, by reading the blocks around the range.
pub(crate) async fn read_aligned(device: &dyn BlockDevice, offset: u64, len: u64) -> Result<Bytes> {
    let block = u64::from(device.limits().block_size).max(1);
    let start = offset - offset % block;
    let end = (offset + len).next_multiple_of(block).min(device.size());
    let too_long = |_| {
        Error::new(Operation::Read, ErrorKind::InvalidInput, device.name(), "too long")
            .at(offset, len)
    };
    let (wanted, head) = (
        usize::try_from(len).map_err(too_long)?,
        usize::try_from(offset - start).map_err(too_long)?,
    );
    let data = device.read(start, usize::try_from(end - start).map_err(too_long)?).await?;
    match head.checked_add(wanted) {
        Some(stop) if stop <= data.len() => Ok(data.slice(head..stop)),
        _ => {
            Err(Error::new(Operation::Read, ErrorKind::Io, device.name(), "short read")
                .at(offset, len))
        }
    }
}

pub(crate) fn check_unit(name: &str, unit: u64, source: &dyn BlockDevice) -> Result<()> {
    if !unit.is_power_of_two() || !(512..=1 << 30).contains(&unit) {
        let why = format!("a copy unit of {unit} bytes is no power of two from 512 to 1 GiB");
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    check_block_size(name, source, unit)
}

pub(crate) fn check_target(
    name: &str,
    source: &Arc<dyn BlockDevice>,
    target: &Arc<dyn BlockDevice>,
    unit: u64,
) -> Result<()> {
    if Arc::ptr_eq(source, target) {
        let why = "source and target are the same device".to_owned();
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    // Some formats know whole sectors only.
    let size = source.size();
    if target.size() != size && Some(target.size()) != size.checked_next_multiple_of(512) {
        let why = format!(
            "Source and target image have different sizes ({}: {} bytes, {}: {} bytes)",
            source.name(),
            size,
            target.name(),
            target.size()
        );
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    if target.limits().read_only {
        let why = format!("the target {} is read-only", target.name());
        return Err(control_error(name, ErrorKind::ReadOnly, why));
    }
    check_block_size(name, &**target, unit)
}

fn check_block_size(name: &str, device: &dyn BlockDevice, unit: u64) -> Result<()> {
    let block = u64::from(device.limits().block_size);
    if block > unit {
        let why = format!(
            "a copy unit of {unit} bytes is smaller than the block size of {} ({block} bytes)",
            device.name()
        );
        return Err(control_error(name, ErrorKind::InvalidInput, why));
    }
    Ok(())
}

pub(crate) fn control_error(name: &str, kind: ErrorKind, why: String) -> Error {
    Error::new(Operation::Control, kind, name, why)
}
