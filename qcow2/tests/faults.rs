//! The n-th operation on the file fails: the error is reported, nothing is damaged, and what was
//! acknowledged stays.
#![allow(missing_docs)]

mod common;

use std::sync::Arc;

use brep_block::{BlockDevice, ErrorKind, Fault, FlushLevel, Memory, Operation, Rule, WriteFlags};
use brep_qcow2::{CheckMode, CreateOptions, MakeEmpty, OpenOptions, Qcow2, check};
use bytes::Bytes;
use common::{Op, Rng, create, memory, open, open_with, over, pattern, read_all};

const SIZE: u64 = 256 << 10;

struct Run {
    file: Arc<dyn BlockDevice>,
    backing: Arc<dyn BlockDevice>,
    /// What was acknowledged, and what the disk would contain if the failed request had succeeded.
    old: Vec<u8>,
    new: Vec<u8>,
    failed: bool,
}

/// Does the same requests each time; stops at the first that fails.
async fn run_with_fault(options: &CreateOptions, ordered: bool, rule: Rule, after: bool) -> Run {
    let file = memory();
    create(&file, options).await;
    let base = pattern(5, SIZE as usize);
    let backing: Arc<dyn BlockDevice> = Memory::new("backing", SIZE);
    backing.write(0, base.clone().into(), WriteFlags::default()).await.unwrap();
    let operation = rule.operation;
    let fault = Fault::new(file.clone());
    let faulty: Arc<dyn BlockDevice> = fault.clone();
    let disk =
        open_with(&faulty, OpenOptions { ordered, l2_cache_bytes: 0, ..over(&backing) }).await;
    if after {
        fault.fail_after(rule);
    } else {
        fault.fail(rule);
    }
    let mut rng = Rng::new(11);
    let mut run = Run { file, backing, old: base.clone(), new: base.clone(), failed: false };
    for i in 0..24 {
        let result = if i == 12 {
            run.new.clone_from(&base);
            disk.make_empty(MakeEmpty::Keep).await
        } else {
            let mut op = Op::random(&mut rng, SIZE);
            if let (Op::Discard { offset, len }, Operation::Read) = (&op, operation) {
                // The model would have to read the disk.
                op = Op::Zero { offset: *offset, len: *len, unmap: true };
            }
            let result = op.apply(&*disk).await;
            match (&op, &result) {
                (Op::Discard { offset, len }, Err(_)) => {
                    run.new[*offset as usize..(*offset + *len) as usize].fill(0);
                }
                _ => op.model(&mut run.new, &*disk).await,
            }
            result
        };
        if result.is_err() {
            run.failed = true;
            fault.clear();
            probe_after_failure(&disk, &mut run).await;
            return run;
        }
        run.old.clone_from(&run.new);
    }
    run.failed = disk.close().await.is_err();
    run
}

/// The handle goes on in a defined way: what it accepts it keeps, what it refuses it says.
async fn probe_after_failure(disk: &Qcow2, run: &mut Run) {
    let data = Bytes::from(pattern(77, 10_000));
    match disk.write(3000, data.clone(), WriteFlags::default()).await {
        Ok(()) => {
            run.old[3000..13_000].copy_from_slice(&data);
            run.new[3000..13_000].copy_from_slice(&data);
        }
        Err(error) => {
            assert!(matches!(error.kind(), ErrorKind::Sticky | ErrorKind::Corrupt), "{error:?}");
            let flush = disk.flush(FlushLevel::Durable).await.unwrap_err();
            assert!(matches!(flush.kind(), ErrorKind::Sticky | ErrorKind::Corrupt), "{flush:?}");
        }
    }
}

async fn survives_every_failure(options: CreateOptions, ordered: bool, operation: Operation) {
    for after in [false, true] {
        let mut failures = 0;
        for nth in 1.. {
            let rule = Rule::new(operation).nth(nth).errno(28);
            let run = run_with_fault(&options, ordered, rule, after).await;
            let what = format!("{operation} {nth}, after {after}, {options:?}");
            let report = check(&run.file, CheckMode::Report).await.unwrap();
            assert!(report.corruptions + report.check_errors == 0, "{what}: {report:?}");
            let disk = open_with(&run.file, over(&run.backing)).await;
            let now = read_all(&*disk).await;
            let wrong = (0..now.len()).step_by(512).find(|&at| {
                let part = at..at + 512;
                (now[part.clone()] != run.old[part.clone()] && now[part.clone()] != run.new[part])
                    && (at..at + 512).any(|i| now[i] != run.old[i] && now[i] != run.new[i])
            });
            assert_eq!(wrong, None, "{what}");
            if !run.failed {
                break;
            }
            failures += 1;
        }
        assert!(failures > 3, "{operation} failed {failures} times only");
    }
}

#[tokio::test]
async fn a_write_that_fails_anywhere_damages_nothing() {
    let standard = CreateOptions::new(SIZE);
    let tiny = CreateOptions { cluster_bits: 11, refcount_order: 6, ..standard.clone() };
    survives_every_failure(CreateOptions::buffer(SIZE), false, Operation::Write).await;
    survives_every_failure(standard, true, Operation::Write).await;
    survives_every_failure(tiny, true, Operation::Write).await;
}

