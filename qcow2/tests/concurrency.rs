//! Many requests at once over a file whose operations take their time in random order.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use brep_block::{BlockDevice, Fault, FlushLevel, Memory, Operation, Rule, WriteFlags, ZeroFlags};
use brep_qcow2::{CheckMode, CreateOptions, MakeEmpty, OpenOptions, Qcow2, check};
use bytes::Bytes;
use common::recorder::{Recorder, Replay};
use common::{Rng, open_with, pattern, read_all};

const SIZE: u64 = 1 << 20;
const TASKS: u64 = 16;

/// Which bytes a task owns. Neighbouring tasks share clusters and sub-clusters; in the second half
/// of the disk each owns whole clusters, so that it can discard them.
fn own_range(rng: &mut Rng, task: u64, cluster: u64) -> (u64, u64, bool) {
    let half = SIZE / 2;
    if rng.below(2) == 0 {
        let slot = rng.below(half / (TASKS * 1000)) * TASKS + task;
        let from = rng.below(400);
        (slot * 1000 + from, 1 + rng.below(1000 - from), false)
    } else {
        let slots = half / cluster;
        let mine = (slots - task % slots).div_ceil(TASKS).max(1);
        let slot = rng.below(mine) * TASKS + task;
        if slot >= slots {
            return (0, 0, true);
        }
        (half + slot * cluster, cluster, true)
    }
}

async fn work(disk: Arc<Qcow2>, seed: u64, task: u64) -> Vec<(u64, Bytes)> {
    let mut rng = Rng::new(seed * 1000 + task);
    let cluster = disk.cluster_size();
    let mut done = Vec::new();
    for _ in 0..24 {
        let (offset, len, whole) = own_range(&mut rng, task, cluster);
        if len == 0 {
            continue;
        }
        let zeroes = Bytes::from(vec![0; len as usize]);
        match rng.below(8) {
            0 if whole => {
                disk.discard(offset, len).await.unwrap();
                done.push((offset, zeroes));
            }
            1 => {
                let flags = ZeroFlags { may_unmap: rng.below(2) == 0, ..ZeroFlags::default() };
                disk.write_zeroes(offset, len, flags).await.unwrap();
                done.push((offset, zeroes));
            }
            2 => disk.flush(FlushLevel::Durable).await.unwrap(),
            3 => {
                disk.block_status(offset, len).await.unwrap();
            }
            4 if task == 0 => {
                disk.release_space(0).await.unwrap();
            }
            _ => {
                let data = Bytes::from(pattern(rng.next(), len as usize));
                disk.write(offset, data.clone(), WriteFlags::default()).await.unwrap();
                assert_eq!(disk.read(offset, len as usize).await.unwrap(), data, "lost at once");
                done.push((offset, data));
            }
        }
    }
    done
}

