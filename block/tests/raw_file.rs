//! What a file does beyond the rules of every device: locks, errors at open, direct I/O, space.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use brep_block::{
    BlockDevice, CacheMode, Error, ErrorKind, FlushLevel, RawFile, RawFileOptions, WriteFlags,
    ZeroFlags,
};
use bytes::Bytes;
use tempfile::TempDir;

fn dir_with_file(size: u64) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::File::create(&path).unwrap().set_len(size).unwrap();
    (dir, path)
}

fn open(path: &Path) -> Result<Arc<RawFile>, Error> {
    RawFile::open(path, RawFileOptions::default())
}

fn read_only() -> RawFileOptions {
    RawFileOptions { read_only: true, ..RawFileOptions::default() }
}

fn uncached() -> RawFileOptions {
    RawFileOptions { cache: CacheMode::None, ..RawFileOptions::default() }
}

/// `None`, and a word about it, where the file system has no direct I/O.
fn open_uncached(test: &str, path: &Path, options: RawFileOptions) -> Option<Arc<RawFile>> {
    match RawFile::open(path, options) {
        Ok(file) => Some(file),
        Err(error) if error.kind() == ErrorKind::Unsupported => {
            eprintln!("SKIP: {test}: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn a_second_writer_is_refused_with_the_files_name() {
    let (_dir, path) = dir_with_file(4096);
    let first = open(&path).unwrap();
    for options in [RawFileOptions::default(), read_only()] {
        let error = RawFile::open(&path, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Locked);
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
    drop(first);
    open(&path).unwrap();
}

#[test]
fn readers_share_the_lock_and_keep_writers_out() {
    let (_dir, path) = dir_with_file(4096);
    let first = RawFile::open(&path, read_only()).unwrap();
    let second = RawFile::open(&path, read_only()).unwrap();
    drop(first);
    assert_eq!(open(&path).unwrap_err().kind(), ErrorKind::Locked, "one reader is left");
    drop(second);
    open(&path).unwrap();
}

#[test]
fn without_lock_a_file_can_be_open_twice() {
    let (_dir, path) = dir_with_file(4096);
    let _first = open(&path).unwrap();
    let unlocked = RawFileOptions { lock: false, ..RawFileOptions::default() };
    RawFile::open(&path, unlocked).unwrap();
}

#[test]
fn the_lock_keeps_a_process_of_another_program_out() {
    let (_dir, path) = dir_with_file(1 << 20);
    let file = open(&path).unwrap();
    let write = || {
        std::process::Command::new("qemu-io")
            .args(["-f", "raw", "-c", "write -P 1 0 4096"])
            .arg(&path)
            .output()
            .expect("qemu-io runs")
    };
    assert!(!write().status.success(), "qemu-io got in");
    drop(file);
    assert!(write().status.success());
}

#[test]
fn every_open_error_names_the_path_and_what_to_do() {
    let dir = tempfile::tempdir().unwrap();
    let missing = dir.path().join("missing.raw");
    let error = open(&missing).unwrap_err();
    assert!(error.to_string().contains("missing.raw"), "{error}");
    assert!(error.detail().contains("create it first"), "{error}");
    assert_eq!((error.errno(), error.exit_code()), (2, 1));

    let error = open(dir.path()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.detail().contains("is a directory"), "{error}");

    let error = open(Path::new("/dev/null")).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("/dev/null"), "{error}");
}

#[test]
fn a_fifo_is_refused_and_not_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    let mode = rustix::fs::Mode::from_raw_mode(0o600);
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, mode, 0).unwrap();
    assert_eq!(open(&path).unwrap_err().kind(), ErrorKind::InvalidInput);
}

#[test]
fn create_makes_a_file_and_leaves_an_old_one_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("new.raw");
    let create = RawFileOptions { create: Some(1000), ..RawFileOptions::default() };
    assert_eq!(RawFile::open(&path, create.clone()).unwrap().size(), 1000);
    std::fs::write(&path, b"old").unwrap();
    assert_eq!(RawFile::open(&path, create.clone()).unwrap().size(), 3);
    let create_new = RawFileOptions { create_new: true, ..create };
    let error = RawFile::open(&path, create_new).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (ErrorKind::InvalidInput, 17));
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
}