#[tokio::test]
async fn a_flush_that_fails_anywhere_damages_nothing() {
    survives_every_failure(CreateOptions::new(SIZE), true, Operation::Flush).await;
}

#[tokio::test]
async fn a_read_that_fails_anywhere_damages_nothing() {
    // Two tables of 32 KiB each are kept: metadata is read again and again.
    let options = CreateOptions { cluster_bits: 9, ..CreateOptions::new(SIZE) };
    survives_every_failure(options, false, Operation::Read).await;
}

#[tokio::test]
async fn a_failed_durable_flush_is_remembered() {
    let file = memory();
    create(&file, &CreateOptions::new(SIZE)).await;
    let fault = Fault::new(file.clone());
    let disk = open(&(fault.clone() as Arc<dyn BlockDevice>)).await;
    disk.write(0, Bytes::from_static(b"x"), WriteFlags::default()).await.unwrap();
    fault.fail(Rule::new(Operation::Flush));
    assert!(disk.flush(FlushLevel::Durable).await.is_err());
    let again = disk.flush(FlushLevel::Durable).await.unwrap_err();
    assert_eq!(again.kind(), ErrorKind::Sticky);
    assert!(disk.close().await.is_err());
    assert_eq!(disk.read(0, 1).await.unwrap(), "x");
}

#[tokio::test]
async fn no_space_for_data_is_an_error_of_that_request_alone() {
    let file = memory();
    create(&file, &CreateOptions::new(SIZE)).await;
    let fault = Fault::new(file.clone());
    let disk = open(&(fault.clone() as Arc<dyn BlockDevice>)).await;
    disk.write(0, Bytes::from_static(b"x"), WriteFlags::default()).await.unwrap();
    fault.fail(Rule::new(Operation::Write).errno(28));
    let data = Bytes::from(vec![1; 65536]);
    let error = disk.write(65536, data.clone(), WriteFlags::default()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace);
    disk.write(65536, data.clone(), WriteFlags::default()).await.unwrap();
    disk.close().await.unwrap();
    assert!(check(&file, CheckMode::Report).await.unwrap().is_clean(), "a cluster was lost");
}

/// Points an L2 entry at a metadata cluster.
async fn cross_linked(target: u64) -> (Arc<dyn BlockDevice>, Vec<u8>) {
    let file = memory();
    create(&file, &CreateOptions::new(SIZE)).await;
    let disk = open(&file).await;
    disk.write(0, pattern(1, 65536).into(), WriteFlags::default()).await.unwrap();
    disk.close().await.unwrap();
    let word =
        async |at| u64::from_be_bytes(file.read(at, 8).await.unwrap()[..].try_into().unwrap());
    let l2 = word(word(40).await).await & !(1 << 63);
    let entry = target | 1 << 63;
    let data = Bytes::copy_from_slice(&entry.to_be_bytes());
    file.write(l2 + 8, data, WriteFlags::default()).await.unwrap();
    let content = read_all(&*file).await;
    (file, content)
}

#[tokio::test]
async fn data_never_overwrites_metadata() {
    // Header, refcount table, refcount block, L1 table; 4 is the L2 table.
    for target in [1, 2, 3, 4, 1 << 20] {
        let (file, before) = cross_linked(target << 16).await;
        let disk = open(&file).await;
        let write = disk.write(70_000, Bytes::from_static(b"data"), WriteFlags::default()).await;
        assert_eq!(write.unwrap_err().kind(), ErrorKind::Corrupt, "cluster {target}");
        let after = read_all(&*file).await;
        assert!(before[80..] == after[80..before.len()], "cluster {target} was overwritten");
        assert_eq!(after[79] & 2, 2, "the corrupt bit is set");
        let more = disk.write(0, Bytes::from_static(b"data"), WriteFlags::default()).await;
        assert_eq!(more.unwrap_err().kind(), ErrorKind::Corrupt);
        assert!(disk.read(0, 512).await.is_ok(), "what is whole can still be read");
    }
}

#[tokio::test]
async fn a_live_table_that_counts_as_free_is_not_handed_out() {
    let file = memory();
    create(&file, &CreateOptions::new(SIZE)).await;
    let disk = open(&file).await;
    disk.write(0, pattern(1, 65536).into(), WriteFlags::default()).await.unwrap();
    disk.close().await.unwrap();
    // The refcount of the L2 table, cluster 4, is lost.
    file.write(2 * 65536 + 8, vec![0, 0].into(), WriteFlags::default()).await.unwrap();
    let disk = open(&file).await;
    let write = disk.write(70_000, Bytes::from_static(b"data"), WriteFlags::default()).await;
    assert_eq!(write.unwrap_err().kind(), ErrorKind::Corrupt);
    assert_eq!(disk.read(0, 65536).await.unwrap(), pattern(1, 65536));
}
