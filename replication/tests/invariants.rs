//! The invariants of the design, each as a test that fails when its mechanism is taken out.
//! Those that need a disk that fails or hangs are in the crate (`src/tests`).
#![allow(missing_docs)]

mod common;

use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, WriteFlags, ZeroFlags};
use bytes::Bytes;
use common::{MIB, Scratch, Side, connect, file, fill, read};
use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

async fn pair(scratch: &Scratch) -> (Side, Side) {
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.peer_timeout = Duration::from_secs(1);
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    (primary, secondary)
}

/// I2, I3, I5: whatever number of checkpoints came before, and however often an epoch overwrote a
/// range, a failover gives the last checkpoint: no pre-image of an epoch is overwritten by a later
/// write of it, and no buffer is reused while it is needed.
#[tokio::test]
async fn i02_i05_a_failover_gives_exactly_the_last_of_many_checkpoints() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    for round in 0..8u8 {
        for (i, offset) in [0, 4096, 70_000, 4096, 0].into_iter().enumerate() {
            fill(&*guest, offset, 5000, round * 16 + i as u8).await;
        }
        primary.checkpoint().await;
    }
    let checkpoint = file(&scratch.path("p.raw"));
    for byte in [0xe1, 0xe2, 0xe3] {
        fill(&*guest, 2000, 80_000, byte).await;
    }
    guest.close();
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    assert_eq!(file(&scratch.path("s.raw")), checkpoint);
    secondary.stop().await;
}

/// I7: overlapping writes and zeroes that are in flight together end equal on both sides.
#[tokio::test]
async fn i07_overlapping_changes_end_equal_on_both_sides() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let mut running = Vec::new();
    for i in 0..400u64 {
        let guest = Arc::clone(&guest);
        running.push(tokio::spawn(async move {
            let offset = i * 7919 % 9000;
            match i % 4 {
                0 => guest.write_zeroes(offset, 4000, ZeroFlags::default()).await,
                1 => guest.discard(offset, 4000).await,
                _ => {
                    let data = Bytes::from(vec![i as u8; 5000]);
                    guest.write(offset, data, WriteFlags::default()).await
                }
            }
        }));
    }
    for change in running {
        change.await.unwrap().unwrap();
    }
    assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I11: a secondary that has been promoted refuses its old primary for ever.
#[tokio::test]
async fn i11_a_promoted_secondary_is_not_overwritten_by_its_old_primary() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    secondary.command("failover", json!({})).await.unwrap();
    let promoted = connect(scratch.endpoint("s.sock"), "vda").await;
    fill(&*promoted, 0, 4096, 0x99).await;
    primary.wait("refused", |s| s["link"] == "refused").await;
    let error = primary.command("resync", json!({ "full": true })).await.unwrap_err();
    assert_eq!(error.exit_code(), 3, "{error}");
    assert_eq!(read(&*promoted, 0, 4096).await, vec![0x99; 4096]);
    promoted.close();
    primary.stop().await;
    secondary.stop().await;
}

/// I14: garbage on the replica's address harms nobody's session.
#[tokio::test]
async fn i14_garbage_on_the_address_of_the_link_harms_no_session() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let mut strangers = Vec::new();
    for byte in 0..16u8 {
        let mut socket = tokio::net::UnixStream::connect(scratch.path("s.sock")).await.unwrap();
        let _ = socket.write_all(&vec![byte; 4096]).await;
        strangers.push(socket);
    }
    // One that opens a link and speaks nonsense on it.
    let option = 0x6272_0000u32;
    let mut socket = tokio::net::UnixStream::connect(scratch.path("s.sock")).await.unwrap();
    let mut greeting = [0; 18];
    socket.read_exact(&mut greeting).await.unwrap();
    let mut hello = 3u32.to_be_bytes().to_vec();
    hello.extend_from_slice(b"IHAVEOPT");
    hello.extend_from_slice(&option.to_be_bytes());
    hello.extend_from_slice(&u32::MAX.to_be_bytes());
    let _ = socket.write_all(&hello).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 0, 4096, 0x31).await;
    primary.checkpoint().await;
    assert_eq!(file(&scratch.path("p.raw")), file(&scratch.path("s.raw")));
    assert_eq!(primary.status().await["link"], "connected");
    guest.close();
    drop(strangers);
    primary.stop().await;
    secondary.stop().await;
}

/// I15: sockets are for their owner alone, and so is the state.
#[tokio::test]
async fn i15_sockets_and_state_are_for_their_owner_alone() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let mode =
        |name: &str| std::fs::metadata(scratch.path(name)).unwrap().permissions().mode() & 0o777;
    for socket in ["s.sock", "p-guest.sock", "p.state/control.sock", "s.state/control.sock"] {
        assert_eq!(mode(socket), 0o600, "{socket}");
    }
    assert_eq!((mode("p.state"), mode("s.state")), (0o700, 0o700));
    primary.stop().await;
    secondary.stop().await;
}

/// I17: one state directory, one process; one disk, one writer.
#[tokio::test]
async fn i17_a_disk_and_a_state_directory_have_one_owner() {
    let scratch = Scratch::new();
    let (primary, secondary) = pair(&scratch).await;
    let again = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let error = again.ended().await.unwrap_err();
    assert_eq!(error.exit_code(), 3);
    assert!(error.to_string().contains("another brep runs"), "{error}");
    let mut config = scratch.primary(vec![scratch.disk("vda", "s.raw")]);
    config.state_dir = scratch.path("other.state");
    config.guest_listen = Some(scratch.endpoint("other.sock"));
    let error = Side::run(config).ended().await.unwrap_err();
    assert!(error.to_string().contains("s.raw"), "{error}");
    primary.stop().await;
    secondary.stop().await;
}
