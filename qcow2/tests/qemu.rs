//! qemu-img as the oracle: it accepts what we write, and we read what it writes.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use brep_block::{BlockDevice, CacheMode, RawFile, RawFileOptions};
use brep_qcow2::{BackingName, CheckMode, CreateOptions, MakeEmpty, OpenOptions, Qcow2, check};
use common::{Dir, Op, Rng, create, open, open_with, over, pattern, read_all};

const SIZE: u64 = 4 << 20;

/// Random requests; returns what the disk then contains.
async fn churn(disk: &Qcow2, mut model: Vec<u8>, seed: u64, count: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    for _ in 0..count {
        let op = Op::random(&mut rng, disk.size());
        op.apply(disk).await.unwrap();
        op.model(&mut model, disk).await;
    }
    assert!(read_all(disk).await == model, "contents differ from the model");
    model
}

#[tokio::test]
async fn qemu_reads_what_was_written_to_every_kind_of_image() {
    let kinds = [
        (16, 4, 3, false),
        (9, 4, 3, false),
        (9, 6, 3, false),
        (12, 0, 3, false),
        (16, 1, 3, false),
        (16, 2, 3, false),
        (16, 3, 3, false),
        (16, 5, 3, true),
        (14, 4, 3, true),
        (21, 4, 3, true),
        (16, 4, 2, false),
    ];
    for (i, (cluster_bits, refcount_order, version, extended_l2)) in kinds.into_iter().enumerate() {
        let dir = Dir::new();
        let file = dir.file("disk.qcow2");
        let options = CreateOptions {
            cluster_bits,
            refcount_order,
            version,
            extended_l2,
            ..CreateOptions::new(SIZE)
        };
        create(&file, &options).await;
        let disk = open(&file).await;
        let model = churn(&disk, vec![0; SIZE as usize], i as u64, 60).await;
        disk.close().await.unwrap();
        drop((disk, file));
        dir.assert_clean("disk.qcow2");
        dir.assert_content("disk.qcow2", &model);
    }
}

#[tokio::test]
async fn qemu_agrees_about_a_layer_over_a_backing_file() {
    for extended_l2 in [false, true] {
        let dir = Dir::new();
        let base = pattern(7, SIZE as usize - 3 * 65536 - 512);
        let backing = dir.raw("base.raw", &base);
        let file = dir.file("top.qcow2");
        let name = BackingName { name: "base.raw".into(), format: "raw".into() };
        let options =
            CreateOptions { extended_l2, backing_name: Some(name), ..CreateOptions::new(SIZE) };
        create(&file, &options).await;
        let disk = open_with(&file, over(&backing)).await;
        let mut model = base.clone();
        model.resize(SIZE as usize, 0);
        let model = churn(&disk, model, 3, 150).await;
        disk.close().await.unwrap();
        drop((disk, file, backing));
        dir.assert_clean("top.qcow2");
        dir.assert_content("top.qcow2", &model);
    }
}

#[tokio::test]
async fn an_emptied_image_is_accepted_and_its_space_used_again() {
    for how in [MakeEmpty::Keep, MakeEmpty::Release] {
        let dir = Dir::new();
        let base = pattern(7, SIZE as usize);
        let backing = dir.raw("base.raw", &base);
        let file = dir.file("top.qcow2");
        let name = BackingName { name: "base.raw".into(), format: "raw".into() };
        let options = CreateOptions { backing_name: Some(name), ..CreateOptions::buffer(SIZE) };
        create(&file, &options).await;
        let open = OpenOptions { ordered: false, ..over(&backing) };
        let disk = open_with(&file, open).await;
        let mut sizes = Vec::new();
        for round in 0..4 {
            let model = churn(&disk, base.clone(), round, 80).await;
            file.flush(brep_block::FlushLevel::Process).await.unwrap();
            assert!(!disk.is_empty().await.unwrap());
            dir.run("cp", &["top.qcow2", "copy.qcow2"]);
            let copy = dir.file("copy.qcow2");
            let report = check(&copy, CheckMode::Report).await.unwrap();
            assert_eq!(report.corruptions, 0, "as a kill would leave it: {report:?}");
            assert!(read_all(&*disk).await == model);
            sizes.push(file.size());
            disk.make_empty(how).await.unwrap();
            assert!(disk.is_empty().await.unwrap());
            assert_eq!(disk.allocated_bytes().await.unwrap(), 0);
            assert!(read_all(&*disk).await == base, "the layer below shows through");
            if how == MakeEmpty::Release {
                assert!(file.size() <= 262_144);
            }
        }
        if how == MakeEmpty::Keep {
            // No round can use more than the disk's size, and all use the same space.
            assert!(sizes.iter().all(|size| *size < SIZE + (SIZE >> 3)), "{sizes:?}");
        }
        disk.close().await.unwrap();
        drop((disk, file, backing));
        dir.assert_clean("top.qcow2");
        dir.assert_content("top.qcow2", &base);
    }
}

