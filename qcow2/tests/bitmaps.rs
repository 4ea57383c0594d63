//! Persistent bitmaps that QEMU has made: what we read of them is what it serves itself, damage is
//! told, and writing makes them outdated.
#![allow(missing_docs)]

mod common;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use brep_block::{BlockDevice, ErrorKind, FlushLevel, RawFile, RawFileOptions, WriteFlags};
use brep_qcow2::{OpenOptions, Qcow2};
use common::{Dir, open_with};

/// Who had it before may still be letting go of its lock.
async fn open_read_only(dir: &Dir, name: &str) -> Arc<Qcow2> {
    let options = RawFileOptions { read_only: true, ..RawFileOptions::default() };
    let deadline = Instant::now() + Duration::from_secs(10);
    let file: Arc<dyn BlockDevice> = loop {
        match RawFile::open(dir.path(name), options.clone()) {
            Ok(file) => break file,
            Err(error) if error.kind() == ErrorKind::Locked && Instant::now() < deadline => {
                tokio::task::yield_now().await;
            }
            Err(error) => panic!("{error}"),
        }
    };
    open_with(&file, OpenOptions { read_only: true, ..OpenOptions::default() }).await
}

/// The marked ranges of a bitmap, as far as neighbours are joined.
async fn marked(disk: &Qcow2, name: &str, size: u64) -> Vec<(u64, u64)> {
    let bitmap = disk.bitmap(name).await.unwrap().expect("there is one");
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    let mut at = 0;
    while at < size {
        let (len, is_marked) = bitmap.status(at, size - at).await.unwrap();
        assert!((1..=size - at).contains(&len), "{len} of {}", size - at);
        match ranges.last_mut() {
            Some((_, end)) if is_marked && *end == at => *end = at + len,
            _ if is_marked => ranges.push((at, at + len)),
            _ => {}
        }
        at += len;
    }
    ranges
}

