//! Checking and repairing, with qemu-img as the oracle.
#![allow(missing_docs)]

mod common;

use brep_block::{BlockDevice, WriteFlags};
use brep_qcow2::{CheckMode, CreateOptions, OpenError, OpenOptions, Qcow2, check};
use bytes::Bytes;
use common::{Dir, create, memory, open, pattern, read_all};
use std::sync::Arc;

const COPIED: u64 = 1 << 63;

async fn word(file: &Arc<dyn BlockDevice>, at: u64) -> u64 {
    u64::from_be_bytes(file.read(at, 8).await.unwrap()[..].try_into().unwrap())
}

async fn set_word(file: &Arc<dyn BlockDevice>, at: u64, value: u64) {
    let data = Bytes::copy_from_slice(&value.to_be_bytes());
    file.write(at, data, WriteFlags::default()).await.unwrap();
}

/// An image with some data, closed.
async fn image(file: &Arc<dyn BlockDevice>) -> Vec<u8> {
    create(file, &CreateOptions::new(1 << 20)).await;
    let disk = open(file).await;
    let content = pattern(1, 1 << 20);
    disk.write(0, Bytes::from(content.clone()), WriteFlags::default()).await.unwrap();
    disk.close().await.unwrap();
    assert!(check(file, CheckMode::Report).await.unwrap().is_clean());
    content
}

/// Offsets of the L1 table, the first L2 table, the refcount table and its first block.
async fn places(file: &Arc<dyn BlockDevice>) -> (u64, u64, u64, u64) {
    let l1 = word(file, 40).await;
    let table = word(file, 48).await;
    (l1, word(file, l1).await & !COPIED, table, word(file, table).await)
}

#[tokio::test]
async fn a_killed_process_leaves_leaks_that_are_repaired() {
    let dir = Dir::new();
    let file = dir.file("disk.qcow2");
    create(&file, &CreateOptions::new(1 << 20)).await;
    let options = OpenOptions { ordered: false, ..OpenOptions::default() };
    let disk = common::open_with(&file, options).await;
    disk.write(70_000, Bytes::from_static(b"data"), WriteFlags::default()).await.unwrap();
    drop(disk);
    assert!(check(&file, CheckMode::Report).await.unwrap().is_clean(), "no space is wasted yet");
    file.truncate(1 << 20).await.unwrap();
    let found = check(&file, CheckMode::Report).await.unwrap();
    assert!(found.leaks > 0 && found.corruptions == 0, "{found:?}");
    let (code, text) = dir.run("cp", &["disk.qcow2", "copy.qcow2"]);
    assert_eq!(code, 0, "{text}");
    let (code, text) = dir.run("qemu-img", &["check", "copy.qcow2"]);
    assert_eq!(code, 3, "{text}");
    assert!(text.contains(&format!("{} leaked clusters", found.leaks)), "{text} {found:?}");
    let fixed = check(&file, CheckMode::RepairLeaks).await.unwrap();
    assert_eq!((fixed.leaks, fixed.leaks_fixed), (0, found.leaks));
    drop(file);
    dir.assert_clean("disk.qcow2");
}

#[tokio::test]
async fn a_refcount_that_is_too_low_is_a_corruption_and_is_repaired() {
    let file = memory();
    let content = image(&file).await;
    let (_, _, _, block) = places(&file).await;
    let counts = word(&file, block + 8).await;
    set_word(&file, block + 8, 0).await;
    let found = check(&file, CheckMode::RepairLeaks).await.unwrap();
    assert_eq!((found.corruptions, found.corruptions_fixed), (4, 0));
    let fixed = check(&file, CheckMode::RepairAll).await.unwrap();
    assert_eq!((fixed.corruptions, fixed.corruptions_fixed), (0, 4));
    assert_eq!(word(&file, block + 8).await, counts);
    assert!(read_all(&*open(&file).await).await == content);
}

#[tokio::test]
async fn wrong_copied_flags_are_repaired() {
    let file = memory();
    let content = image(&file).await;
    let (l1, l2, _, _) = places(&file).await;
    set_word(&file, l1, l2).await;
    let entry = word(&file, l2 + 8).await;
    set_word(&file, l2 + 8, entry & !COPIED).await;
    let fixed = check(&file, CheckMode::RepairAll).await.unwrap();
    assert_eq!((fixed.corruptions, fixed.corruptions_fixed), (0, 2), "{fixed:?}");
    assert_eq!(word(&file, l2 + 8).await, entry);
    assert!(read_all(&*open(&file).await).await == content);
}

