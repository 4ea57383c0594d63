//! Transfers that wait for the disk belong to a runtime: what happens when there are several,
//! when one ends, when there are more transfers than the kernel takes at a time.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Waker};

use brep_block::{BlockDevice, CacheMode, ErrorKind, Io, RawFile, RawFileOptions, WriteFlags};
use bytes::Bytes;
use tempfile::TempDir;
use tokio::runtime::{Builder, Runtime};

const BLOCKS: u64 = 1024;
const LEN: usize = 4096;

/// A file whose blocks hold their own numbers.
fn numbered(test: &str) -> Option<(TempDir, Arc<RawFile>)> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let content: Vec<u8> = (0..BLOCKS).flat_map(|block| block_of(block).to_vec()).collect();
    std::fs::write(&path, content).unwrap();
    let options = RawFileOptions { cache: CacheMode::None, ..RawFileOptions::default() };
    match RawFile::open(&path, options) {
        Ok(file) => Some((dir, file)),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            eprintln!("SKIP: {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn block_of(number: u64) -> Bytes {
    Bytes::from(number.to_le_bytes().repeat(LEN / 8))
}

fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().unwrap()
}

async fn check(file: &RawFile, block: u64) {
    let found = file.read(block * LEN as u64, LEN).await.unwrap();
    assert!(found == block_of(block), "block {block}");
}

async fn check_all_at_once(file: &Arc<RawFile>) {
    let mut tasks = Vec::new();
    for block in 0..BLOCKS {
        let file = Arc::clone(file);
        tasks.push(tokio::spawn(async move { check(&file, block).await }));
    }
    for task in tasks {
        task.await.unwrap();
    }
}

fn poll_once<T>(io: Io<'_, T>) {
    let mut io = pin!(io);
    let _ = io.as_mut().poll(&mut Context::from_waker(Waker::noop()));
}

#[test]
fn a_thousand_reads_at_a_time_give_each_its_own_block() {
    let Some((_dir, file)) = numbered("a_thousand_reads_at_a_time_give_each_its_own_block") else {
        return;
    };
    runtime().block_on(check_all_at_once(&file));
}

#[test]
fn a_thousand_writes_at_a_time_land_each_in_its_own_block() {
    let Some((_dir, file)) = numbered("a_thousand_writes_at_a_time_land_each_in_its_own_block")
    else {
        return;
    };
    runtime().block_on(async {
        let mut tasks = Vec::new();
        for block in 0..BLOCKS {
            let file = Arc::clone(&file);
            tasks.push(tokio::spawn(async move {
                let data = block_of(BLOCKS - block);
                file.write(block * LEN as u64, data, WriteFlags::default()).await
            }));
        }
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        for block in 0..BLOCKS {
            let found = file.read(block * LEN as u64, LEN).await.unwrap();
            assert!(found == block_of(BLOCKS - block), "block {block}");
        }
    });
}

#[test]
fn runtimes_that_take_turns_on_one_thread_do_not_wait_for_each_other() {
    let test = "runtimes_that_take_turns_on_one_thread_do_not_wait_for_each_other";
    let Some((_dir, file)) = numbered(test) else { return };
    let runtimes = [runtime(), runtime()];
    for round in 0..6 {
        runtimes[round % 2].block_on(check(&file, round as u64));
    }
}

#[test]
fn a_runtime_that_ends_with_transfers_in_flight_harms_nobody() {
    let test = "a_runtime_that_ends_with_transfers_in_flight_harms_nobody";
    let Some((_dir, file)) = numbered(test) else { return };
    for round in 0..5_u64 {
        let ending = runtime();
        ending.block_on(async {
            for block in 0..300 {
                poll_once(file.read(block * LEN as u64, LEN));
                let data = block_of(block);
                poll_once(file.write(block * LEN as u64, data, WriteFlags::default()));
            }
            if round % 2 == 0 {
                // The driver has handed some to the kernel.
                tokio::task::yield_now().await;
            }
        });
        drop(ending);
        runtime().block_on(check_all_at_once(&file));
    }
}

#[test]
fn dropped_writes_release_their_range_when_they_end() {
    let Some((_dir, file)) = numbered("dropped_writes_release_their_range_when_they_end") else {
        return;
    };
    runtime().block_on(async {
        for round in 0..50_u64 {
            poll_once(file.write(0, block_of(round), WriteFlags::default()));
            // Misaligned, so that it needs the range for itself.
            file.write(1, Bytes::from_static(&[7]), WriteFlags::default()).await.unwrap();
            assert_eq!(file.read(1, 1).await.unwrap(), [7][..], "overwritten by a dropped write");
        }
    });
}

#[test]
fn a_runtime_of_many_threads_works_as_well() {
    let Some((_dir, file)) = numbered("a_runtime_of_many_threads_works_as_well") else { return };
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(check_all_at_once(&file));
}
