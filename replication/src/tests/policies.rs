use std::time::Duration;

use brep_block::{BlockDevice, Operation, Rule};
use serde_json::{Value, json};

use super::common::{MIB, Scratch, Side, connect, file, fill, read};
use super::write;
use crate::config::{Ack, OnPeerLost, OnSlowPeer, SideConfig};
use crate::image::faults;

const SOON: Duration = Duration::from_millis(300);

fn secondary(scratch: &Scratch) -> Side {
    Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]))
}

fn suspending(scratch: &Scratch) -> SideConfig {
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.on_peer_lost = OnPeerLost::Suspend;
    config.peer_timeout = Duration::from_secs(1);
    config
}

fn disks(size: u64) -> Scratch {
    let scratch = Scratch::new();
    scratch.raw("p.raw", size, 1);
    scratch.raw("s.raw", size, 2);
    scratch
}

fn held(status: &Value) -> bool {
    status["held-writes"].as_u64() >= Some(1)
}

/// I8: under `suspend` writes are held, and shown as held; reads go on.
#[tokio::test]
async fn i08_writes_are_held_until_the_secondary_is_back_and_reads_go_on() {
    let scratch = disks(MIB);
    let first = secondary(&scratch);
    let primary = Side::run(suspending(&scratch));
    let line = primary.wait_state("in-sync").await["cur"].clone();
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    // One that is on its way when the secondary is lost, and one after that.
    let disk = faults::of(&scratch.path("s.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Write));
    let flying = write(&guest, 0, 0x41);
    hang.reached(1).await;
    primary.wait_state("disconnected").await;
    let late = write(&guest, 65536, 0x42);
    primary.wait("held writes", |s| s["held-writes"] == 2).await;
    assert_eq!(read(&*guest, 8192, 4).await.len(), 4);
    tokio::time::sleep(SOON).await;
    assert!(!flying.is_finished() && !late.is_finished(), "acknowledged without the secondary");
    let status = primary.status().await;
    assert_eq!(status["cur"], line, "nobody was told anything that the secondary lacks");
    assert!(status["advice"].as_str().unwrap().contains("resume --lonely"), "{status:#}");
    primary.command("resume", json!({})).await.unwrap_err();
    hang.release();
    for write in [flying, late] {
        write.await.unwrap().unwrap();
    }
    assert!(primary.wait_state("in-sync").await["held-writes"].is_null());
    guest.close();
    primary.stop().await;
    first.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

#[tokio::test]
async fn held_writes_go_on_alone_by_command_and_a_restart_asks_the_secondary_first() {
    let scratch = disks(MIB);
    let there = secondary(&scratch);
    let primary = Side::run(suspending(&scratch));
    let line = primary.wait_state("in-sync").await["cur"].clone();
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    there.stop().await;
    let waiting = write(&guest, 0, 0x43);
    primary.wait("a held write", held).await;
    primary.command("resume", json!({ "lonely": true })).await.unwrap();
    waiting.await.unwrap().unwrap();
    let status = primary.status().await;
    assert_ne!(status["cur"], line, "a line of its own, before the write was acknowledged");
    assert!(status["held-writes"].is_null());
    primary.command("resume", json!({ "lonely": true })).await.unwrap_err();
    guest.close();
    let there = secondary(&scratch);
    primary.wait_state("in-sync").await;
    there.stop().await;
    primary.wait("held again", |s| s["held-writes"] == 0).await;
    primary.stop().await;
    let primary = Side::run(suspending(&scratch));
    let waits = |s: &Value| s["reason"].as_str().is_some_and(|r| r.contains("guest is not served"));
    primary.wait("a hello", waits).await;
    let there = secondary(&scratch);
    primary.wait_state("in-sync").await;
    primary.stop().await;
    there.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

/// I8: the peer is back, and is the disk now: nobody may let go on what is held for it.
#[tokio::test]
async fn i08_held_writes_fail_when_the_secondary_turns_out_to_be_promoted() {
    let scratch = disks(MIB);
    let there = secondary(&scratch);
    let primary = Side::run(suspending(&scratch));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    primary.checkpoint().await;
    there.stop().await;
    let waiting = write(&guest, 0, 0x43);
    primary.wait("a held write", held).await;
    // Where the primary does not find it.
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.listen = Some(scratch.endpoint("elsewhere.sock"));
    let there = Side::run(config);
    there.wait("there", |s| s["role"] == "secondary").await;
    there.command("failover", json!({})).await.unwrap();
    assert!(!waiting.is_finished());
    let uri = format!("nbd+unix:///?socket={}", scratch.path("elsewhere.sock").display());
    primary.command("peer-set", json!({ "uri": uri })).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), waiting).await;
    let Ok(ended) = ended else {
        panic!("held for ever: {:#} {:#}", primary.status().await, there.status().await)
    };
    ended.unwrap().unwrap_err();
    guest.read(0, 512).await.unwrap_err();
    primary.command("resume", json!({ "lonely": true })).await.unwrap_err();
    guest.close();
    primary.stop().await;
    there.stop().await;
}

/// A disk that grows takes a session, and not the promise that nothing is written alone.
#[tokio::test]
async fn writes_are_held_while_a_disk_that_has_grown_waits_for_its_next_session() {
    let scratch = disks(MIB);
    let there = secondary(&scratch);
    let primary = Side::run(suspending(&scratch));
    let line = primary.wait_state("in-sync").await["cur"].clone();
    let arguments = json!({ "device": "vda", "size": 2 * MIB });
    primary.command("block_resize", arguments).await.unwrap();
    let grown = |s: &Value| s["disks"][0]["size"] == 2 * MIB && s["disks"][0]["state"] == "in-sync";
    let status = primary.wait("grown", grown).await;
    assert_eq!(status["cur"], line, "nothing was written alone");
    primary.stop().await;
    there.stop().await;
}

/// A peer that answers, and too slowly: each write would wait for it a little less than what loses
/// it.
#[tokio::test]
async fn a_window_that_stays_full_leaves_the_secondary_behind_and_holds_nothing() {
    let scratch = disks(4 * MIB);
    let there = secondary(&scratch);
    let mut config = suspending(&scratch);
    config.peer_timeout = Duration::from_secs(30);
    config.ack = Ack::Async;
    config.window_requests = 4;
    config.slow_peer_limit = Some(Duration::from_millis(800));
    config.on_slow_peer = OnSlowPeer::PullAhead;
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let disk = faults::of(&scratch.path("s.raw"));
    let hang = disk.upper.hang(Rule::new(Operation::Write).forever());
    let writes: Vec<_> = (0..12).map(|i| write(&guest, i * 65536, 0x5a)).collect();
    for write in writes {
        tokio::time::timeout(Duration::from_secs(10), write).await.unwrap().unwrap().unwrap();
    }
    let status = primary.wait_state("disconnected").await;
    assert!(status["reason"].as_str().unwrap().contains("too slow"), "{status:#}");
    assert!(status["held-writes"].is_null(), "{status:#}");
    hang.release();
    primary.wait_state("in-sync").await;
    guest.close();
    primary.stop().await;
    there.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

/// At half of the budget a checkpoint is asked for: an epoch may then be as long as it likes.
#[tokio::test]
async fn a_budget_that_is_half_used_brings_a_checkpoint_early() {
    let scratch = disks(8 * MIB);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.buffer_limit = Some(2 * MIB);
    let there = Side::run(config);
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    for round in 0..4 {
        let before = primary.status().await["checkpoint"].as_u64();
        fill(&*guest, round * MIB, MIB as usize, 0x61).await;
        primary.wait("an early checkpoint", |s| s["checkpoint"].as_u64() > before).await;
    }
    assert_eq!(primary.status().await["link"], "connected");
    guest.close();
    primary.stop().await;
    there.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

/// I10: where an early checkpoint is not possible, the last one stays whole, the guest goes on, and
/// the pair comes together again when the checkpoint is given up for it.
#[tokio::test]
async fn i10_a_budget_that_is_used_up_keeps_the_checkpoint_and_ends_forwarding() {
    for discard in [false, true] {
        let scratch = disks(8 * MIB);
        let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
        config.buffer_limit = Some(MIB);
        // Checkpoints are a manager's where a guest runs.
        config.guest_listen = Some(scratch.endpoint("s-guest.sock"));
        let there = Side::run(config);
        let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
        primary.wait_state("in-sync").await;
        let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
        fill(&*guest, 0, 65536, 0x70).await;
        primary.checkpoint().await;
        let then = file(&scratch.path("p.raw"));
        fill(&*guest, 0, 3 * MIB as usize, 0x71).await;
        for offset in [4 * MIB, 5 * MIB] {
            fill(&*guest, offset, 65536, 0x72).await;
        }
        let refused = |s: &Value| {
            s["link"] == "refused" && s["reason"].as_str().unwrap_or_default().contains("room")
        };
        let status = primary.wait("that there is no room", refused).await;
        let error = &status["errors"][0];
        assert_eq!((&error["disk"], &error["errno"]), (&json!("vda"), &json!(28)), "{status:#}");
        assert_eq!(there.status().await["promotable"], true);
        if discard {
            primary.command("resync", json!({ "discard-checkpoint": true })).await.unwrap();
            primary.wait_state("in-sync").await;
            // The commit that ends the copy comes after it.
            there.wait("promotable", |s| s["promotable"] == true).await;
            guest.close();
            primary.stop().await;
            there.stop().await;
            assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
        } else {
            guest.close();
            primary.stop().await;
            there.command("failover", json!({})).await.unwrap();
            there.wait_state("promoted").await;
            there.stop().await;
            assert!(file(&scratch.path("s.raw")) == then, "not the checkpoint");
        }
    }
}
