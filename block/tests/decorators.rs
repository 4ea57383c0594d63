//! Faults happen when the plan says so, overlaps are serialised, counters count.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::Duration;

use brep_block::{
    BlockDevice, Count, Counts, ErrorKind, Fault, FlushLevel, Io, Memory, Operation, Part, Rule,
    Serialise, WriteFlags, ZeroFlags, copy_range, is_zero, zeroes,
};
use bytes::Bytes;

const SIZE: u64 = 1 << 20;

fn faulty() -> (Arc<Memory>, Arc<Fault>) {
    let memory = Memory::new("disk", SIZE);
    let fault = Fault::new(Arc::clone(&memory) as Arc<dyn BlockDevice>);
    (memory, fault)
}

fn write(device: &dyn BlockDevice, offset: u64, byte: u8, len: usize) -> Io<'_, ()> {
    device.write(offset, Bytes::from(vec![byte; len]), WriteFlags::default())
}

async fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> Bytes {
    device.read(offset, len).await.unwrap()
}

#[tokio::test]
async fn only_the_nth_operation_of_the_kind_fails() {
    let (memory, fault) = faulty();
    fault.fail(Rule::new(Operation::Write).nth(3).errno(28));
    for round in 1..=5 {
        read(&*fault, 0, 10).await;
        let result = write(&*fault, 0, round, 10).await;
        if round == 3 {
            let error = result.unwrap_err();
            assert_eq!((error.kind(), error.errno()), (ErrorKind::NoSpace, 28));
            assert_eq!((error.offset(), error.length(), error.node()), (0, 10, "disk"));
            assert_eq!(read(&*memory, 0, 1).await, [2][..], "the failed write did something");
        } else {
            result.unwrap();
        }
    }
}

#[tokio::test]
async fn a_rule_for_ever_ends_with_clear() {
    let (_memory, fault) = faulty();
    fault.fail(Rule::new(Operation::Flush).nth(2).forever());
    fault.flush(FlushLevel::Durable).await.unwrap();
    for level in [FlushLevel::Durable, FlushLevel::Process, FlushLevel::Durable] {
        assert_eq!(fault.flush(level).await.unwrap_err().errno(), 5);
    }
    fault.clear();
    fault.flush(FlushLevel::Durable).await.unwrap();
}

#[tokio::test]
async fn a_rule_for_a_range_hits_what_touches_it() {
    let (_memory, fault) = faulty();
    fault.fail(Rule::new(Operation::Read).range(4096..8192).forever());
    read(&*fault, 0, 4096).await;
    read(&*fault, 8192, 4096).await;
    for (offset, len) in [(4095, 2), (5000, 1), (8191, 100), (0, 20_000)] {
        fault.read(offset, len).await.unwrap_err();
    }
    write(&*fault, 4096, 1, 4096).await.unwrap();
}

#[tokio::test]
async fn of_a_short_operation_the_first_half_is_done() {
    let (memory, fault) = faulty();
    fault.short(Rule::new(Operation::Write));
    fault.short(Rule::new(Operation::Read));
    write(&*fault, 0, 7, 100).await.unwrap_err();
    let found = read(&*memory, 0, 100).await;
    assert!(found[..50].iter().all(|&b| b == 7) && is_zero(&found[50..]));
    fault.read(0, 100).await.unwrap_err();
    read(&*fault, 0, 100).await;
}

#[tokio::test]
async fn a_late_failure_comes_after_the_operation() {
    let (memory, fault) = faulty();
    fault.fail_after(Rule::new(Operation::Write));
    write(&*fault, 0, 7, 1).await.unwrap_err();
    assert_eq!(read(&*memory, 0, 1).await, [7][..]);
}

#[tokio::test(start_paused = true)]
async fn a_delay_is_of_tokios_clock() {
    let (_memory, fault) = faulty();
    fault.delay(Rule::new(Operation::Read), Duration::from_secs(3600));
    let before = tokio::time::Instant::now();
    read(&*fault, 0, 1).await;
    assert_eq!(before.elapsed(), Duration::from_secs(3600));
}

#[tokio::test]
async fn what_hangs_goes_on_when_released() {
    let (memory, fault) = faulty();
    let hang = fault.hang(Rule::new(Operation::Write).forever());
    let mut tasks = Vec::new();
    for index in 0..3_u64 {
        let fault = Arc::clone(&fault);
        tasks.push(tokio::spawn(async move { write(&*fault, index, 9, 1).await }));
    }
    hang.reached(3).await;
    assert_eq!(read(&*memory, 0, 3).await, [0; 3][..]);
    fault.clear();
    hang.release();
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    assert_eq!(read(&*memory, 0, 3).await, [9; 3][..]);
}

#[tokio::test]
async fn counters_count_per_kind_and_failures_too() {
    let count = Count::new(Memory::new("disk", SIZE));
    write(&*count, 0, 1, 100).await.unwrap();
    write(&*count, SIZE, 1, 50).await.unwrap_err();
    read(&*count, 0, 7).await;
    count.write_zeroes(0, 4096, ZeroFlags::default()).await.unwrap();
    count.flush(FlushLevel::Durable).await.unwrap();
    assert_eq!(count.of(Operation::Write), Counts { operations: 2, bytes: 150 });
    assert_eq!(count.of(Operation::Read), Counts { operations: 1, bytes: 7 });
    assert_eq!(count.of(Operation::WriteZeroes), Counts { operations: 1, bytes: 4096 });
    assert_eq!(count.of(Operation::Flush), Counts { operations: 1, bytes: 0 });
    assert_eq!(count.of(Operation::Discard), Counts::default());
    count.reset();
    assert_eq!(count.of(Operation::Write), Counts::default());
}