#[test]
fn a_failed_creation_leaves_no_file_behind() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("huge.raw");
    let create = RawFileOptions { create: Some(u64::MAX), ..RawFileOptions::default() };
    assert!(RawFile::open(&path, create).is_err());
    assert!(!path.exists());
}

#[tokio::test]
async fn read_only_files_refuse_every_change() {
    let (_dir, path) = dir_with_file(4096);
    let file = RawFile::open(&path, read_only()).unwrap();
    let data = Bytes::from_static(&[1]);
    let refused = [
        file.write(0, data, WriteFlags::default()).await,
        file.write_zeroes(0, 1, ZeroFlags::default()).await,
        file.discard(0, 1).await,
        file.truncate(0).await,
    ];
    for result in refused {
        assert_eq!(result.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    file.flush(FlushLevel::Durable).await.unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), [0; 4096]);
}

#[tokio::test]
async fn a_write_of_any_alignment_past_the_cache_changes_nothing_else() {
    let (_dir, path) = dir_with_file(0);
    // Two odd sizes: the end of the file lies in the first and in the last sector of a page.
    for size in [3 * 4096 + 100, 3 * 4096 + 4000] {
        let old: Vec<u8> = (0..size).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &old).unwrap();
        for (offset, len) in
            [(0, size), (1, 1), (500, 600), (4095, 4098), (size - 1, 1), (8192, 4096)]
        {
            let test = "a_write_of_any_alignment_past_the_cache_changes_nothing_else";
            let Some(file) = open_uncached(test, &path, uncached()) else { return };
            let fua = WriteFlags { fua: offset % 2 == 0 };
            file.write(offset as u64, Bytes::from(vec![0xEE; len]), fua).await.unwrap();
            let mut expected = std::fs::read(&path).unwrap();
            assert_eq!(expected.len(), size, "the size changed by a write at {offset}");
            assert_eq!(file.read(0, size).await.unwrap(), expected);
            assert!(expected[offset..offset + len].iter().all(|&byte| byte == 0xEE));
            expected[offset..offset + len].copy_from_slice(&old[offset..offset + len]);
            assert!(expected == old, "a write at {offset} of {len} bytes changed its neighbours");
            drop(file);
            std::fs::write(&path, &old).unwrap();
        }
    }
}

#[tokio::test]
async fn neighbours_within_one_block_do_not_lose_each_others_writes() {
    let (_dir, path) = dir_with_file(8192);
    let test = "neighbours_within_one_block_do_not_lose_each_others_writes";
    let Some(file) = open_uncached(test, &path, uncached()) else { return };
    let mut tasks = Vec::new();
    for index in 0..128_u64 {
        let file = Arc::clone(&file);
        tasks.push(tokio::spawn(async move {
            let data = Bytes::from(vec![index as u8 + 1; 64]);
            file.write(index * 64, data, WriteFlags::default()).await
        }));
    }
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    let content = std::fs::read(&path).unwrap();
    for (index, chunk) in content.chunks(64).enumerate() {
        assert_eq!(chunk, [index as u8 + 1; 64], "chunk {index}");
    }
}

#[tokio::test]
async fn a_growable_file_grows_by_exactly_what_was_written() {
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let (_dir, path) = dir_with_file(0);
        let options = RawFileOptions { growable: true, cache, ..RawFileOptions::default() };
        let test = "a_growable_file_grows_by_exactly_what_was_written";
        let Some(file) = open_uncached(test, &path, options) else { continue };
        for (offset, len, fua) in [(0, 100, false), (1000, 5000, true), (9000, 1, false)] {
            let data = Bytes::from(vec![7; len]);
            file.write(offset, data, WriteFlags { fua }).await.unwrap();
            assert_eq!(file.size(), offset + len as u64);
            assert_eq!(std::fs::metadata(&path).unwrap().len(), file.size());
        }
        file.write_zeroes(9001, 999, ZeroFlags::default()).await.unwrap();
        assert_eq!(file.size(), 10_000);
        let content = std::fs::read(&path).unwrap();
        let mut expected = vec![0; 10_000];
        expected[..100].fill(7);
        expected[1000..6000].fill(7);
        expected[9000] = 7;
        assert!(content == expected, "{cache:?}");
        assert_eq!(file.read(0, 10_000).await.unwrap(), expected);
    }
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

