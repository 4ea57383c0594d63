//! With a qcow2 image as the target, which is what a replica's pre-images go to.

mod common;

use std::path::Path;
use std::process::Command;
use std::sync::Arc;

use brep_backup::{CbwOptions, Copied, CopyBeforeWrite, SnapshotAccess};
use brep_block::{BlockDevice, Memory, Operation, RawFile, RawFileOptions, WriteFlags, ZeroFlags};
use brep_qcow2::{BackingName, CreateOptions, MakeEmpty, OpenOptions, Qcow2};
use bytes::Bytes;
use common::Probe;

const SIZE: u64 = 1 << 20;

async fn buffer(file: Arc<dyn BlockDevice>, create: bool) -> Arc<Qcow2> {
    if create {
        Qcow2::create(&file, &CreateOptions::buffer(SIZE)).await.unwrap();
    }
    let options = OpenOptions { name: "hidden".into(), ordered: false, ..Default::default() };
    Qcow2::open(file, options).await.unwrap()
}

fn filter(source: &Arc<Probe>, target: &Arc<Qcow2>, assume: Copied) -> Arc<CopyBeforeWrite> {
    let mut options = CbwOptions::new("cbw").unit_of(&**target);
    options.assume = assume;
    options.discard_as_zeroes = true;
    CopyBeforeWrite::new(source.clone(), target.clone(), options).unwrap()
}

/// The content that a restarted process finds in a copy of the target's file.
async fn after_a_kill(source: &Arc<Probe>, file: &Arc<Memory>) -> Vec<u8> {
    let copy = Memory::new_growable("copy", file.size());
    let content = file.read(0, file.size() as usize).await.unwrap();
    copy.write(0, content, WriteFlags::default()).await.unwrap();
    let target = buffer(copy, false).await;
    let filter = filter(source, &target, Copied::AllocatedInTarget);
    let view = SnapshotAccess::new("view", &filter);
    view.read(0, SIZE as usize).await.unwrap().to_vec()
}