#[tokio::test]
async fn a_released_image_of_64_mib_has_four_clusters() {
    let dir = Dir::new();
    let file = dir.file("disk.qcow2");
    create(&file, &CreateOptions::new(64 << 20)).await;
    let disk = open(&file).await;
    churn(&disk, vec![0; 64 << 20], 1, 40).await;
    disk.make_empty(MakeEmpty::Release).await.unwrap();
    assert_eq!(file.size(), 262_144);
    disk.close().await.unwrap();
    drop((disk, file));
    dir.assert_clean("disk.qcow2");
    assert_eq!(std::fs::metadata(dir.path("disk.qcow2")).unwrap().len(), 262_144);
}

#[tokio::test]
async fn reads_and_changes_images_that_qemu_made() {
    let kinds = [
        "compat=1.1",
        "compat=0.10",
        "refcount_bits=1",
        "refcount_bits=2",
        "refcount_bits=8",
        "refcount_bits=64",
        "cluster_size=512",
        "cluster_size=4k",
        "cluster_size=2M",
        "extended_l2=on",
        "cluster_size=16k,extended_l2=on",
        "lazy_refcounts=on",
        "preallocation=metadata",
        "preallocation=metadata,extended_l2=on",
    ];
    for compressed in ["", "-c "] {
        for kind in kinds {
            if !compressed.is_empty() && kind.contains("preallocation") {
                continue;
            }
            let dir = Dir::new();
            let mut content = pattern(1, 3 << 20);
            content[1 << 20..2 << 20].fill(0);
            content[5000..200_000].fill(7);
            std::fs::write(dir.path("source.raw"), &content).unwrap();
            let line = format!("convert {compressed}-f raw -O qcow2 -o {kind} source.raw d.qcow2");
            dir.qemu_img(&line);
            let file = dir.file("d.qcow2");
            let disk = open(&file).await;
            assert!(read_all(&*disk).await == content, "{kind} {compressed}");
            let model = churn(&disk, content, 9, 40).await;
            disk.close().await.unwrap();
            drop((disk, file));
            dir.assert_clean("d.qcow2");
            dir.assert_content("d.qcow2", &model);
        }
    }
}

#[tokio::test]
async fn a_snapshot_keeps_its_contents() {
    for kind in ["compat=1.1", "compat=0.10", "extended_l2=on", "cluster_size=4k"] {
        let dir = Dir::new();
        let content = pattern(1, 3 << 20);
        std::fs::write(dir.path("source.raw"), &content).unwrap();
        for (i, how) in [None, Some(MakeEmpty::Keep), Some(MakeEmpty::Release)].iter().enumerate() {
            let name = format!("d{i}.qcow2");
            dir.qemu_img(&format!("convert -f raw -O qcow2 -o {kind} source.raw {name}"));
            dir.qemu_img(&format!("snapshot -c before {name}"));
            let file = dir.file(&name);
            let disk = open(&file).await;
            assert_eq!(disk.snapshots().len(), 1);
            let model = churn(&disk, content.clone(), 5, 60).await;
            let model = match how {
                None => model,
                Some(how) => {
                    disk.make_empty(*how).await.unwrap();
                    assert!(disk.is_empty().await.unwrap());
                    churn(&disk, vec![0; 3 << 20], 6, 20).await
                }
            };
            disk.close().await.unwrap();
            drop((disk, file));
            dir.assert_clean(&name);
            dir.assert_content(&name, &model);
            dir.qemu_img(&format!("snapshot -a before {name}"));
            dir.assert_content(&name, &content);
            let disk = open(&dir.file(&name)).await;
            assert!(read_all(&*disk).await == content);
        }
    }
}