#[tokio::test]
async fn unmapping_gives_space_back_and_plain_zeroes_keep_it() {
    const MIB: usize = 1 << 20;
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let (_dir, path) = dir_with_file(4 << 20);
        let options = RawFileOptions { cache, ..RawFileOptions::default() };
        let test = "unmapping_gives_space_back_and_plain_zeroes_keep_it";
        let Some(file) = open_uncached(test, &path, options) else { continue };
        if !file.limits().can_discard {
            eprintln!("SKIP: {test}: the file system makes no holes");
            return;
        }
        for piece in 0..4 {
            let data = Bytes::from(vec![9; MIB]);
            file.write((piece * MIB) as u64, data, WriteFlags { fua: true }).await.unwrap();
        }
        let full = allocated(&path);
        let keep = ZeroFlags::default();
        file.write_zeroes(0, MIB as u64, keep).await.unwrap();
        assert!(allocated(&path) >= full, "zeroes that must not unmap gave space back");
        let unmap = ZeroFlags { may_unmap: true, fua: true, fast: true };
        file.write_zeroes(MIB as u64, MIB as u64, unmap).await.unwrap();
        assert!(allocated(&path) <= full - MIB as u64);
        file.discard(2 * MIB as u64, MIB as u64).await.unwrap();
        assert!(allocated(&path) <= full - 2 * MIB as u64);
        let hole = file.block_status(MIB as u64, 2 * MIB as u64).await.unwrap();
        assert_eq!((hole.len, hole.flags.zero, hole.flags.data), (2 * MIB as u64, true, false));
        let data = file.block_status(3 * MIB as u64, MIB as u64).await.unwrap();
        assert_eq!((data.len, data.flags.zero, data.flags.data), (MIB as u64, false, true));
    }
}

/// Large ones are carried out beside the thread that asked, several at a time.
#[tokio::test]
async fn large_requests_are_whole_at_their_end_and_next_to_each_other() {
    const LEN: usize = (1 << 20) + 3;
    let (_dir, path) = dir_with_file(4 * LEN as u64);
    let file = open(&path).unwrap();
    let pieces: Vec<_> = (0..4u8).map(|i| Bytes::from(vec![i + 1; LEN])).collect();
    let write = |i: usize| file.write((i * LEN) as u64, pieces[i].clone(), WriteFlags::default());
    tokio::try_join!(write(3), write(1), write(0), write(2)).unwrap();
    for (i, piece) in pieces.iter().enumerate() {
        assert_eq!(file.read((i * LEN) as u64, LEN).await.unwrap(), *piece);
    }
    assert!(std::fs::read(&path).unwrap() == pieces.concat(), "in the file, not only read back");
    // Beyond the end the file grows with the data, or not at all.
    let end = file.size();
    let error = file.write(end, pieces[0].clone(), WriteFlags::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    let options = RawFileOptions { growable: true, ..RawFileOptions::default() };
    drop(file);
    let file = RawFile::open(&path, options).unwrap();
    file.write(end, pieces[1].clone(), WriteFlags::default()).await.unwrap();
    assert_eq!(file.size(), end + LEN as u64);
    assert_eq!(file.read(end, LEN).await.unwrap(), pieces[1]);
}

#[tokio::test]
async fn a_file_that_was_truncated_by_somebody_else_is_an_error_and_not_zeroes() {
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let (_dir, path) = dir_with_file(8192);
        let options = RawFileOptions { cache, ..RawFileOptions::default() };
        let test = "a_file_that_was_truncated_by_somebody_else_is_an_error_and_not_zeroes";
        let Some(file) = open_uncached(test, &path, options) else { continue };
        std::fs::File::options().write(true).open(&path).unwrap().set_len(5000).unwrap();
        let error = file.read(4096, 4096).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Io);
        assert!(error.detail().contains("ends at 5000"), "{error}");
        assert_eq!(file.read(4096, 904).await.unwrap(), vec![0; 904]);
    }
}