/// What QEMU's own server says is dirty.
fn marked_by_qemu(dir: &Dir, image: &str, bitmap: &str) -> Vec<(u64, u64)> {
    let nodes = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}",
        dir.path("b.sock").display()
    );
    dir.qemu_img(&format!("bitmap --disable {image} {bitmap}"));
    let mut server = Command::new("qemu-nbd")
        .args(["-r", "-f", "qcow2", "-t", "-B", bitmap, "-k"])
        .arg(dir.path("b.sock"))
        .arg(dir.path(image))
        .spawn()
        .unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while !dir.path("b.sock").exists() {
        assert!(Instant::now() < deadline, "qemu-nbd does not start");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let (code, text) = dir.run("qemu-img", &["map", "--output=json", "--image-opts", &nodes]);
    server.kill().unwrap();
    server.wait().unwrap();
    let _ = std::fs::remove_file(dir.path("b.sock"));
    assert_eq!(code, 0, "{text}");
    // Dirty is what this view of it calls no data.
    let extents: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for extent in extents.iter().filter(|extent| extent["data"] == false) {
        let start = extent["start"].as_u64().unwrap();
        let end = start + extent["length"].as_u64().unwrap();
        match ranges.last_mut() {
            Some((_, last)) if *last == start => *last = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

#[tokio::test]
async fn what_qemu_has_marked_is_read() {
    for (cluster, granularity, size) in
        [("64k", "64k", 64 << 20), ("512", "512", 8 << 20), ("4k", "1M", (40 << 20) + 1536)]
    {
        let dir = Dir::new();
        let create = format!("create -q -f qcow2 -o cluster_size={cluster} a.qcow2 {size}");
        dir.qemu_img(&create);
        dir.qemu_img(&format!("bitmap --add -g {granularity} a.qcow2 nightly"));
        dir.qemu_img("bitmap --add a.qcow2 empty");
        let mut commands = vec!["-f", "qcow2", "a.qcow2"];
        let last = format!("write -P 4 {} 512", size - 512);
        // The third marks all that a cluster of a bitmap can hold, where clusters are small.
        for write in ["write -P 1 0 512", "write -P 2 1M 3000", "write -P 3 2M 4M", &last] {
            commands.extend(["-c", write]);
        }
        let (code, text) = dir.run("qemu-io", &commands);
        assert_eq!(code, 0, "{text}");
        let expected = marked_by_qemu(&dir, "a.qcow2", "nightly");
        assert!(expected.len() >= 2, "{expected:?}");

        let disk = open_read_only(&dir, "a.qcow2").await;
        let bitmaps = disk.bitmaps().await.unwrap();
        let names: Vec<&str> = bitmaps.iter().map(|bitmap| bitmap.name.as_str()).collect();
        assert_eq!(names, ["nightly", "empty"]);
        assert!(!bitmaps[0].auto && bitmaps[1].auto, "one was disabled: {bitmaps:?}");
        assert_eq!(marked(&disk, "nightly", size).await, expected, "clusters of {cluster}");
        assert!(disk.bitmap("weekly").await.unwrap().is_none());
        let beyond = disk.bitmap("empty").await.unwrap().unwrap().status(size + (1 << 20), 1).await;
        assert_eq!(beyond.unwrap_err().kind(), ErrorKind::InvalidInput);
    }
}

#[tokio::test]
async fn an_image_that_was_opened_for_writing_has_no_bitmaps_for_anybody() {
    let dir = Dir::new();
    dir.qemu_img("create -q -f qcow2 a.qcow2 1M");
    dir.qemu_img("bitmap --add a.qcow2 nightly");
    assert!(!open_read_only(&dir, "a.qcow2").await.info().bitmaps_outdated);
    let file = common::open_file(&dir.path("a.qcow2"), false);
    let disk = open_with(&file, OpenOptions::default()).await;
    assert_eq!(disk.bitmaps().await.unwrap(), [], "nothing keeps them while we write");
    disk.write(0, bytes::Bytes::from_static(b"new"), WriteFlags::default()).await.unwrap();
    disk.flush(FlushLevel::Durable).await.unwrap();
    disk.close().await.unwrap();
    drop((disk, file));
    let disk = open_read_only(&dir, "a.qcow2").await;
    assert!(disk.info().bitmaps_outdated);
    assert_eq!(disk.bitmaps().await.unwrap(), []);
    drop(disk);
    // QEMU does not trust it either: it shows no bitmap, or one that cannot be used.
    let info = dir.qemu_img("info --output=json a.qcow2");
    assert!(!info.contains("nightly") || info.contains("in-use"), "{info}");
    // Nobody owns its clusters any more, which is a leak and no damage.
    let (code, text) = dir.run("qemu-img", &["check", "-f", "qcow2", "a.qcow2"]);
    assert_eq!(code, 3, "{text}");
    dir.qemu_img("check -q -r leaks a.qcow2");
    dir.assert_clean("a.qcow2");
}

/// Where the header extension of bitmaps begins.
fn extension_offset(image: &[u8]) -> usize {
    let kind = 0x2385_2875u32.to_be_bytes();
    image.windows(4).position(|bytes| bytes == kind).unwrap()
}

/// Where the directory lies, as the header extension says.
fn directory_offset(image: &[u8]) -> usize {
    let at = extension_offset(image);
    u64::from_be_bytes(image[at + 24..at + 32].try_into().unwrap()) as usize
}

#[tokio::test]
async fn bitmaps_that_share_a_table_take_no_more_memory_than_is_allowed() {
    const COUNT: u32 = 1025;
    let dir = Dir::new();
    dir.qemu_img("create -q -f qcow2 a.qcow2 2T");
    dir.qemu_img("bitmap --add -g 1M a.qcow2 nightly");
    let mut image = std::fs::read(dir.path("a.qcow2")).unwrap();
    // A table of 64 KiB, and entries that all name it.
    let table = image.len().next_multiple_of(1 << 16);
    let directory = table + (1 << 16);
    image.resize(directory, 0);
    let names: Vec<String> = (0..COUNT).map(|number| format!("{number:08}")).collect();
    for name in &names {
        image.extend((table as u64).to_be_bytes());
        image.extend(8192u32.to_be_bytes());
        // No flags; a bitmap of dirty ranges of 2^9 bytes; the length of the name; nothing more.
        image.extend([0, 0, 0, 0, 1, 9, 0, 8, 0, 0, 0, 0]);
        image.extend(name.as_bytes());
    }
    let at = extension_offset(&image) + 8;
    image[at..at + 4].copy_from_slice(&COUNT.to_be_bytes());
    image[at + 8..at + 16].copy_from_slice(&u64::from(COUNT * 32).to_be_bytes());
    image[at + 16..at + 24].copy_from_slice(&(directory as u64).to_be_bytes());
    std::fs::write(dir.path("a.qcow2"), &image).unwrap();

    let disk = open_read_only(&dir, "a.qcow2").await;
    let wanted = [&names[1], "none", &names[0]];
    let found = disk.open_bitmaps(&wanted).await.unwrap();
    let found: Vec<_> = found.iter().map(|bitmap| bitmap.as_ref().map(|b| b.name())).collect();
    assert_eq!(found, [Some("00000001"), None, Some("00000000")]);
    let error = disk.open_bitmaps(&names).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

#[tokio::test]
async fn a_bitmap_that_was_left_in_use_is_listed_and_not_opened() {
    let dir = Dir::new();
    dir.qemu_img("create -q -f qcow2 a.qcow2 1M");
    dir.qemu_img("bitmap --add a.qcow2 nightly");
    let mut image = std::fs::read(dir.path("a.qcow2")).unwrap();
    let entry = directory_offset(&image);
    image[entry + 15] |= 1;
    std::fs::write(dir.path("a.qcow2"), &image).unwrap();
    let disk = open_read_only(&dir, "a.qcow2").await;
    assert!(disk.bitmaps().await.unwrap()[0].in_use);
    let error = disk.bitmap("nightly").await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(error.to_string().contains("in use"), "{error}");
}

#[tokio::test]
async fn damage_of_bitmaps_is_an_error_and_never_clean() {
    let dir = Dir::new();
    dir.qemu_img("create -q -f qcow2 a.qcow2 64M");
    dir.qemu_img("bitmap --add a.qcow2 nightly");
    let (code, text) = dir.run("qemu-io", &["-f", "qcow2", "-c", "write -P 1 1M 1M", "a.qcow2"]);
    assert_eq!(code, 0, "{text}");
    let good = std::fs::read(dir.path("a.qcow2")).unwrap();
    let entry = directory_offset(&good);
    let table = u64::from_be_bytes(good[entry..entry + 8].try_into().unwrap()) as usize;
    let damages: [(&str, usize, &[u8]); 11] = [
        ("the table outside the file", entry, &[0, 0x7f, 0, 0, 0, 1, 0, 0]),
        ("the table not aligned", entry + 7, &[8]),
        ("a table of another length", entry + 11, &[2]),
        ("flags that are not known", entry + 12, &[1]),
        ("another kind", entry + 16, &[2]),
        ("a granularity of 256 bytes", entry + 17, &[8]),
        ("a granularity of 2^32 bytes", entry + 17, &[32]),
        ("no name", entry + 18, &[0, 0]),
        ("a name beyond the directory", entry + 18, &[3, 0]),
        ("extra data beyond everything", entry + 20, &[0xff, 0xff, 0xff, 0xff]),
        ("data outside the file", table, &[0, 0x7f, 0, 0, 0, 1, 0, 0]),
    ];
    for (what, at, bytes) in damages {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        std::fs::write(dir.path("a.qcow2"), &image).unwrap();
        let disk = open_read_only(&dir, "a.qcow2").await;
        let error = disk.bitmap("nightly").await.expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{what}: {error}");
    }
}