async fn settle() {
    for _ in 0..50 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_small_write_copies_its_sub_clusters_only() {
    let source = Probe::new("disk", SIZE);
    source.fill(0x11);
    let target = buffer(Memory::new_growable("file", 0), true).await;
    let filter = filter(&source, &target, Copied::Nothing);
    assert_eq!(filter.unit_bytes(), 2048);
    filter.write(8192, Bytes::from(vec![1; 4096]), WriteFlags::default()).await.unwrap();
    assert_eq!(target.allocated_bytes().await.unwrap(), 4096);
}

/// An image made by somebody else may allocate whole clusters; the next one need not.
#[tokio::test]
async fn each_epoch_copies_what_its_target_allocates_at_a_time() {
    let source = Probe::new("disk", SIZE);
    source.fill(0x11);
    let file = Memory::new_growable("file", 0) as Arc<dyn BlockDevice>;
    Qcow2::create(&file, &CreateOptions::new(SIZE)).await.unwrap();
    let coarse = buffer(file, false).await;
    let fine = buffer(Memory::new_growable("file", 0), true).await;
    let filter = filter(&source, &coarse, Copied::Nothing);
    let view = SnapshotAccess::new("view", &filter);
    let write = async |at: u64, byte: u8| {
        filter.write(at, Bytes::from(vec![byte; 512]), WriteFlags::default()).await.unwrap();
    };
    for (target, unit) in [(&coarse, 65536), (&fine, 2048), (&coarse, 65536)] {
        let checkpoint = source.content();
        target.make_empty(MakeEmpty::Keep).await.unwrap();
        filter.switch_target_with_unit(target.clone(), target.subcluster_size()).unwrap();
        assert_eq!(filter.unit_bytes(), unit);
        write(70_000, 0x22).await;
        write(76_000, 0x33).await;
        let expected = if unit == 65536 { unit } else { 2 * unit };
        assert_eq!(target.allocated_bytes().await.unwrap(), expected);
        let shown = view.read(0, SIZE as usize).await.unwrap();
        assert!(shown == checkpoint, "unit {unit}");
    }
    let odd = filter.switch_target_with_unit(fine.clone(), 3000).unwrap_err();
    assert!(odd.to_string().contains("no power of two"), "{odd}");
    assert_eq!(filter.unit_bytes(), 65536);
}

#[tokio::test]
async fn a_kill_at_any_moment_finds_every_pre_image() {
    let source = Probe::new("disk", SIZE);
    source.fill(0x11);
    let zeroes = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
    source.write_zeroes(64 << 10, 200 << 10, zeroes).await.unwrap();
    let file = Memory::new_growable("file", 0);
    let target = buffer(file.clone(), true).await;
    let filter = filter(&source, &target, Copied::Nothing);
    let checkpoint = source.content();

    // Every request is stopped just before and just after it reaches the source.
    let changes = [Operation::Write, Operation::WriteZeroes];
    let gate = source.hold_if(move |op| changes.contains(&op.operation));
    for i in 0..24u64 {
        let offset = (i * 0x1_7353) % (SIZE - 5000);
        let request = match i % 3 {
            0 => filter.write_zeroes(offset, 4999, ZeroFlags::default()),
            1 => filter.discard(offset, 3000),
            _ => filter.write(offset, Bytes::from(vec![0x22; 5000]), WriteFlags::default()),
        };
        settle().await;
        assert!(after_a_kill(&source, &file).await == checkpoint, "before request {i}");
        gate.add_permits(1);
        request.await.unwrap();
        assert!(after_a_kill(&source, &file).await == checkpoint, "after request {i}");
    }
    assert!(source.content() != checkpoint);
}

#[tokio::test]
async fn after_a_restart_pre_images_are_kept_and_not_copied_again() {
    let source = Probe::new("disk", SIZE);
    source.fill(0x11);
    let checkpoint = source.content();
    let file = Memory::new_growable("file", 0);
    let target = buffer(file.clone(), true).await;
    let first = filter(&source, &target, Copied::Nothing);
    first.write(10_000, Bytes::from(vec![0x22; 9000]), WriteFlags::default()).await.unwrap();
    drop((first, target));

    let target = buffer(file, false).await;
    let before = target.allocated_bytes().await.unwrap();
    let second = filter(&source, &target, Copied::AllocatedInTarget);
    second.write(10_000, Bytes::from(vec![0x33; 9000]), WriteFlags::default()).await.unwrap();
    assert_eq!(second.stats().copied_bytes, 0);
    assert_eq!(target.allocated_bytes().await.unwrap(), before);
    second.write(30_000, Bytes::from(vec![0x33; 10]), WriteFlags::default()).await.unwrap();
    assert_eq!(second.stats().copied_bytes, 2048);
    let view = SnapshotAccess::new("view", &second);
    assert!(view.read(0, SIZE as usize).await.unwrap() == checkpoint);
}

#[tokio::test]
async fn emptied_buffers_take_the_pre_images_of_the_next_epoch() {
    let source = Probe::new("disk", SIZE);
    source.fill(0x11);
    let targets = [
        buffer(Memory::new_growable("file0", 0), true).await,
        buffer(Memory::new_growable("file1", 0), true).await,
    ];
    let filter = filter(&source, &targets[0], Copied::Nothing);
    let view = SnapshotAccess::new("view", &filter);
    for epoch in 1..8u8 {
        let checkpoint = source.content();
        for i in 0..10u64 {
            let offset = (i * 0x2_1357 + u64::from(epoch) * 777) % (SIZE - 4096);
            let data = Bytes::from(vec![epoch; 4096]);
            filter.write(offset, data, WriteFlags::default()).await.unwrap();
        }
        assert!(view.read(0, SIZE as usize).await.unwrap() == checkpoint, "epoch {epoch}");
        filter.drain().await;
        let next = targets[usize::from(epoch % 2)].clone();
        let old = filter.switch_target(next).unwrap();
        view.drain().await;
        let old = targets.iter().find(|t| Arc::ptr_eq(&((*t).clone() as _), &old)).unwrap();
        old.make_empty(MakeEmpty::Keep).await.unwrap();
    }
}

fn qemu_img(arguments: &[&str], directory: &Path) -> Option<bool> {
    let run = Command::new("qemu-img").args(arguments).current_dir(directory).output();
    match run {
        Ok(output) => {
            let text = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
            Some(true)
        }
        Err(_) => None,
    }
}

#[tokio::test]
async fn qemu_img_reads_the_checkpoint_through_the_target() {
    let name = "qemu_img_reads_the_checkpoint_through_the_target";
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let open = |name: &str, size| {
        let options = RawFileOptions { create: Some(size), ..RawFileOptions::default() };
        RawFile::open(path(name), options)
    };
    let source = open("disk.raw", SIZE).unwrap();
    let content: Vec<u8> = (0..SIZE).map(|i| (i / 512 % 251) as u8).collect();
    std::fs::write(path("checkpoint.raw"), &content).unwrap();
    source.write(0, content.into(), WriteFlags::default()).await.unwrap();

    let options = RawFileOptions { growable: true, create: Some(0), ..RawFileOptions::default() };
    let file: Arc<dyn BlockDevice> = RawFile::open(path("hidden.qcow2"), options).unwrap();
    let backing = BackingName { name: "disk.raw".into(), format: "raw".into() };
    let create = CreateOptions { backing_name: Some(backing), ..CreateOptions::buffer(SIZE) };
    Qcow2::create(&file, &create).await.unwrap();
    let open = OpenOptions { backing: Some(source.clone()), ..OpenOptions::default() };
    let target = Qcow2::open(file, open).await.unwrap();
    let options = CbwOptions::new("cbw").unit_of(&*target);
    let filter = CopyBeforeWrite::new(source, target.clone(), options).unwrap();
    for i in 0..60u64 {
        let offset = (i * 0x3_1357) % (SIZE - 9000);
        let data = Bytes::from(vec![0xEE; (i * 150 % 9000 + 1) as usize]);
        filter.write(offset, data, WriteFlags::default()).await.unwrap();
    }
    filter.write_zeroes(500_000, 100_000, ZeroFlags::default()).await.unwrap();
    target.close().await.unwrap();
    drop((filter, target));

    let compare = ["compare", "-f", "qcow2", "-F", "raw", "hidden.qcow2", "checkpoint.raw"];
    if qemu_img(&["check", "-q", "hidden.qcow2"], directory.path()).is_none()
        || qemu_img(&compare, directory.path()).is_none()
    {
        eprintln!("SKIP: {name}: qemu-img not found");
    }
}