#[tokio::test]
async fn overlapping_writes_happen_in_the_order_of_asking() {
    let (memory, fault) = faulty();
    let serial = Serialise::new(Arc::clone(&fault) as Arc<dyn BlockDevice>);
    let hang = fault.hang(Rule::new(Operation::Write));
    let first = write(&*serial, 0, 1, 100);
    let second = write(&*serial, 50, 2, 100);
    let third = serial.read(0, 10);
    let elsewhere = write(&*serial, 150, 3, 10);
    assert!(matches!(elsewhere, Io::Ready(Ok(()))), "it overlaps nothing");
    hang.reached(1).await;
    assert_eq!(read(&*memory, 0, 150).await, zeroes(150), "the second overtook the first");
    hang.release();
    first.await.unwrap();
    second.await.unwrap();
    assert_eq!(third.await.unwrap(), [1; 10][..]);
    let found = read(&*memory, 0, 150).await;
    assert!(found[..50].iter().all(|&b| b == 1) && found[50..].iter().all(|&b| b == 2));
}

#[tokio::test]
async fn a_dropped_write_keeps_its_range_until_it_has_ended() {
    let (memory, fault) = faulty();
    let serial = Serialise::new(Arc::clone(&fault) as Arc<dyn BlockDevice>);
    let hang = fault.hang(Rule::new(Operation::Write));
    drop(write(&*serial, 0, 1, 100));
    let mut second = pin!(write(&*serial, 0, 2, 100));
    let poll = second.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert!(poll.is_pending(), "the dropped write is still going on");
    hang.release();
    second.await.unwrap();
    tokio::task::yield_now().await;
    assert_eq!(read(&*memory, 0, 1).await, [2][..], "the dropped write came last");
}

#[tokio::test]
async fn what_is_serialised_and_ends_at_once_is_ready() {
    let serial = Serialise::new(Memory::new("disk", SIZE));
    assert!(matches!(write(&*serial, 0, 1, 100), Io::Ready(Ok(()))));
    assert!(matches!(serial.read(0, 100), Io::Ready(Ok(_))));
}

#[tokio::test]
async fn a_copy_skips_what_is_zero_on_both_sides_and_clears_what_is_not() {
    let source = Memory::new("source", SIZE);
    let target = Count::new(Memory::new("target", SIZE));
    write(&*source, 100_000, 5, 50_000).await.unwrap();
    write(&*target, 700_000, 6, 1000).await.unwrap();
    write(&*target, 120_000, 6, 1000).await.unwrap();
    target.reset();
    let copied = copy_range(&*source, &*target, 0, SIZE, 10_000).await.unwrap();
    assert!((50_000..200_000).contains(&copied), "{copied} bytes were copied");
    assert_eq!(target.of(Operation::Write).bytes, copied);
    assert!(target.of(Operation::WriteZeroes).bytes < SIZE / 2);
    let expected = read(&*source, 0, SIZE as usize).await;
    assert!(read(&*target, 0, SIZE as usize).await == expected);
}

#[tokio::test]
async fn a_copy_of_a_part_touches_nothing_else() {
    let source = Memory::new("source", SIZE);
    let target = Memory::new("target", SIZE);
    write(&*source, 0, 5, SIZE as usize).await.unwrap();
    write(&*target, 0, 6, SIZE as usize).await.unwrap();
    assert_eq!(copy_range(&*source, &*target, 333, 100_001, 4096).await.unwrap(), 100_001);
    let found = read(&*target, 0, SIZE as usize).await;
    assert!(found[..333].iter().all(|&b| b == 6) && found[100_334..].iter().all(|&b| b == 6));
    assert!(found[333..100_334].iter().all(|&b| b == 5));
}

#[tokio::test]
async fn a_copy_reports_the_failing_side() {
    let (_memory, fault) = faulty();
    let other = Memory::new("other", SIZE);
    write(&*other, 0, 1, 100_000).await.unwrap();
    fault.fail(Rule::new(Operation::Write).nth(2));
    let error = copy_range(&*other, &*fault, 0, SIZE, 4096).await.unwrap_err();
    assert_eq!((error.node(), error.operation(), error.offset()), ("disk", Operation::Write, 4096));
    let error = copy_range(&*other, &*fault, 1, SIZE, 4096).await.unwrap_err();
    assert_eq!((error.node(), error.kind()), ("other", ErrorKind::InvalidInput));
    let error = copy_range(&*other, &*fault, u64::MAX, 2, 4096).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
}

#[tokio::test]
async fn a_part_reaches_nothing_beyond_itself() {
    let whole = Memory::new("disk", 10_000);
    whole.write(0, vec![7; 10_000].into(), WriteFlags::default()).await.unwrap();
    let part = Part::new(Arc::clone(&whole) as _, 1000, 3000).unwrap();
    part.write(0, vec![1; 3000].into(), WriteFlags::default()).await.unwrap();
    let beyond = part.write(2999, vec![1; 2].into(), WriteFlags::default()).await.unwrap_err();
    assert_eq!(beyond.kind(), ErrorKind::NoSpace);
    assert!(part.read(u64::MAX, 2).await.is_err());
    let data = whole.read(0, 10_000).await.unwrap();
    assert!(data[..1000].iter().chain(&data[4000..]).all(|byte| *byte == 7));
    assert!(data[1000..4000].iter().all(|byte| *byte == 1));
    for (start, size) in [(0, 10_001), (10_001, 0), (u64::MAX, 1), (1, u64::MAX)] {
        assert!(Part::new(Arc::clone(&whole) as _, start, size).is_err(), "{start} {size}");
    }
}
