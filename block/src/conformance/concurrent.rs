//! Many operations at a time, and operations that nobody waits for.

use std::future::Future;
use std::pin::pin;
use std::task::{Context, Waker};

use super::*;

const WRITERS: u64 = 32;

pub(super) async fn disjoint_writes_do_not_disturb_each_other<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    // Neighbours within one sector, within one page, within one cluster, and whole clusters.
    for len in [48, 512, 4096, 10_000, 65_536] {
        let device = subject.device(WRITERS * len.max(512) + 4096).await?;
        let len = u64::next_multiple_of(len, block_size(&*device)).min(device.size() / WRITERS);
        if !len.is_multiple_of(block_size(&*device)) {
            continue;
        }
        let mut expected = read(&*device, 0, device.size() as usize).await?;
        let mut tasks = Vec::new();
        for index in 0..WRITERS {
            let data = pattern(index + len, len as usize);
            let offset = index * len;
            expected[offset as usize..][..len as usize].copy_from_slice(&data);
            let device = Arc::clone(&device);
            tasks.push(tokio::spawn(async move {
                write(&*device, offset, &data).await?;
                expect_range(&*device, offset, &data, "a write next to others").await
            }));
        }
        finish(tasks).await?;
        let after = format!("{WRITERS} writes of {len} bytes side by side");
        expect_content(&*device, &expected, &after).await?;
    }
    Ok(())
}

pub(super) async fn dropped_operations_stay_within_their_range<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    let (device, old) = subject.filled(300_000, 50).await?;
    let block = block_size(&*device);
    let mut new = old.clone();
    for index in 0..16_u64 {
        let offset = (index * 16_000 + 100).next_multiple_of(block);
        let len = 9000_u64.next_multiple_of(block);
        let data = pattern(60 + index, len as usize);
        new[offset as usize..][..len as usize].copy_from_slice(&data);
        let fua = WriteFlags { fua: index % 2 == 0 };
        poll_once(device.write(offset, Bytes::from(data), fua));
        poll_once(device.read(offset, len as usize));
        poll_once(device.flush(FlushLevel::Durable));
    }
    // A dropped operation may still be going on, but must not harm what follows it elsewhere.
    let last = (270_000_u64).next_multiple_of(block);
    let data = pattern(90, (10_000_u64).next_multiple_of(block) as usize);
    write(&*device, last, &data).await?;
    flush(&*device, FlushLevel::Durable).await?;
    expect_range(&*device, last, &data, "dropped operations elsewhere").await?;
    new[last as usize..][..data.len()].copy_from_slice(&data);
    let found = read(&*device, 0, old.len()).await?;
    for (at, &byte) in found.iter().enumerate() {
        ensure!(
            byte == new[at] || (byte == old[at] && (at as u64) < last),
            "after dropped writes the byte at {at} is {byte:#04x}, neither old nor new"
        );
    }
    Ok(())
}

fn poll_once<T>(io: crate::Io<'_, T>) {
    let mut io = pin!(io);
    let _ = io.as_mut().poll(&mut Context::from_waker(Waker::noop()));
}

pub(super) async fn flushes_and_writes_at_the_same_time_end<
    M: AsyncFn(u64) -> Arc<dyn BlockDevice>,
>(
    subject: &Subject<M>,
) -> Outcome {
    let device = subject.device(WRITERS * 4096).await?;
    let mut tasks = Vec::new();
    for index in 0..WRITERS {
        let device = Arc::clone(&device);
        tasks.push(tokio::spawn(async move {
            for round in 0..3 {
                let data = pattern(index * 3 + round, 4096);
                write(&*device, index * 4096, &data).await?;
                let durable = (index + round) % 2 == 0;
                let level = if durable { FlushLevel::Durable } else { FlushLevel::Process };
                flush(&*device, level).await?;
                expect_range(&*device, index * 4096, &data, "a write and a flush").await?;
            }
            Ok(())
        }));
    }
    finish(tasks).await
}

async fn finish(tasks: Vec<tokio::task::JoinHandle<Outcome>>) -> Outcome {
    for task in tasks {
        task.await.map_err(|error| format!("an operation panicked: {error}"))??;
    }
    Ok(())
}