#[tokio::test]
async fn a_grown_disk_is_accepted() {
    for cluster_bits in [9, 16] {
        let dir = Dir::new();
        let file = dir.file("disk.qcow2");
        create(&file, &CreateOptions { cluster_bits, ..CreateOptions::new(1 << 20) }).await;
        let disk = open(&file).await;
        let mut model = churn(&disk, vec![0; 1 << 20], 1, 30).await;
        disk.truncate(5 << 20).await.unwrap();
        model.resize(5 << 20, 0);
        assert!(read_all(&*disk).await == model);
        let model = churn(&disk, model, 2, 30).await;
        disk.close().await.unwrap();
        drop((disk, file));
        dir.assert_clean("disk.qcow2");
        dir.assert_content("disk.qcow2", &model);
    }
}

#[tokio::test]
async fn header_extensions_survive_and_do_not_disturb_qemu() {
    let dir = Dir::new();
    let file = dir.file("disk.qcow2");
    let name = BackingName { name: "b.raw".into(), format: "raw".into() };
    std::fs::write(dir.path("b.raw"), vec![1; 1 << 20]).unwrap();
    let tag: u32 = 0x6272_6570;
    let options = CreateOptions {
        backing_name: Some(name),
        header_extensions: vec![(tag, vec![1, 2, 3].into())],
        ..CreateOptions::new(1 << 20)
    };
    create(&file, &options).await;
    let backing: Arc<dyn BlockDevice> = brep_block::Memory::new("b", 1 << 20);
    let disk = open_with(&file, over(&backing)).await;
    assert_eq!(disk.header_extension(tag).as_deref(), Some(&[1, 2, 3][..]));
    disk.set_header_extension(tag, vec![9; 77].into()).await.unwrap();
    disk.set_header_extension(tag + 1, vec![8; 5].into()).await.unwrap();
    disk.make_empty(MakeEmpty::Release).await.unwrap();
    disk.close().await.unwrap();
    drop(disk);
    let disk = open_with(&file, over(&backing)).await;
    assert_eq!(disk.header_extension(tag).as_deref(), Some(&[9; 77][..]));
    assert_eq!(disk.header_extension(tag + 1).as_deref(), Some(&[8; 5][..]));
    assert_eq!(disk.backing_name().as_deref(), Some("b.raw"));
    disk.close().await.unwrap();
    let too_long = disk.set_header_extension(tag, vec![0; 70000].into()).await;
    assert!(too_long.is_err());
    drop((disk, file));
    dir.assert_clean("disk.qcow2");
    dir.assert_content("disk.qcow2", &vec![1; 1 << 20]);
}

#[tokio::test]
async fn an_image_past_the_page_cache_is_written_in_whole_blocks() {
    let dir = Dir::new();
    let options = RawFileOptions {
        create: Some(0),
        growable: true,
        cache: CacheMode::None,
        ..RawFileOptions::default()
    };
    let file: Arc<dyn BlockDevice> = match RawFile::open(dir.path("disk.qcow2"), options) {
        Ok(file) => file,
        Err(error) => return eprintln!("SKIP: direct I/O: {error}"),
    };
    for options in
        [CreateOptions::buffer(SIZE), CreateOptions { cluster_bits: 9, ..CreateOptions::new(SIZE) }]
    {
        create(&file, &options).await;
        let disk = open(&file).await;
        let model = churn(&disk, vec![0; SIZE as usize], 4, 60).await;
        disk.make_empty(MakeEmpty::Keep).await.unwrap();
        drop(model);
        let model = churn(&disk, vec![0; SIZE as usize], 5, 60).await;
        disk.close().await.unwrap();
        dir.run("cp", &["disk.qcow2", "copy.qcow2"]);
        dir.assert_clean("copy.qcow2");
        dir.assert_content("copy.qcow2", &model);
    }
}
