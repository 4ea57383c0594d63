//! A pair that is stopped by the original's command while its processes go on, and started again.
#![allow(missing_docs)]

mod common;

use brep_replication::control::ClientError;
use common::{MIB, Scratch, Side, connect, file, fill};
use serde_json::{Value, json};

async fn set(side: &Side, enable: bool, primary: bool) -> Result<Value, ClientError> {
    side.command("xen-set-replication", json!({ "enable": enable, "primary": primary })).await
}

async fn is_ok(side: &Side) -> bool {
    let answer = side.command("query-xen-replication-status", json!({})).await.unwrap();
    answer["error"] == json!(false)
}

async fn sent(primary: &Side) -> u64 {
    primary.status().await["counters"]["replicated-bytes"].as_u64().unwrap()
}

struct Pair {
    scratch: Scratch,
    primary: Side,
    secondary: Side,
}

impl Pair {
    async fn new() -> Self {
        let scratch = Scratch::new();
        scratch.raw("p.raw", 2 * MIB, 1);
        scratch.raw("s.raw", 2 * MIB, 2);
        let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
        let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
        primary.wait_state("in-sync").await;
        Pair { scratch, primary, secondary }
    }

    /// A guest's write, kept by the primary whatever becomes of the rest.
    async fn write(&self, byte: u8) {
        let guest = connect(self.scratch.endpoint("p-guest.sock"), "vda").await;
        fill(&*guest, MIB, 4096, byte).await;
        guest.close();
    }

    async fn ends_equal(self) {
        self.primary.wait_state("in-sync").await;
        self.write(0x77).await;
        self.primary.checkpoint().await;
        self.primary.stop().await;
        self.secondary.stop().await;
        let files = ["p.raw", "s.raw"].map(|name| file(&self.scratch.path(name)));
        assert!(files[0] == files[1], "the disks differ");
        assert_eq!(files[0][MIB as usize], 0x77);
    }
}

/// What it had to go back to is gone, until it has been given what it missed.
///
/// Row: §14.39, §15.2.
#[tokio::test]
async fn a_secondary_stopped_without_failover_gives_its_checkpoint_up_until_it_has_started_again() {
    let pair = Pair::new().await;
    pair.write(0x22).await;
    pair.primary.checkpoint().await;
    pair.write(0x33).await;
    set(&pair.secondary, false, false).await.unwrap();
    let status = pair.secondary.status().await;
    assert_eq!((&status["replication"], &status["promotable"]), (&json!("done"), &json!(false)));
    assert!(is_ok(&pair.secondary).await);
    // The guest of the primary goes on, and the secondary gets nothing of it.
    let kept = file(&pair.scratch.path("s.raw"));
    assert_eq!(kept[MIB as usize], 0x33, "what the primary had written is kept");
    pair.write(0x44).await;
    assert!(file(&pair.scratch.path("s.raw")) == kept);
    set(&pair.secondary, false, false).await.unwrap();

    let before = sent(&pair.primary).await;
    set(&pair.secondary, true, false).await.unwrap();
    pair.primary.wait_state("in-sync").await;
    assert!(sent(&pair.primary).await - before < MIB, "not all of it again");
    assert_eq!(file(&pair.scratch.path("s.raw"))[MIB as usize], 0x44);
    pair.secondary.wait("promotable", |s| s["promotable"] == true).await;
    assert!(set(&pair.secondary, true, false).await.is_err(), "it runs");
    pair.ends_equal().await;
}

/// The secondary's checkpoint stays whole, until what was written meanwhile has followed.
#[tokio::test]
async fn a_primary_that_was_stopped_starts_again_with_what_was_written_meanwhile() {
    let pair = Pair::new().await;
    pair.write(0x22).await;
    let epoch = pair.primary.checkpoint().await;
    set(&pair.primary, false, true).await.unwrap();
    assert_eq!(pair.primary.status().await["replication"], "done");
    pair.write(0x44).await;
    let status = pair.secondary.status().await;
    assert_eq!((&status["checkpoint"], &status["promotable"]), (&json!(epoch), &json!(true)));
    assert_eq!(file(&pair.scratch.path("s.raw"))[MIB as usize], 0x22);
    let before = sent(&pair.primary).await;
    set(&pair.primary, true, true).await.unwrap();
    pair.primary.wait_state("in-sync").await;
    assert!(sent(&pair.primary).await - before < MIB, "not all of it again");
    assert_eq!(file(&pair.scratch.path("s.raw"))[MIB as usize], 0x44);
    pair.ends_equal().await;
}
