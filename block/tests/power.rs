//! What a loss of power leaves: what was flushed, and any part of what was not.
#![allow(missing_docs)]

use std::sync::Arc;

use brep_block::{
    BlockDevice, FlushLevel, Memory, Power, PowerCut, PowerLoss, WriteFlags, ZeroFlags, conformance,
};
use bytes::Bytes;

const SIZE: u64 = 64 << 10;
/// A seed with which nothing that was not flushed is kept.
const NOTHING_KEPT: u64 = 0;

fn disk() -> (Arc<Memory>, Arc<Power>, Arc<PowerLoss>) {
    let (stable, power) = (Memory::new("disk", SIZE), Power::new());
    let disk = power.device(Arc::clone(&stable) as _);
    (stable, power, disk)
}

async fn write(disk: &dyn BlockDevice, offset: u64, byte: u8, len: usize) {
    disk.write(offset, vec![byte; len].into(), WriteFlags::default()).await.unwrap();
}

async fn all(disk: &dyn BlockDevice) -> Bytes {
    disk.read(0, disk.size() as usize).await.unwrap()
}

#[tokio::test]
async fn passes_the_conformance_suite() {
    let make = async |size| Power::new().device(Memory::new("disk", size));
    conformance::run(make, conformance::Options::default().can_truncate()).await.unwrap();
}

#[tokio::test]
async fn what_was_flushed_stays_and_what_was_not_is_kept_lost_or_torn_by_sectors() {
    let mut seen = PowerCut::default();
    for seed in 0..64 {
        let (stable, power, disk) = disk();
        write(&*disk, 0, 1, SIZE as usize).await;
        disk.flush(FlushLevel::Durable).await.unwrap();
        write(&*disk, 1000, 2, 5000).await;
        write(&*disk, 2000, 3, 5000).await;
        assert_eq!(disk.unflushed(), 2);
        let cut = power.cut(seed).await.unwrap();
        let now = all(&*stable).await;
        for (at, &byte) in now.iter().enumerate() {
            let possible: &[u8] = match at {
                1000..2000 => &[1, 2],
                2000..6000 => &[1, 2, 3],
                6000..7000 => &[1, 3],
                _ => &[1],
            };
            assert!(possible.contains(&byte), "byte {at} is {byte}");
            let sector = &now[at / 512 * 512..(at / 512 + 1) * 512];
            let same = |b: &u8| *b == byte || (at / 512 == 1000 / 512) || (at / 512 == 2000 / 512);
            let edge = matches!(at / 512, 3 | 11 | 13);
            assert!(edge || sector.iter().all(same), "sector of byte {at} is torn");
        }
        seen.kept += cut.kept;
        seen.lost += cut.lost;
        seen.torn += cut.torn;
    }
    assert!(seen.kept > 100 && seen.lost > 100 && seen.torn > 10, "{seen:?}");
}

#[tokio::test]
async fn a_flush_covers_what_had_ended_when_it_began_and_fua_covers_itself() {
    for seed in 0..32 {
        let (stable, power, disk) = disk();
        write(&*disk, 0, 1, 512).await;
        power.set_flush_yields(3);
        let flush = disk.flush(FlushLevel::Durable);
        write(&*disk, 512, 1, 512).await;
        flush.await.unwrap();
        assert_eq!(disk.unflushed(), 1, "the write came too late");
        let fua = WriteFlags { fua: true };
        disk.write(1024, vec![1; 512].into(), fua).await.unwrap();
        power.cut(seed).await.unwrap();
        let now = all(&*stable).await;
        assert!(now[0] == 1 && now[1024] == 1, "with seed {seed}");
    }
}

#[tokio::test]
async fn growth_and_truncation_are_lost_like_data() {
    let mut sizes = std::collections::BTreeSet::new();
    for seed in 0..64 {
        let (stable, power) = (Memory::new_growable("file", 0), Power::new());
        let file = power.device(Arc::clone(&stable) as _);
        write(&*file, 0, 1, 4096).await;
        file.flush(FlushLevel::Durable).await.unwrap();
        file.truncate(1024).await.unwrap();
        write(&*file, 8192, 2, 1024).await;
        file.write_zeroes(0, 512, ZeroFlags::default()).await.unwrap();
        power.cut(seed).await.unwrap();
        let now = all(&*stable).await;
        assert!(now[512..1024].iter().all(|&b| b == 1), "what was flushed is there");
        sizes.insert(stable.size());
    }
    assert_eq!(sizes.into_iter().collect::<Vec<_>>(), [1024, 4096, 8704, 9216]);
}

#[tokio::test]
async fn the_operation_under_which_the_power_goes_and_all_after_it_fail() {
    let (stable, power, disk) = disk();
    power.fail_after(2);
    write(&*disk, 0, 1, 512).await;
    disk.flush(FlushLevel::Durable).await.unwrap_err();
    assert!(power.is_off());
    disk.read(0, 1).await.unwrap_err();
    disk.write(0, vec![2].into(), WriteFlags::default()).await.unwrap_err();
    assert_eq!(power.operations(), 2);
    // The flush has had no effect: a seed that keeps nothing loses what came before it.
    power.cut(NOTHING_KEPT).await.unwrap();
    assert_eq!(stable.read(0, 1).await.unwrap(), [0][..]);
}
