//! The secondary's own guest, over many checkpoints.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use common::{MIB, Scratch, Side, connect, fill, read};

/// An active disk that a commit retires comes back as a hidden disk. It must not fall through to
/// the view that it has become a part of.
#[tokio::test]
async fn a_retired_active_disk_serves_again_as_a_hidden_disk() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 2);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.guest_listen = Some(scratch.endpoint("s-guest.sock"));
    let secondary = Side::run(config);
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let other = connect(scratch.endpoint("s-guest.sock"), "vda").await;
    for round in 0..6u8 {
        fill(&*guest, 0, 65536, 0x10 + round).await;
        fill(&*other, 131_072, 4096, 0x80 + round).await;
        primary.checkpoint().await;
        fill(&*guest, 0, 4096, 0x40 + round).await;
        let seen = read(&*other, 0, 262_144);
        let seen = tokio::time::timeout(Duration::from_secs(10), seen).await.expect("a read hangs");
        assert_eq!(seen[..65536], vec![0x10 + round; 65536], "round {round}");
        assert_eq!(seen[131_072], 1, "a commit drops the guest's own writes");
    }
    other.close();
    guest.close();
    primary.stop().await;
    secondary.stop().await;
}
