//! Every limit that is checked when an image is opened (specification §11), broken one by one.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use brep_block::{BlockDevice, ErrorKind, Memory, WriteFlags};
use brep_qcow2::{
    BackingName, CreateOptions, FormatError, OpenError, OpenOptions, Qcow2, extension,
};
use bytes::Bytes;
use common::{create, memory};

const RO: bool = true;
const RW: bool = false;

async fn patched(options: &CreateOptions, patches: &[(u64, &[u8])]) -> Arc<dyn BlockDevice> {
    let file = memory();
    create(&file, options).await;
    for (at, data) in patches {
        file.write(*at, Bytes::copy_from_slice(data), WriteFlags::default()).await.unwrap();
    }
    file
}

async fn refusal(file: &Arc<dyn BlockDevice>, read_only: bool) -> FormatError {
    let before = common::read_all(&**file).await;
    let options = OpenOptions { read_only, ignore_backing_name: true, ..OpenOptions::default() };
    let error = match Qcow2::open(Arc::clone(file), options).await {
        Err(OpenError::Format { error, .. }) => error,
        other => panic!("opened, or failed otherwise: {other:?}"),
    };
    assert!(common::read_all(&**file).await == before, "a refused image was changed");
    error
}

async fn refused(patches: &[(u64, &[u8])], read_only: bool) -> FormatError {
    let file = patched(&CreateOptions::new(1 << 30), patches).await;
    refusal(&file, read_only).await
}

