//! The client against a real server: `qemu-nbd` over a raw file, whose content is read directly
//! or compared with a shadow.

mod client_support;

use brep_block::{BlockDevice, ErrorKind, FlushLevel, WriteFlags, ZeroFlags};
use brep_nbd::client::{ClientError, Connection, describe_export, list_exports};
use brep_nbd::proto::wire::{TransmissionFlags, TransmissionMode};
use bytes::Bytes;
use client_support::{QemuNbd, pattern};
use futures_util::future::join_all;
use std::time::Duration;

const SIZE: u64 = 8 << 20;

fn image(directory: &tempfile::TempDir, content: &[u8]) -> std::path::PathBuf {
    let path = directory.path().join("disk.raw");
    std::fs::write(&path, content).expect("the image can be written");
    path
}

#[tokio::test]
async fn what_is_written_read_zeroed_and_trimmed_agrees_with_a_shadow() {
    let directory = tempfile::tempdir().expect("a directory");
    let mut shadow = pattern(SIZE as usize, 1);
    let path = image(&directory, &shadow);
    let server = QemuNbd::start(directory.path(), &path, &["--discard=unmap"]);
    let disk = Connection::connect(&server.options("")).await.expect("connected");
    assert_eq!(disk.size(), SIZE);
    assert!(disk.has_block_status());
    assert!(!disk.limits().read_only && disk.limits().can_discard);

    let mut random = 7u64;
    for round in 0..200u64 {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(99);
        let len = ((random >> 33) % 70_000) as usize;
        let offset = (random >> 13) % (SIZE - len as u64);
        let range = offset as usize..offset as usize + len;
        match round % 5 {
            0 | 1 => {
                let data = Bytes::from(pattern(len, round));
                shadow[range].copy_from_slice(&data);
                let flags = WriteFlags { fua: round % 2 == 0 };
                disk.write(offset, data, flags).await.expect("written");
            }
            2 => {
                shadow[range].fill(0);
                let flags = ZeroFlags { may_unmap: round % 2 == 0, ..ZeroFlags::default() };
                disk.write_zeroes(offset, len as u64, flags).await.expect("zeroed");
            }
            3 => {
                let data = disk.read(offset, len).await.expect("read");
                assert_eq!(data, shadow[range], "round {round}");
            }
            _ => {
                disk.discard(offset, len as u64).await.expect("trimmed");
                // The content is undefined now: define it.
                let data = Bytes::from(pattern(len, round));
                shadow[range].copy_from_slice(&data);
                disk.write(offset, data, WriteFlags::default()).await.expect("written");
            }
        }
    }
    disk.flush(FlushLevel::Durable).await.expect("flushed");
    assert_eq!(disk.read(0, SIZE as usize).await.expect("read"), shadow);
    disk.close();
    assert!(matches!(disk.failed().await, ClientError::Closed { .. }));
    drop(server);
    assert!(std::fs::read(&path).expect("read") == shadow, "the file differs from the shadow");
}

#[tokio::test]
async fn many_requests_in_flight_each_get_their_own_answer() {
    let directory = tempfile::tempdir().expect("a directory");
    let shadow = pattern(SIZE as usize, 2);
    let server = QemuNbd::start(directory.path(), &image(&directory, &shadow), &[]);
    let mut options = server.options("");
    options.in_flight_max = 64;
    options.in_flight_bytes_max = 1 << 20;
    let disk = Connection::connect(&options).await.expect("connected");
    let reads = (0..1000u64).map(|i| {
        let (offset, len) = (i * 7919 % (SIZE - 200_000), (i * 127 % 200_000) as usize);
        let read = disk.read(offset, len);
        let expected = &shadow[offset as usize..offset as usize + len];
        async move { assert_eq!(read.await.expect("read"), expected, "{len} bytes at {offset}") }
    });
    join_all(reads).await;
    assert_eq!(disk.oldest_request_age(), None);
}

#[tokio::test]
async fn holes_zeroes_and_data_are_told_apart() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory, &pattern(1 << 20, 3));
    let file = std::fs::File::options().write(true).open(&path).expect("opened");
    file.set_len(SIZE).expect("resized");
    let server = QemuNbd::start(directory.path(), &path, &[]);
    let disk = Connection::connect(&server.options("")).await.expect("connected");
    let data = disk.block_status(0, SIZE).await.expect("status");
    assert_eq!((data.len, data.flags.data, data.flags.zero), (1 << 20, true, false));
    let hole = disk.block_status(1 << 20, SIZE - (1 << 20)).await.expect("status");
    assert_eq!((hole.len, hole.flags.zero), (SIZE - (1 << 20), true));
}

