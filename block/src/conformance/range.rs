//! The ends of a device.

use super::*;

/// Ranges that do not lie in a device of `size` bytes, in multiples of `block` where they can be.
fn ranges_beyond(size: u64, block: u64) -> Vec<(u64, u64)> {
    let end = size.next_multiple_of(block);
    let top = u64::MAX - (block - 1);
    vec![
        (end, block),
        (end - block, 2 * block),
        (0, end + block),
        (1 << 40, block),
        (top, block),
        (top - block, 3 * block),
        (i64::MAX as u64 + 1, block),
    ]
}

pub(super) async fn reads_beyond_the_end_fail<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    for size in [10_000, 1 << 16] {
        let device = subject.device(size).await?;
        let block = block_size(&*device);
        let kind = ErrorKind::InvalidInput;
        for (offset, len) in ranges_beyond(device.size(), block) {
            let what = format!("of {len} bytes at {offset} of {}", device.size());
            let read = device.read(offset, len as usize).await;
            expect_error(read, kind, &format!("a read {what}"))?;
            let status = device.block_status(offset, len).await;
            expect_error(status, kind, &format!("a block status {what}"))?;
        }
        let status = device.block_status(block, u64::MAX - (block - 1)).await;
        expect_error(status, kind, "a block status whose end overflows")?;
    }
    Ok(())
}

pub(super) async fn changes_beyond_the_end_fail_and_change_nothing<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    let (device, content) = subject.filled(1 << 16, 11).await?;
    let block = block_size(&*device);
    let growable = device.limits().growable;
    for (offset, len) in ranges_beyond(device.size(), block) {
        // What a growable device takes as growth is another check's.
        if growable && offset.checked_add(len).is_some_and(|end| end <= i64::MAX as u64) {
            continue;
        }
        let what = format!("of {len} bytes at {offset} of {}", device.size());
        let kind = ErrorKind::NoSpace;
        let data = Bytes::from(vec![0xEE; len as usize]);
        let write = device.write(offset, data, WriteFlags::default()).await;
        expect_error(write, kind, &format!("a write {what}"))?;
        let zeroes = device.write_zeroes(offset, len, ZeroFlags::default()).await;
        expect_error(zeroes, kind, &format!("zeroing {what}"))?;
        let discard = device.discard(offset, len).await;
        expect_error(discard, kind, &format!("a discard {what}"))?;
    }
    let all = u64::MAX - (block - 1);
    let zeroes = device.write_zeroes(block, all, ZeroFlags::default()).await;
    expect_error(zeroes, ErrorKind::NoSpace, "zeroing with an end that overflows")?;
    let discard = device.discard(block, all).await;
    expect_error(discard, ErrorKind::NoSpace, "a discard with an end that overflows")?;
    expect_content(&*device, &content, "requests beyond the end").await
}

pub(super) async fn a_growable_device_grows<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let (device, mut content) = subject.filled(5000, 12).await?;
    if !device.limits().growable {
        return Ok(());
    }
    let block = block_size(&*device);
    for (gap, len) in [(0, 100), (3, 4096), (70_000, 1), (0, 300_000)] {
        let offset = (device.size() + gap).next_multiple_of(block);
        let data = pattern(offset, u64::next_multiple_of(len, block) as usize);
        write(&*device, offset, &data).await?;
        content.resize(offset as usize, 0);
        content.extend_from_slice(&data);
        expect_content(&*device, &content, "a write beyond the end").await?;
    }
    for may_unmap in [true, false] {
        let offset = device.size() - block;
        let len = 10_000_u64.next_multiple_of(block);
        zero(&*device, offset, len, ZeroFlags { may_unmap, ..ZeroFlags::default() }).await?;
        content.resize(offset as usize, 0);
        content.resize((offset + len) as usize, 0);
        expect_content(&*device, &content, "zeroing beyond the end").await?;
    }
    let discard = device.discard(device.size(), block).await;
    expect_error(discard, ErrorKind::NoSpace, "a discard beyond the end")
}

pub(super) async fn a_shorter_device_forgets_what_it_lost<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    let unit = subject.options.size_unit.max(1);
    let (device, mut content) = subject.filled(150_000, 13).await?;
    if !subject.options.can_truncate {
        return Ok(());
    }
    for size in [100_001, 300_000, 4097, 4096, 65_536 + 5, 1, 0, 5000] {
        let size = u64::next_multiple_of(size, unit);
        let result = device.truncate(size).await;
        result.map_err(|error| format!("truncate to {size} failed: {error}"))?;
        content.resize(size as usize, 0);
        expect_content(&*device, &content, &format!("truncate to {size}")).await?;
    }
    content = pattern(14, device.size() as usize);
    write(&*device, 0, &content).await?;
    expect_content(&*device, &content, "writing after truncates").await
}