#[tokio::test]
async fn concurrent_durable_flushes_all_end() {
    let (_dir, path) = dir_with_file(1 << 20);
    let file = open(&path).unwrap();
    let mut tasks = Vec::new();
    for index in 0..64_u64 {
        let file = Arc::clone(&file);
        tasks.push(tokio::spawn(async move {
            let data = Bytes::from(vec![1; 512]);
            file.write(index * 512, data, WriteFlags::default()).await?;
            file.flush(FlushLevel::Durable).await
        }));
    }
    for task in tasks {
        task.await.unwrap().unwrap();
    }
    file.flush(FlushLevel::Durable).await.unwrap();
}

#[test]
fn an_operation_that_outlives_its_runtime_fails_and_the_next_one_works() {
    let (_dir, path) = dir_with_file(4096);
    let file = open(&path).unwrap();
    for _ in 0..3 {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let io = file.flush(FlushLevel::Durable);
        runtime.block_on(async {
            tokio::select! {
                biased;
                _ = io => {}
                () = async {} => {}
            }
        });
        runtime.shutdown_background();
    }
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(file.flush(FlushLevel::Durable)).unwrap();
}

#[tokio::test]
async fn a_read_of_which_a_part_is_not_cached_is_complete() {
    let (_dir, path) = dir_with_file(0);
    let content: Vec<u8> = (0..1 << 20).map(|i: u32| (i / 7 % 256) as u8).collect();
    std::fs::write(&path, &content).unwrap();
    let other = std::fs::File::open(&path).unwrap();
    other.sync_all().unwrap();
    let forget = |offset, len| {
        let advice = rustix::fs::Advice::DontNeed;
        rustix::fs::fadvise(&other, offset, std::num::NonZeroU64::new(len), advice).unwrap();
    };
    let file = open(&path).unwrap();
    for (offset, len) in [(512 << 10, 512 << 10), (0, 512 << 10), (0, 1 << 20)] {
        forget(offset, len);
        assert_eq!(file.read(0, 1 << 20).await.unwrap(), content);
        let io = file.read(4096, 100_000);
        assert!(matches!(io, brep_block::Io::Ready(Ok(_))), "cached now, and not read inline");
        assert_eq!(io.await.unwrap(), content[4096..104_096]);
    }
}

#[tokio::test]
async fn a_failed_growth_leaves_the_file_as_long_as_it_was() {
    let (_dir, path) = dir_with_file(1000);
    let options = RawFileOptions { growable: true, ..RawFileOptions::default() };
    let file = RawFile::open(&path, options).unwrap();
    // Longer than any file system's longest file.
    let data = Bytes::from(vec![1; 8192]);
    let error = file.write((1 << 63) - 8192, data, WriteFlags::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    assert_eq!((file.size(), std::fs::metadata(&path).unwrap().len()), (1000, 1000));
}

#[tokio::test]
async fn of_concurrent_growths_the_longest_counts() {
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let (_dir, path) = dir_with_file(0);
        let options = RawFileOptions { growable: true, cache, ..RawFileOptions::default() };
        let test = "of_concurrent_growths_the_longest_counts";
        let Some(file) = open_uncached(test, &path, options) else { continue };
        let mut tasks = Vec::new();
        for index in (0..64_u64).rev() {
            let file = Arc::clone(&file);
            tasks.push(tokio::spawn(async move {
                let data = Bytes::from(vec![index as u8 + 1; 4096]);
                file.write(index * 4096, data, WriteFlags::default()).await
            }));
        }
        for task in tasks {
            task.await.unwrap().unwrap();
        }
        assert_eq!(file.size(), 64 * 4096);
        let content = std::fs::read(&path).unwrap();
        assert_eq!(content.len(), 64 * 4096);
        for (index, block) in content.chunks(4096).enumerate() {
            assert!(block.iter().all(|&byte| byte == index as u8 + 1), "block {index}, {cache:?}");
        }
    }
}
