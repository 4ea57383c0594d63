//! Zeroes, discards and the block status.

use super::*;

pub(super) async fn zeroes_of_every_kind_read_as_zeroes<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    for bits in 0..8 {
        let flags = ZeroFlags { fua: bits & 1 != 0, may_unmap: bits & 2 != 0, fast: bits & 4 != 0 };
        let (device, mut content) = subject.filled(400_000, 20 + bits).await?;
        let block = block_size(&*device);
        let size = device.size();
        for (offset, len) in
            [(0, 1), (1, 510), (4096, 4096), (10_000, 70_000), (131_072, 131_072), (size - 1, 1)]
        {
            let offset = offset - offset % block;
            let len = u64::next_multiple_of(len, block).min(size - offset);
            match device.write_zeroes(offset, len, flags).await {
                Ok(()) => content[offset as usize..][..len as usize].fill(0),
                Err(error) if flags.fast && error.kind() == ErrorKind::Unsupported => {
                    check_error(&error, "a refused fast zeroing")?;
                }
                Err(error) => return Err(format!("write zeroes ({flags:?}) failed: {error}")),
            }
            let after = format!("zeroing {len} bytes at {offset} ({flags:?})");
            expect_content(&*device, &content, &after).await?;
        }
        let data = pattern(30, (4 * block).min(size) as usize);
        write(&*device, 0, &data).await?;
        expect_range(&*device, 0, &data, "writing over zeroes").await?;
    }
    Ok(())
}

pub(super) async fn discarded_ranges_read_as_before_or_zero<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    let (device, content) = subject.filled(400_000, 40).await?;
    let block = block_size(&*device);
    let size = device.size();
    let mut discarded = vec![false; content.len()];
    for (offset, len) in [(0, 1), (4000, 9000), (131_072, 131_072), (size - 100, 100)] {
        let offset = offset - offset % block;
        let len = u64::next_multiple_of(len, block).min(size - offset);
        let result = device.discard(offset, len).await;
        result.map_err(|error| format!("a discard failed: {error}"))?;
        discarded[offset as usize..][..len as usize].fill(true);
    }
    let found = read(&*device, 0, content.len()).await?;
    for (at, &byte) in found.iter().enumerate() {
        let allowed = byte == content[at] || (discarded[at] && byte == 0);
        ensure!(
            allowed,
            "after discards the byte at {at} is {byte:#04x}, not {:#04x}",
            content[at]
        );
    }
    Ok(())
}

pub(super) async fn the_block_status_is_true<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let device = subject.device(1_000_000).await?;
    let block = block_size(&*device);
    check_status(&*device, 1 << 30).await?;
    for (offset, len) in [(0, 5000), (200_000, 70_000), (999_000, 1000)] {
        let offset = offset - offset % block;
        let len = u64::next_multiple_of(len, block).min(device.size() - offset);
        write(&*device, offset, &pattern(offset, len as usize)).await?;
    }
    for asked in [1 << 30, 131_072, 65_536 + block] {
        check_status(&*device, asked).await?;
    }
    let end = 131_072_u64.next_multiple_of(block);
    for may_unmap in [true, false] {
        let flags = ZeroFlags { may_unmap, ..ZeroFlags::default() };
        zero(&*device, end, end, flags).await?;
        check_status(&*device, 1 << 30).await?;
    }
    let result = device.discard(0, device.size()).await;
    result.map_err(|error| format!("a discard failed: {error}"))?;
    check_status(&*device, 1 << 30).await
}

/// Walks the device with queries of at most `asked` bytes; what is said to be zero must be.
pub(super) async fn check_status(device: &dyn BlockDevice, asked: u64) -> Outcome {
    let size = device.size();
    let mut at = 0;
    while at < size {
        let len = asked.min(size - at);
        let result = device.block_status(at, len).await;
        let status = result.map_err(|error| format!("a block status failed: {error}"))?;
        ensure!(
            (1..=len).contains(&status.len),
            "a block status of {len} bytes at {at} answered for {}",
            status.len
        );
        if status.flags.zero {
            let zeroes = vec![0; status.len as usize];
            expect_range(device, at, &zeroes, &format!("the status \"zero\" at {at}")).await?;
        }
        at += status.len;
    }
    Ok(())
}