#[tokio::test]
async fn a_lost_refcount_structure_is_built_anew() {
    for case in 0..4 {
        let dir = Dir::new();
        let file = dir.file("disk.qcow2");
        let content = image(&file).await;
        let (_, _, table, block) = places(&file).await;
        match case {
            0 => set_word(&file, table, 0).await,
            1 => set_word(&file, table, block + 512).await,
            2 => set_word(&file, table + 8, block).await,
            _ => file.write(56, vec![0; 4].into(), WriteFlags::default()).await.unwrap(),
        }
        let found = check(&file, CheckMode::Report).await.unwrap();
        assert!(found.corruptions > 0, "{case} {found:?}");
        let fixed = check(&file, CheckMode::RepairAll).await.unwrap();
        assert!(fixed.is_clean() && fixed.corruptions_fixed > 0, "{case} {fixed:?}");
        let again = check(&file, CheckMode::Report).await.unwrap();
        assert!(again.is_clean(), "{case} {again:?}");
        drop(file);
        dir.assert_clean("disk.qcow2");
        dir.assert_content("disk.qcow2", &content);
    }
}

#[tokio::test]
async fn references_that_cannot_be_followed_keep_counts_from_being_lowered() {
    let file = memory();
    image(&file).await;
    let (l1, l2, _, _) = places(&file).await;
    set_word(&file, l1, 1 << 50 | COPIED).await;
    let fixed = check(&file, CheckMode::RepairAll).await.unwrap();
    assert!(fixed.corruptions > 0 && fixed.leaks > 0 && fixed.leaks_fixed == 0, "{fixed:?}");
    set_word(&file, l1, l2 | COPIED).await;
    assert!(check(&file, CheckMode::Report).await.unwrap().is_clean());
}

#[tokio::test]
async fn a_zero_cluster_with_a_bad_preallocation_becomes_a_plain_one() {
    let file = memory();
    image(&file).await;
    let (_, l2, _, _) = places(&file).await;
    let entry = word(&file, l2).await;
    set_word(&file, l2, (entry | 1) + 512).await;
    let found = check(&file, CheckMode::Report).await.unwrap();
    assert_eq!((found.corruptions, found.leaks), (1, 1), "{found:?}");
    let fixed = check(&file, CheckMode::RepairAll).await.unwrap();
    assert!(fixed.is_clean(), "{fixed:?}");
    assert_eq!(word(&file, l2).await, 1);
}

#[tokio::test]
async fn the_corrupt_bit_is_cleared_only_when_nothing_is_wrong_any_more() {
    let file = memory();
    image(&file).await;
    let (_, l2, _, _) = places(&file).await;
    let good = word(&file, l2).await;
    set_word(&file, 72, 2).await;
    let error = Qcow2::open(file.clone(), OpenOptions::default()).await.unwrap_err();
    assert!(matches!(error, OpenError::Format { .. }), "{error}");
    set_word(&file, l2, good + 512).await;
    check(&file, CheckMode::RepairAll).await.unwrap();
    assert_eq!(word(&file, 72).await, 2);
    set_word(&file, l2, good).await;
    let report = check(&file, CheckMode::RepairAll).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    assert_eq!(word(&file, 72).await, 0);
    open(&file).await;
}

#[tokio::test]
async fn a_dirty_image_is_repaired_before_it_is_written() {
    let file = memory();
    let content = image(&file).await;
    let (_, _, _, block) = places(&file).await;
    set_word(&file, block + 8, 0).await;
    set_word(&file, 72, 1).await;
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    let disk = Qcow2::open(file.clone(), read_only).await.unwrap();
    assert!(disk.info().dirty);
    assert!(read_all(&*disk).await == content);
    assert_eq!(word(&file, 72).await, 1);
    let disk = open(&file).await;
    assert!(!disk.info().dirty);
    assert_eq!(word(&file, 72).await, 0);
    assert!(check(&file, CheckMode::Report).await.unwrap().is_clean());
}

#[tokio::test]
async fn finds_what_qemu_finds_in_images_with_snapshots_and_bitmaps() {
    let dir = Dir::new();
    std::fs::write(dir.path("source.raw"), pattern(1, 2 << 20)).unwrap();
    dir.qemu_img("convert -c -f raw -O qcow2 source.raw d.qcow2");
    dir.qemu_img("bitmap --add d.qcow2 b0");
    dir.qemu_img("snapshot -c s0 d.qcow2");
    dir.run("qemu-io", &["-c", "write -P 3 100k 300k", "d.qcow2"]);
    dir.qemu_img("snapshot -c s1 d.qcow2");
    let file = dir.file("d.qcow2");
    let report = check(&file, CheckMode::Report).await.unwrap();
    assert!(report.is_clean(), "{report:?}");
    let (_, text) = dir.run("cp", &["d.qcow2", "copy.qcow2"]);
    assert_eq!(text, "");
    let text = dir.qemu_img("check --output=json copy.qcow2");
    let number = |name: &str| {
        let rest = text.split(&format!("\"{name}\": ")).nth(1).unwrap_or("0");
        rest.split(|c: char| !c.is_ascii_digit()).next().unwrap().parse::<u64>().unwrap()
    };
    assert_eq!(report.image_end_offset, number("image-end-offset"));
    assert_eq!(report.total_clusters, number("total-clusters"));
    assert_eq!(report.allocated_clusters, number("allocated-clusters"));
    assert_eq!(report.compressed_clusters, number("compressed-clusters"));
}