fn u32s(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

fn u64s(value: u64) -> [u8; 8] {
    value.to_be_bytes()
}

#[tokio::test]
async fn a_foreign_magic() {
    assert_eq!(refused(&[(0, b"QFIX")], RO).await, FormatError::BadMagic);
    let short: Arc<dyn BlockDevice> = Memory::new_growable("file", 71);
    assert_eq!(refusal(&short, RO).await, FormatError::BadMagic);
    let empty: Arc<dyn BlockDevice> = Memory::new_growable("file", 0);
    assert_eq!(refusal(&empty, RW).await, FormatError::BadMagic);
}

#[tokio::test]
async fn an_unknown_version() {
    for version in [0, 1, 4] {
        let error = refused(&[(4, &u32s(version))], RO).await;
        assert_eq!(error, FormatError::UnsupportedVersion(version));
        assert_eq!(error.kind(), ErrorKind::Unsupported);
    }
}

#[tokio::test]
async fn a_cluster_size_out_of_range() {
    for bits in [0, 8, 22, 63, u32::MAX] {
        let error = refused(&[(20, &u32s(bits))], RO).await;
        assert_eq!(error, FormatError::UnsupportedClusterSize(bits));
    }
}

#[tokio::test]
async fn a_header_that_is_too_short_or_too_long() {
    assert_eq!(refused(&[(100, &u32s(103))], RO).await, FormatError::HeaderTooShort(103));
    assert_eq!(refused(&[(100, &u32s(65537))], RO).await, FormatError::HeaderTooLong(65537));
}

#[tokio::test]
async fn a_backing_name_outside_the_first_cluster() {
    assert_eq!(refused(&[(8, &u64s(65537))], RO).await, FormatError::BackingOffset(65537));
    let patches: [(u64, &[u8]); 2] = [(8, &u64s(65000)), (16, &u32s(537))];
    assert_eq!(refused(&patches, RO).await, FormatError::BackingNameTooLong(537));
    let patches: [(u64, &[u8]); 2] = [(8, &u64s(1024)), (16, &u32s(1024))];
    assert_eq!(refused(&patches, RO).await, FormatError::BackingNameTooLong(1024));
}

#[tokio::test]
async fn an_unknown_compression() {
    let patches: [(u64, &[u8]); 2] = [(72, &u64s(8)), (104, &[1])];
    assert_eq!(refused(&patches, RO).await, FormatError::UnknownCompressionType(1));
    assert_eq!(refused(&[(104, &[1])], RO).await, FormatError::CompressionBit(false));
    assert_eq!(refused(&[(72, &u64s(8))], RO).await, FormatError::CompressionBit(true));
}

#[tokio::test]
async fn unknown_features_are_named() {
    let error = refused(&[(72, &u64s(1 << 5 | 1 << 63))], RO).await;
    let text = error.to_string();
    assert!(text.contains("bit 5") && text.contains("bit 63"), "{text}");
    let mut entry = [0; 48];
    entry[1] = 5;
    entry[2..9].copy_from_slice(b"telepat");
    let names = (extension::FEATURE_NAMES, Bytes::copy_from_slice(&entry));
    let options = CreateOptions { header_extensions: vec![names], ..CreateOptions::new(1 << 20) };
    let file = patched(&options, &[(72, &u64s(1 << 5))]).await;
    assert_eq!(refusal(&file, RO).await, FormatError::UnsupportedFeatures("telepat".into()));
}

#[tokio::test]
async fn a_corrupt_image_is_read_but_not_written() {
    let file = patched(&CreateOptions::new(1 << 20), &[(72, &u64s(2))]).await;
    assert_eq!(refusal(&file, RW).await, FormatError::MarkedCorrupt);
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let disk = Qcow2::open(file, options).await.unwrap();
    assert!(disk.info().corrupt);
    assert_eq!(disk.read(0, 4).await.unwrap(), [0; 4][..]);
}

#[tokio::test]
async fn subclusters_that_are_too_small() {
    let options = CreateOptions { cluster_bits: 13, ..CreateOptions::new(1 << 20) };
    let file = patched(&options, &[(72, &u64s(16))]).await;
    assert_eq!(refusal(&file, RO).await, FormatError::SubclusterSize(256));
}

#[tokio::test]
async fn refcounts_that_are_too_wide() {
    for order in [7, 31, u32::MAX] {
        assert_eq!(refused(&[(96, &u32s(order))], RO).await, FormatError::RefcountOrder(order));
    }
}

#[tokio::test]
async fn a_refcount_table_that_is_missing_too_large_or_misplaced() {
    assert_eq!(refused(&[(56, &u32s(0))], RO).await, FormatError::NoRefcountTable);
    let error = refused(&[(56, &u32s(129))], RO).await;
    assert_eq!(error, FormatError::RefcountTableTooLarge(129));
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    for offset in [65537, 1 << 63, !0xffff] {
        let error = refused(&[(48, &u64s(offset))], RO).await;
        assert_eq!(error, FormatError::RefcountTableOffset(offset));
    }
}

#[tokio::test]
async fn a_snapshot_table_that_is_too_large_or_misplaced() {
    let error = refused(&[(60, &u32s(65537))], RO).await;
    assert_eq!(error, FormatError::TooManySnapshots(65537));
    let error = refused(&[(64, &u64s(0x1234))], RO).await;
    assert_eq!(error, FormatError::SnapshotTableOffset(0x1234));
    let error = refused(&[(60, &u32s(1)), (64, &u64s(1 << 40))], RO).await;
    assert!(matches!(error, FormatError::SnapshotTable(_)), "{error}");
}

#[tokio::test]
async fn a_snapshot_with_fields_out_of_range() {
    let entry = |l1: u64, entries: u32, extra: u32| {
        let mut entry = vec![0; 65536];
        entry[..8].copy_from_slice(&u64s(l1));
        entry[8..12].copy_from_slice(&u32s(entries));
        entry[36..40].copy_from_slice(&u32s(extra));
        entry
    };
    for entry in [
        entry(0x10001, 1, 16),
        entry(1 << 60, 1, 16),
        entry(0x10000, 4 << 20 | 1, 16),
        entry(0x10000, 1, 1025),
        entry(0x10000, 1, u32::MAX),
        entry(0x10000, 1, 8),
    ] {
        let patches: [(u64, &[u8]); 3] = [(60, &u32s(1)), (64, &u64s(0x40000)), (0x40000, &entry)];
        let error = refused(&patches, RO).await;
        assert!(matches!(error, FormatError::SnapshotTable(_)), "{error}");
    }
}

#[tokio::test]
async fn an_l1_table_that_is_too_large_too_small_or_misplaced() {
    let entries = (4 << 20) + 1;
    assert_eq!(refused(&[(36, &u32s(entries))], RO).await, FormatError::L1TooLarge(entries));
    for offset in [512, 1 << 63] {
        assert_eq!(refused(&[(40, &u64s(offset))], RO).await, FormatError::L1Offset(offset));
    }
    let error = refused(&[(36, &u32s(1))], RO).await;
    assert_eq!(error, FormatError::L1TooSmall { have: 1, need: 2 });
}

#[tokio::test]
async fn an_l1_table_beyond_the_end_of_the_file_is_no_empty_disk() {
    for offset in [1 << 40, (1 << 63) - (1 << 16)] {
        let error = refused(&[(40, &u64s(offset))], RO).await;
        assert!(matches!(error, FormatError::L1BeyondEnd { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_disk_that_is_too_big() {
    for size in [u64::MAX, 1 << 63] {
        assert_eq!(refused(&[(24, &u64s(size))], RO).await, FormatError::TooBig(size));
    }
    let size = (1 << 63) - 512;
    let error = refused(&[(24, &u64s(size))], RO).await;
    assert!(matches!(error, FormatError::TooBig(_) | FormatError::L1TooSmall { .. }), "{error}");
}

#[tokio::test]
async fn an_extension_that_leaves_its_area() {
    let patches: [(u64, &[u8]); 2] = [(112, &u32s(0x1234)), (116, &u32s(65417))];
    assert_eq!(refused(&patches, RO).await, FormatError::ExtensionTooLarge(0x1234));
    let patches: [(u64, &[u8]); 2] = [(112, &u32s(0x1234)), (116, &u32s(u32::MAX))];
    assert_eq!(refused(&patches, RO).await, FormatError::ExtensionTooLarge(0x1234));
}

/// Opens an image with one extension, which creating would refuse.
async fn with_extension(kind: u32, data: &[u8]) -> FormatError {
    let mut bytes = [u32s(kind), u32s(data.len() as u32)].concat();
    bytes.extend_from_slice(data);
    refused(&[(112, &bytes)], RO).await
}

#[tokio::test]
async fn a_backing_format_name_that_is_too_long() {
    let error = with_extension(extension::BACKING_FORMAT, &[b'x'; 16]).await;
    assert_eq!(error, FormatError::BackingFormatName(16));
}

#[tokio::test]
async fn a_bitmaps_extension_with_fields_out_of_range() {
    let make = |count: u32, reserved: u32, size: u64, offset: u64| {
        [&u32s(count)[..], &u32s(reserved), &u64s(size), &u64s(offset)].concat()
    };
    for data in [
        make(1, 0, 64, 0x10000)[..23].to_vec(),
        make(1, 1, 64, 0x10000),
        make(0, 0, 64, 0x10000),
        make(65536, 0, 64, 0x10000),
        make(1, 0, 1024 * 65535 + 1, 0x10000),
        make(1, 0, 64, 0x10001),
        make(1, 0, 64, 1 << 60),
    ] {
        let error = with_extension(extension::BITMAPS, &data).await;
        assert!(matches!(error, FormatError::BitmapsExtension(_)), "{error}");
    }
}

#[tokio::test]
async fn encryption_and_data_files_are_refused() {
    assert_eq!(refused(&[(32, &u32s(1))], RO).await, FormatError::Encrypted(1));
    let error = refused(&[(32, &u32s(2))], RO).await;
    assert!(matches!(error, FormatError::CryptoExtension(_)), "{error}");
    let error = with_extension(extension::CRYPTO, &[0; 16]).await;
    assert!(matches!(error, FormatError::CryptoExtension(_)), "{error}");
    let error = with_extension(extension::DATA_FILE, b"/etc/passwd").await;
    assert_eq!(error, FormatError::SuperfluousDataFile);
    assert_eq!(refused(&[(72, &u64s(4))], RO).await, FormatError::ExternalDataFile);
}

#[tokio::test]
async fn metadata_that_overlaps_is_not_written() {
    // The L1 table in the place of the refcount table, of the header, and of itself again.
    for l1 in [0x10000, 0] {
        let file = patched(&CreateOptions::new(1 << 20), &[(40, &u64s(l1))]).await;
        let error = refusal(&file, RW).await;
        assert!(matches!(error, FormatError::Overlap(_)), "{error}");
    }
}

#[tokio::test]
async fn a_backing_file_that_the_caller_did_not_give() {
    let name = BackingName { name: "/etc/passwd".into(), format: "raw".into() };
    let options = CreateOptions { backing_name: Some(name), ..CreateOptions::new(1 << 20) };
    let file = patched(&options, &[]).await;
    let error = Qcow2::open(file.clone(), OpenOptions::default()).await.unwrap_err();
    assert_eq!(error.format_error(), Some(&FormatError::BackingNotGiven("/etc/passwd".into())));
    let ignore = OpenOptions { ignore_backing_name: true, ..OpenOptions::default() };
    let disk = Qcow2::open(file.clone(), ignore).await.unwrap();
    assert_eq!(disk.read(0, 4).await.unwrap(), [0; 4][..]);
    drop(disk);
    let backing: Arc<dyn BlockDevice> = Memory::new("b", 1 << 20);
    assert!(Qcow2::open(file, common::over(&backing)).await.is_ok());
}

#[tokio::test]
async fn unknown_harmless_features_are_kept_and_unknown_autoclear_bits_cleared() {
    let options = CreateOptions::new(1 << 20);
    let patches: [(u64, &[u8]); 2] = [(80, &u64s(1 << 40)), (88, &u64s(0xff))];
    let file = patched(&options, &patches).await;
    let read_only = OpenOptions { read_only: true, ..OpenOptions::default() };
    Qcow2::open(file.clone(), read_only).await.unwrap();
    assert_eq!(file.read(88, 8).await.unwrap(), u64s(0xff)[..]);
    let disk = Qcow2::open(file.clone(), OpenOptions::default()).await.unwrap();
    assert_eq!(file.read(88, 8).await.unwrap(), u64s(0)[..]);
    disk.set_header_extension(7, Bytes::from_static(b"x")).await.unwrap();
    assert_eq!(file.read(80, 8).await.unwrap(), u64s(1 << 40)[..]);
}

#[tokio::test]
async fn options_that_the_format_does_not_allow_cannot_be_created() {
    let ok = CreateOptions::new(1 << 20);
    for options in [
        CreateOptions { size: 1000, ..ok.clone() },
        CreateOptions { version: 4, ..ok.clone() },
        CreateOptions { cluster_bits: 8, ..ok.clone() },
        CreateOptions { cluster_bits: 22, ..ok.clone() },
        CreateOptions { refcount_order: 7, ..ok.clone() },
        CreateOptions { version: 2, refcount_order: 5, ..ok.clone() },
        CreateOptions { version: 2, extended_l2: true, ..ok.clone() },
        CreateOptions { cluster_bits: 13, extended_l2: true, ..ok.clone() },
        CreateOptions { cluster_bits: 9, size: 1 << 40, ..ok.clone() },
        CreateOptions { size: u64::MAX - 511, ..ok.clone() },
        CreateOptions { header_extensions: vec![(5, vec![0; 65536].into())], ..ok.clone() },
        CreateOptions {
            backing_name: Some(BackingName { name: "x".repeat(1024), format: "raw".into() }),
            ..ok.clone()
        },
    ] {
        let file: Arc<dyn BlockDevice> = Memory::new_growable("file", 0);
        let result = Qcow2::create(&file, &options).await;
        assert!(matches!(result, Err(OpenError::Format { .. })), "{options:?}");
        assert_eq!(file.size(), 0, "a refused image left something behind");
    }
}

#[tokio::test]
async fn a_read_only_file_is_not_opened_for_writing() {
    let file = patched(&CreateOptions::new(1 << 20), &[]).await;
    let file: Arc<dyn BlockDevice> = brep_block::ReadOnly::new(file);
    let error = Qcow2::open(file.clone(), OpenOptions::default()).await.unwrap_err();
    assert!(matches!(error, OpenError::Device(e) if e.kind() == ErrorKind::ReadOnly));
    let options = OpenOptions { read_only: true, ..OpenOptions::default() };
    let disk = Qcow2::open(file, options).await.unwrap();
    let error = disk.write(0, Bytes::from_static(b"x"), WriteFlags::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::ReadOnly);
    disk.close().await.unwrap();
}