async fn storm(create: CreateOptions, ordered: bool, seed: u64) {
    let recorder = Recorder::delaying(seed);
    let file: Arc<dyn BlockDevice> = recorder.clone();
    common::create(&file, &create).await;
    let base = pattern(1, SIZE as usize);
    let backing: Arc<dyn BlockDevice> = Memory::new("backing", SIZE);
    backing.write(0, base.clone().into(), WriteFlags::default()).await.unwrap();
    let options = OpenOptions {
        ordered,
        // Two tables only: they are loaded and dropped all the time.
        l2_cache_bytes: 0,
        ..common::over(&backing)
    };
    let disk = open_with(&file, options.clone()).await;
    for round in 0..3 {
        let mut model = base.clone();
        let tasks: Vec<_> = (0..TASKS)
            .map(|task| tokio::spawn(work(disk.clone(), seed * 10 + round, task)))
            .collect();
        for task in tasks {
            for (offset, data) in task.await.unwrap() {
                model[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
            }
        }
        assert!(read_all(&*disk).await == model, "contents differ, seed {seed}, {create:?}");
        if round < 2 {
            let how = if seed.is_multiple_of(2) { MakeEmpty::Keep } else { MakeEmpty::Release };
            disk.make_empty(how).await.unwrap();
            assert!(read_all(&*disk).await == base);
        } else {
            disk.close().await.unwrap();
            let report = check(&file, CheckMode::Report).await.unwrap();
            assert!(report.is_clean(), "{report:?}");
            let again = open_with(&file, options.clone()).await;
            assert!(read_all(&*again).await == model, "after reopening");
        }
    }
    let events = recorder.events();
    let mut replay = Replay::default();
    let stride = events.len() / 5 + 1;
    for (i, event) in events.iter().enumerate() {
        replay.apply(event);
        if i % stride == stride - 1 {
            let file = replay.file().await;
            let dirty = file.read(79, 1).await.unwrap()[0] & 1 == 1;
            let report = check(&file, CheckMode::Report).await.unwrap();
            assert!(dirty || report.corruptions == 0, "killed at event {i}: {report:?}");
        }
    }
}

#[tokio::test]
async fn requests_that_share_clusters_do_not_lose_each_others_data() {
    let tiny = CreateOptions { cluster_bits: 9, refcount_order: 5, ..CreateOptions::new(SIZE) };
    let small = CreateOptions { cluster_bits: 12, ..CreateOptions::new(SIZE) };
    for seed in 0..4 {
        storm(CreateOptions::buffer(SIZE), false, seed).await;
        storm(small.clone(), true, seed).await;
        storm(tiny.clone(), seed % 2 == 0, seed).await;
        storm(CreateOptions::new(SIZE), true, seed).await;
    }
}

#[tokio::test]
async fn two_writes_to_one_new_cluster_both_arrive() {
    for seed in 0..20 {
        let file: Arc<dyn BlockDevice> = Recorder::delaying(seed);
        common::create(&file, &CreateOptions::new(SIZE)).await;
        let disk = open_with(&file, OpenOptions::default()).await;
        let a = disk.write(1000, Bytes::from(vec![1; 3000]), WriteFlags::default());
        let b = disk.write(5000, Bytes::from(vec![2; 3000]), WriteFlags::default());
        let (a, b) = tokio::join!(a, b);
        a.and(b).unwrap();
        assert_eq!(disk.read(1000, 3000).await.unwrap(), vec![1; 3000]);
        assert_eq!(disk.read(5000, 3000).await.unwrap(), vec![2; 3000]);
        assert_eq!(disk.allocated_bytes().await.unwrap(), 65536);
        disk.close().await.unwrap();
        assert!(check(&file, CheckMode::Report).await.unwrap().is_clean());
    }
}

#[tokio::test]
async fn a_request_whose_caller_left_comes_to_its_end() {
    let file: Arc<dyn BlockDevice> = Recorder::delaying(3);
    common::create(&file, &CreateOptions::new(SIZE)).await;
    let disk = open_with(&file, OpenOptions::default()).await;
    for i in 0..16u64 {
        drop(disk.write(i * 65536 + 100, Bytes::from(vec![9; 50]), WriteFlags::default()));
    }
    // Takes its turn behind all of them.
    disk.make_empty(MakeEmpty::Keep).await.unwrap();
    assert!(disk.is_empty().await.unwrap());
    disk.close().await.unwrap();
    assert!(check(&file, CheckMode::Report).await.unwrap().is_clean());
}

#[tokio::test]
async fn a_late_hole_does_not_hit_the_next_owner_of_a_cluster() {
    let file = common::memory();
    let create = CreateOptions { cluster_bits: 12, ..CreateOptions::new(8 << 20) };
    common::create(&file, &create).await;
    let fault = Fault::new(file.clone());
    let options = OpenOptions { ordered: false, ..OpenOptions::default() };
    let disk = open_with(&(fault.clone() as Arc<dyn BlockDevice>), options).await;
    let old = Bytes::from(vec![1; 64 << 10]);
    disk.write(0, old, WriteFlags::default()).await.unwrap();
    let hang = fault.hang(Rule::new(Operation::Discard));
    let discard = tokio::spawn({
        let disk = disk.clone();
        async move { disk.discard(0, 64 << 10).await }
    });
    hang.reached(1).await;
    // More than what has been set aside before.
    let data = pattern(8, 4 << 20);
    for (i, part) in data.chunks(4096).enumerate() {
        let offset = (1 << 20) + i as u64 * 4096;
        disk.write(offset, Bytes::copy_from_slice(part), WriteFlags::default()).await.unwrap();
    }
    hang.release();
    discard.await.unwrap().unwrap();
    assert!(disk.read(1 << 20, 4 << 20).await.unwrap() == data, "a hole in new data");
    disk.close().await.unwrap();
    assert!(check(&file, CheckMode::Report).await.unwrap().is_clean());
}