#[tokio::test]
async fn more_than_four_gib_are_zeroed_trimmed_and_described_in_one_request() {
    const GIB: u64 = 1 << 30;
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory, &[]);
    std::fs::File::options().write(true).open(&path).unwrap().set_len(16 * GIB).unwrap();
    let nbd = QemuNbd::start(directory.path(), &path, &[]);
    let disk = Connection::connect(&nbd.options("")).await.expect("connected");
    assert_eq!(disk.mode(), TransmissionMode::Extended);
    let data = Bytes::from_static(&[7; 4096]);
    for offset in [GIB, 9 * GIB] {
        disk.write(offset, data.clone(), WriteFlags::default()).await.expect("written");
    }
    let zero = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
    disk.write_zeroes(512, 8 * GIB, zero).await.expect("zeroed");
    disk.discard(10 * GIB, 6 * GIB).await.expect("trimmed");
    let status = disk.block_status(0, 16 * GIB).await.expect("a state");
    assert!(status.flags.zero && status.len == 9 * GIB, "{status:?}");
    assert_eq!(disk.read(9 * GIB, 4096).await.expect("read"), data);
}

#[tokio::test]
async fn requests_beyond_the_end_fail_without_being_sent() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = QemuNbd::start(directory.path(), &image(&directory, &[1; 4096]), &[]);
    let disk = Connection::connect(&server.options("")).await.expect("connected");
    let kind = |result: brep_block::Result<()>| result.map_err(|error| error.kind());
    let data = Bytes::from_static(&[0; 512]);
    let flags = WriteFlags::default();
    assert_eq!(kind(disk.read(4000, 100).await.map(drop)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(disk.read(u64::MAX, 1).await.map(drop)), Err(ErrorKind::InvalidInput));
    assert_eq!(kind(disk.write(4096, data.clone(), flags).await), Err(ErrorKind::NoSpace));
    assert_eq!(kind(disk.write(u64::MAX, data, flags).await), Err(ErrorKind::NoSpace));
    assert_eq!(kind(disk.discard(1, u64::MAX).await), Err(ErrorKind::NoSpace));
    assert!(disk.read(4096, 0).await.expect("empty").is_empty());
    assert!(disk.failure().is_none());
}

#[tokio::test]
async fn a_read_only_export_takes_no_writes_and_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let server = QemuNbd::start(directory.path(), &image(&directory, &[1; 4096]), &["-r"]);
    let disk = Connection::connect(&server.options("")).await.expect("connected");
    assert!(disk.limits().read_only);
    let write = disk.write(0, Bytes::from_static(&[0; 512]), WriteFlags::default()).await;
    assert_eq!(write.expect_err("refused").kind(), ErrorKind::ReadOnly);
    disk.flush(FlushLevel::Durable).await.expect("nothing to flush");
}

#[tokio::test]
async fn a_server_that_is_killed_fails_what_is_pending() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory, &pattern(SIZE as usize, 4));
    let mut server = QemuNbd::start(directory.path(), &path, &[]);
    let disk = Connection::connect(&server.options("")).await.expect("connected");
    disk.read(0, 512).await.expect("read");
    server.kill();
    let reads: Vec<_> = (0..100).map(|i| disk.read(i * 512, 512)).collect();
    for read in reads {
        assert_eq!(read.await.expect_err("nobody is there").kind(), ErrorKind::NotConnected);
    }
    let reason = disk.failed().await;
    assert!(matches!(reason, ClientError::ClosedByServer { .. } | ClientError::Lost { .. }));
}

#[tokio::test]
async fn exports_can_be_listed_and_described() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = image(&directory, &[0; 4096]);
    let server = QemuNbd::start(directory.path(), &path, &["-x", "vda", "-D", "a disk"]);
    let options = server.options("vda");
    let timeout = Duration::from_secs(5);
    let exports = list_exports(&options.endpoint, None, timeout).await.expect("listed");
    let found: Vec<_> = exports.iter().map(|e| (e.name.as_str(), e.description.as_str())).collect();
    assert_eq!(found, [("vda", "a disk")]);
    let (info, outcome) =
        describe_export(&options.endpoint, None, "vda", timeout).await.expect("described");
    assert_eq!(info.size, 4096);
    assert_eq!(info.canonical_name.as_deref(), Some("vda"));
    assert_eq!(info.description.as_deref(), Some("a disk"));
    assert!(info.flags.contains(TransmissionFlags::SEND_FUA));
    assert!(outcome.mode.is_extended() && outcome.contexts == ["base:allocation"]);

    let wrong = Connection::connect(&server.options("vdb")).await.expect_err("no such export");
    assert!(wrong.to_string().contains("ERR_UNKNOWN"), "{wrong}");
}
