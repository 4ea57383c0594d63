use bytes::Bytes;

use super::*;

fn pool(dir: &Path, size: u64) -> BufferPool {
    BufferPool::new(dir, "vda", size, None, Durability::Process)
}

/// The number of a buffer that a process has taken, which has ended since.
async fn one_taken(dir: &Path, set: SetId) -> u64 {
    let pool = pool(dir, 1 << 20);
    pool.open(Some(set), &[], 0, false, false).await.unwrap();
    pool.take(set).await.unwrap().seq
}

/// A process that is killed while it makes a buffer must not keep the next from its
/// checkpoint.
#[tokio::test]
async fn what_a_killed_process_was_making_does_not_keep_the_others_from_being_opened() {
    let dir = tempfile::tempdir().unwrap();
    let set = SetId::random();
    let seq = one_taken(dir.path(), set).await;
    let unfinished = dir.path().join("vda.1.qcow2.new");
    std::fs::write(&unfinished, b"QFI\xfb").unwrap();
    std::fs::write(dir.path().join("vda.2.qcow2"), b"").unwrap();
    let pool = pool(dir.path(), 1 << 20);
    let named = pool.open(Some(set), &[BufferRef { seq }], seq, false, false).await.unwrap();
    assert_eq!(named[0].seq, seq);
    assert!(!unfinished.exists());
    for _ in 0..3 {
        pool.take(set).await.unwrap();
    }
    let missing =
        pool.open(Some(set), &[BufferRef { seq: 99 }], seq, false, false).await.unwrap_err();
    assert!(missing.to_string().contains("vda.2.qcow2"), "{missing}");
    let missing = pool.open(Some(set), &[BufferRef { seq: 99 }], seq, false, true).await;
    let missing = missing.unwrap_err().to_string();
    assert!(missing.contains("Do not remove the state directory"), "{missing}");
    assert!(!missing.contains("move the state directory away"), "nobody else has that: {missing}");
}

#[tokio::test]
async fn what_a_power_loss_has_left_of_a_buffer_that_nobody_names_does_not_stay_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let set = SetId::random();
    let seq = one_taken(dir.path(), set).await;
    // Its name was flushed, and its contents were not.
    let torn = dir.path().join("vda.1.qcow2");
    std::fs::write(&torn, [0; 4096]).unwrap();
    let open = async |seq: u64, power_lost: bool| {
        let wanted = [BufferRef { seq }];
        pool(dir.path(), 1 << 20).open(Some(set), &wanted, seq, power_lost, false).await
    };
    open(99, true).await.unwrap_err();
    assert!(torn.exists(), "it may be what is missing");
    open(seq, false).await.unwrap();
    assert!(torn.exists(), "no power was lost: nobody knows how that came");
    open(seq, true).await.unwrap();
    assert!(!torn.exists());
}

#[tokio::test]
async fn a_spare_gives_space_back_slowly_when_epochs_have_become_small() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().unwrap();
    let set = SetId::random();
    let pool = pool(dir.path(), 256 << 20);
    pool.open(Some(set), &[], 0, false, false).await.unwrap();
    let epoch = async |bytes: u64| {
        let buffer = pool.take(set).await.unwrap();
        let mut at = 0;
        while at < bytes {
            let len = (bytes - at).min(1 << 20);
            let data = Bytes::from(vec![7; len as usize]);
            buffer.device().write(at, data, Default::default()).await.unwrap();
            at += len;
        }
        pool.note_use(bytes);
        pool.recycle(buffer).await.unwrap();
        let file = std::fs::metadata(dir.path().join("vda.0.qcow2")).unwrap();
        file.blocks() * 512
    };
    let large = epoch(64 << 20).await;
    assert!(large >= 64 << 20, "a spare keeps its space: {large}");
    let mut last = large;
    for _ in 1..RECENT_EPOCHS {
        last = epoch(4096).await;
    }
    assert_eq!(last, large, "a busy epoch is remembered");
    let first = epoch(4096).await;
    assert!(first < large && first >= large - (32 << 20), "piece by piece: {first}");
    for _ in 0..8 {
        last = epoch(4096).await;
    }
    assert!(last <= SPACE_MARGIN_BYTES + (2 << 20), "down to the margin: {last}");
}

/// A buffer that was given up is being emptied when its disk grows.
#[tokio::test]
async fn a_buffer_that_comes_back_after_its_disk_has_grown_is_as_large_when_it_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    let set = SetId::random();
    let pool = pool(dir.path(), 1 << 20);
    pool.open(Some(set), &[], 0, false, false).await.unwrap();
    let [spare, given_up] = [pool.take(set).await.unwrap(), pool.take(set).await.unwrap()];
    pool.recycle(spare).await.unwrap();
    pool.grow(3 << 20);
    pool.recycle(given_up).await.unwrap();
    for _ in 0..3 {
        let buffer = pool.take(set).await.unwrap();
        assert_eq!(buffer.device().size(), 3 << 20);
        let end = (3 << 20) - 512;
        buffer.device().write(end, Bytes::from(vec![7; 512]), Default::default()).await.unwrap();
    }
}
