//! The plain rules: what is written is read, and what is refused changes nothing.

use super::*;

pub(super) async fn limits_are_sane<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let device = subject.device(1 << 20).await?;
    let limits = device.limits();
    ensure!(!device.name().is_empty(), "the device has no name");
    ensure!(limits.block_size.is_power_of_two(), "block_size is {}", limits.block_size);
    ensure!(limits.preferred_size.is_power_of_two(), "preferred_size is {}", limits.preferred_size);
    ensure!(
        limits.transfer_max >= limits.block_size.max(limits.preferred_size),
        "transfer_max is {}",
        limits.transfer_max
    );
    ensure!(limits == device.limits(), "the limits change");
    Ok(())
}

pub(super) async fn a_read_only_device_refuses_changes<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let device = subject.device(1 << 16).await?;
    let content = read(&*device, 0, 1 << 16).await?;
    let block = block_size(&*device);
    let data = Bytes::from(vec![0xA5; block as usize]);
    let kind = ErrorKind::ReadOnly;
    expect_error(device.write(0, data, WriteFlags::default()).await, kind, "a write")?;
    expect_error(device.write_zeroes(0, block, ZeroFlags::default()).await, kind, "zeroing")?;
    expect_error(device.discard(0, block).await, kind, "a discard")?;
    expect_content(&*device, &content, "refused changes").await?;
    flush(&*device, FlushLevel::Process).await?;
    flush(&*device, FlushLevel::Durable).await
}

pub(super) async fn a_fresh_device_reads_as_zeroes<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    if !subject.options.fresh_is_zero {
        return Ok(());
    }
    let device = subject.device(200_001).await?;
    expect_content(&*device, &vec![0; device.size() as usize], "opening").await
}

pub(super) async fn what_was_written_is_read<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    for size in [1, 511, 512, 513, 4095, 4096, 4097, 65_537, 300_003] {
        let (device, mut content) = subject.filled(size, size).await?;
        let size = device.size();
        let block = block_size(&*device);
        expect_content(&*device, &content, "writing all of it").await?;
        // First, last, and across every kind of boundary.
        for (offset, len) in [(0, 1), (size - 1, 1), (4090, 12), (65_530, 20), (1, 4096), (511, 2)]
        {
            let offset = offset - offset % block;
            let len = u64::max(len, 1).next_multiple_of(block).min(size.saturating_sub(offset));
            if len == 0 {
                continue;
            }
            let data = pattern(offset + 77, len as usize);
            write(&*device, offset, &data).await?;
            content[offset as usize..][..len as usize].copy_from_slice(&data);
            let after = format!("writing {len} bytes at {offset} of {size}");
            expect_range(&*device, offset, &data, &after).await?;
            expect_content(&*device, &content, &after).await?;
        }
    }
    Ok(())
}

pub(super) async fn misaligned_memory_is_written<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let device = subject.device(64 << 10).await?;
    let memory = Bytes::from(pattern(5, (64 << 10) + 4096));
    for skip in [0, 1, 7, 511, 513] {
        let data = memory.slice(skip..skip + (64 << 10));
        let result = device.write(0, data.clone(), WriteFlags::default()).await;
        result.map_err(|error| format!("a write failed: {error}"))?;
        expect_range(&*device, 0, &data, "a write from misaligned memory").await?;
    }
    Ok(())
}

pub(super) async fn durable_writes_are_read<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let (device, mut content) = subject.filled(100_000, 3).await?;
    let block = block_size(&*device);
    for offset in [0, 4096, 99_000 / block * block] {
        let len = (512_u64).next_multiple_of(block).min(device.size() - offset);
        let data = pattern(offset + 9, len as usize);
        write_flags(&*device, offset, &data, WriteFlags { fua: true }).await?;
        content[offset as usize..][..data.len()].copy_from_slice(&data);
    }
    expect_content(&*device, &content, "writes with fua").await
}

pub(super) async fn a_flush_of_either_level_succeeds<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let device = subject.device(1 << 16).await?;
    for level in [FlushLevel::Process, FlushLevel::Durable] {
        flush(&*device, level).await?;
    }
    let content = pattern(8, device.size() as usize);
    write(&*device, 0, &content).await?;
    for level in [FlushLevel::Process, FlushLevel::Durable, FlushLevel::Durable] {
        flush(&*device, level).await?;
        expect_content(&*device, &content, "a flush").await?;
    }
    Ok(())
}

pub(super) async fn a_zero_length_does_nothing<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    let (device, content) = subject.filled(10_000, 4).await?;
    for offset in [0, 4096, device.size()] {
        let say = |error| format!("a zero length at {offset} failed: {error}");
        let data = device.read(offset, 0).await.map_err(say)?;
        ensure!(data.is_empty(), "a read of nothing gave {} bytes", data.len());
        device.write(offset, Bytes::new(), WriteFlags { fua: true }).await.map_err(say)?;
        device.write_zeroes(offset, 0, ZeroFlags::default()).await.map_err(say)?;
        device.discard(offset, 0).await.map_err(say)?;
    }
    expect_content(&*device, &content, "operations of zero length").await
}

pub(super) async fn misaligned_requests_fail_and_change_nothing<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    let (device, content) = subject.filled(1 << 17, 6).await?;
    let block = block_size(&*device);
    if block == 1 {
        return Ok(());
    }
    for (offset, len) in [(1, block), (0, block - 1), (block / 2, block / 2)] {
        let what = format!("a request of {len} bytes at {offset}, against block_size {block},");
        let data = Bytes::from(vec![0xEE; len as usize]);
        let kind = ErrorKind::InvalidInput;
        expect_error(device.read(offset, len as usize).await, kind, &what)?;
        expect_error(device.write(offset, data, WriteFlags::default()).await, kind, &what)?;
    }
    expect_content(&*device, &content, "misaligned requests").await
}

pub(super) async fn transfers_that_are_too_long_fail<M: AsyncFn(u64) -> Arc<dyn BlockDevice>>(
    subject: &Subject<M>,
) -> Outcome {
    /// Beyond this the check would cost too much memory.
    const LEN_MAX: u64 = 64 << 20;
    let limits = subject.device(4096).await?.limits();
    let len = u64::from(limits.transfer_max) + u64::from(limits.block_size);
    if len > LEN_MAX {
        return Ok(());
    }
    let device = subject.device(len).await?;
    let what = format!("a transfer of {len} bytes, against transfer_max {},", limits.transfer_max);
    expect_error(device.read(0, len as usize).await, ErrorKind::InvalidInput, &what)?;
    let write = device.write(0, crate::zeroes(len as usize), WriteFlags::default()).await;
    expect_error(write, ErrorKind::InvalidInput, &what)
}
