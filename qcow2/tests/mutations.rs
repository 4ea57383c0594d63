//! Damaged images: errors, never a panic, never an endless loop, never unbounded memory.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, FlushLevel, WriteFlags, ZeroFlags};
use brep_qcow2::{CheckMode, CreateOptions, MakeEmpty, OpenOptions, Qcow2, check};
use bytes::Bytes;
use common::recorder::Replay;
use common::{Dir, Rng, create, memory, open, pattern};

const SIZE: u64 = 1 << 20;

/// Whatever happens is fine as long as it comes to an end.
async fn exercise(file: Arc<dyn BlockDevice>, rng: &mut Rng) {
    let read_only = OpenOptions {
        read_only: true,
        ignore_backing_name: true,
        l2_cache_bytes: 1 << 20,
        ..OpenOptions::default()
    };
    let _ = check(&file, CheckMode::Report).await;
    if let Ok(disk) = Qcow2::open(file.clone(), read_only.clone()).await {
        try_everything(&disk, rng).await;
    }
    let writable = OpenOptions { read_only: false, ordered: rng.below(2) == 0, ..read_only };
    if let Ok(disk) = Qcow2::open(file.clone(), writable).await {
        try_everything(&disk, rng).await;
        let how = if rng.below(2) == 0 { MakeEmpty::Keep } else { MakeEmpty::Release };
        let _ = disk.make_empty(how).await;
        try_everything(&disk, rng).await;
        let _ = disk.close().await;
    }
    let _ = check(&file, CheckMode::RepairLeaks).await;
    let _ = check(&file, CheckMode::RepairAll).await;
    if let Ok(report) = check(&file, CheckMode::RepairAll).await {
        assert_eq!(report.corruptions_fixed, 0, "a second repair finds nothing: {report:?}");
    }
}

async fn try_everything(disk: &Qcow2, rng: &mut Rng) {
    let size = disk.size().min(SIZE);
    if size < 4096 {
        return;
    }
    let _ = disk.info();
    let _ = disk.read(0, size as usize).await;
    for _ in 0..6 {
        let offset = rng.below(size - 1);
        let len = 1 + rng.below(100_000.min(size - offset));
        let data = Bytes::from(pattern(1, len as usize));
        let _ = disk.read(offset, len as usize).await;
        let _ = disk.block_status(offset, len).await;
        let _ = disk.write(offset, data, WriteFlags::default()).await;
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        let _ = disk.write_zeroes(rng.below(size - 1), 1, flags).await;
        let _ = disk.discard(offset, len).await;
    }
    let _ = disk.next_allocated(0).await;
    let _ = disk.flush(FlushLevel::Durable).await;
    let _ = disk.release_space(0).await;
}

/// The metadata of an image: header, tables, and where they lie.
fn places(image: &[u8]) -> Vec<(usize, usize)> {
    let word = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    let offset = |at: usize| (word(at) & 0x00ff_ffff_ffff_fe00) as usize;
    let mut places = vec![(0, 120), (112, 200)];
    let (l1, table, snapshots) = (offset(40), offset(48), offset(64));
    places.push((l1, 16));
    places.push((table, 16));
    places.push((offset(table), 64));
    places.push((offset(l1), 128));
    if snapshots != 0 {
        places.push((snapshots, 100));
    }
    places
}

async fn survives_mutations(image: &[u8], seeds: std::ops::Range<u64>) {
    for seed in seeds {
        let mut rng = Rng::new(seed);
        let mut damaged = image.to_vec();
        let places = places(image);
        for _ in 0..1 + rng.below(4) {
            let (start, len) = places[rng.below(places.len() as u64) as usize];
            let at = start + rng.below(len as u64) as usize;
            match rng.below(3) {
                0 => damaged[at] ^= 1 << rng.below(8),
                1 => damaged[at] = rng.next() as u8,
                _ => {
                    let at = at & !7;
                    let interesting = [0, u64::MAX, 1 << 63, 1 << 62, 0x8000_0000_0001_0000, 512];
                    let value: u64 = interesting[rng.below(6) as usize];
                    damaged[at..at + 8].copy_from_slice(&value.to_be_bytes());
                }
            }
        }
        if rng.below(8) == 0 {
            damaged.truncate(rng.below(image.len() as u64) as usize);
        }
        let mut replay = Replay::default();
        replay.apply(&common::recorder::Event::Write(0, damaged.into()));
        let file = replay.file().await;
        let end = tokio::time::timeout(Duration::from_secs(60), exercise(file, &mut rng)).await;
        assert!(end.is_ok(), "seed {seed} does not come to an end");
    }
}

#[tokio::test]
async fn a_damaged_image_of_our_own_is_survived() {
    for options in [
        CreateOptions { cluster_bits: 12, ..CreateOptions::new(SIZE) },
        CreateOptions { cluster_bits: 14, extended_l2: true, ..CreateOptions::new(SIZE) },
    ] {
        let file = memory();
        create(&file, &options).await;
        let disk = open(&file).await;
        let data = Bytes::from(pattern(3, 300_000));
        disk.write(10_000, data, WriteFlags::default()).await.unwrap();
        disk.write_zeroes(500_000, 70_000, ZeroFlags::default()).await.unwrap();
        disk.close().await.unwrap();
        let image = common::read_all(&*file).await;
        survives_mutations(&image, 0..100).await;
    }
}

#[tokio::test]
async fn a_damaged_image_with_compressed_clusters_and_snapshots_is_survived() {
    let dir = Dir::new();
    let mut content = pattern(1, SIZE as usize);
    content[..700_000].fill(5);
    std::fs::write(dir.path("source.raw"), content).unwrap();
    dir.qemu_img("convert -c -f raw -O qcow2 -o cluster_size=4k source.raw d.qcow2");
    dir.qemu_img("snapshot -c s d.qcow2");
    let mut image = std::fs::read(dir.path("d.qcow2")).unwrap();
    image.resize(image.len().next_multiple_of(4096), 0);
    survives_mutations(&image, 0..100).await;
}

#[tokio::test]
async fn a_large_disk_in_a_small_file_costs_little() {
    let file = memory();
    create(&file, &CreateOptions::buffer(16 << 40)).await;
    let options = OpenOptions { ordered: false, ..OpenOptions::default() };
    let disk = Qcow2::open(file.clone(), options).await.unwrap();
    assert!(disk.is_empty().await.unwrap());
    let far = (16 << 40) - 5000;
    disk.write(far, Bytes::from(vec![1; 5000]), WriteFlags::default()).await.unwrap();
    assert_eq!(disk.next_allocated(0).await.unwrap().unwrap().end, 16 << 40);
    let status = disk.block_status(0, 16 << 40).await.unwrap();
    assert!(status.len > 15 << 40 && !status.flags.allocated);
    disk.make_empty(MakeEmpty::Keep).await.unwrap();
    assert!(disk.is_empty().await.unwrap());
    assert!(file.size() < 4 << 20);
    disk.close().await.unwrap();
    assert!(check(&file, CheckMode::Report).await.unwrap().is_clean());
}
