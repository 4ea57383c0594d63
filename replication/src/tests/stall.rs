use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use brep_block::{Operation, Rule};

use super::common::{MIB, Scratch, Side, connect, file};
use super::{Pair, pass, write};
use crate::config::Ack;
use crate::image::faults;
use crate::state::faults::watch;

/// The local disk hangs for longer than the peer may be silent, with so many writes to one range. The
/// peer has the first and is there: it is not lost over that, and needs no copy afterwards.
async fn hang_locally(writes: u8) {
    let Pair { scratch, primary, secondary, local, .. } = Pair::new().await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let hang = local.upper.hang(Rule::new(Operation::Write));
    let slow = write(&guest, 8192, 0x66);
    hang.reached(1).await;
    let behind = (1..writes).map(|n| write(&guest, 8192, 0x66 + n));
    let writes: Vec<_> = std::iter::once(slow).chain(behind).collect();
    pass(Duration::from_millis(3500)).await;
    assert_eq!(primary.status().await["link"], "connected");
    hang.release();
    for write in writes {
        write.await.unwrap().unwrap();
    }
    primary.checkpoint().await;
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

#[tokio::test]
async fn a_local_disk_that_hangs_does_not_lose_the_peer() {
    hang_locally(1).await;
}

/// The second waits for its range, and not for the peer.
#[tokio::test]
async fn a_write_that_waits_for_one_that_hangs_locally_does_not_lose_the_peer() {
    hang_locally(2).await;
}

/// The same, while checkpoints are due: what a cut holds back waits for the local disk only so
/// long, and then no cut is tried before that has ended.
#[tokio::test]
async fn a_checkpoint_that_waits_for_the_local_disk_does_not_lose_the_peer() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.peer_timeout = Duration::from_secs(2);
    config.checkpoint_interval = Some(Duration::from_millis(100));
    let primary = Side::run(config);
    let line = primary.wait_state("in-sync").await["cur"].clone();
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let hang = faults::of(&scratch.path("p.raw")).upper.hang(Rule::new(Operation::Write));
    let slow = write(&guest, 8192, 0x66);
    hang.reached(1).await;
    // It is tried once, and given up.
    let cuts = Arc::new(AtomicU64::new(0));
    let count = Arc::clone(&cuts);
    let counts = move || {
        count.fetch_add(1, Ordering::Relaxed);
    };
    watch(&scratch.path("p.state"), Some(Arc::new(counts)));
    for _ in 0..35 {
        let held = write(&guest, 65536, 0x67);
        pass(Duration::from_millis(100)).await;
        while !held.is_finished() {
            pass(Duration::from_millis(50)).await;
        }
        held.await.unwrap().unwrap();
    }
    watch(&scratch.path("p.state"), None);
    let status = primary.status().await;
    assert_eq!(status["cur"], line, "the peer was lost");
    assert!(status["reason"].as_str().unwrap().contains("the local disk is stuck"), "{status:#}");
    assert!(cuts.load(Ordering::Relaxed) <= 1, "cuts are tried again and again: {cuts:?}");
    hang.release();
    slow.await.unwrap().unwrap();
    primary.checkpoint().await;
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I17: the window bounds what is on its way to the peer, in requests and in bytes.
#[tokio::test]
async fn i17_no_more_is_on_its_way_to_the_peer_than_the_window_holds() {
    for (requests, bytes) in [(2, 64 << 20), (4096, 2 * 4096)] {
        let scratch = Scratch::new();
        scratch.raw("p.raw", MIB, 1);
        scratch.raw("s.raw", MIB, 2);
        let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
        let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
        config.ack = Ack::Async;
        config.window_requests = requests;
        config.window_bytes = bytes;
        let primary = Side::run(config);
        primary.wait_state("in-sync").await;
        let disk = faults::of(&scratch.path("s.raw"));
        let hang = disk.upper.hang(Rule::new(Operation::Write).forever());
        let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
        let writes: Vec<_> = (0..8).map(|i| write(&guest, i * 4096, 0x5a)).collect();
        hang.reached(2).await;
        let early = tokio::time::timeout(Duration::from_millis(300), hang.reached(3)).await;
        assert!(early.is_err(), "a third write was sent: {requests} requests, {bytes} bytes");
        let acknowledged = writes.iter().filter(|w| w.is_finished()).count();
        assert_eq!(acknowledged, 2, "no write is acknowledged that has no place in the window");
        hang.release();
        for write in writes {
            write.await.unwrap().unwrap();
        }
        guest.close();
        primary.stop().await;
        assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
        secondary.stop().await;
    }
}
