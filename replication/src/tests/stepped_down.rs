//! A side that has made room in a switchover is a secondary whose checkpoint has no buffers yet.
use std::time::Duration;

use brep_block::{Operation, Rule};
use serde_json::json;

use super::common::{MIB, Scratch, Side, connect, file, fill};
use crate::image::faults;

/// Its first session is lost before its first checkpoint: what that session has overwritten comes
/// back.
#[tokio::test]
async fn i03_the_checkpoint_of_a_switchover_outlives_the_first_session_after_it() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 4 * MIB, 1);
    scratch.raw("s.raw", 4 * MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let old_primary = || {
        let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
        config.listen = Some(scratch.endpoint("p.sock"));
        Side::run(config)
    };
    let primary = old_primary();
    primary.wait_state("in-sync").await;
    let uri = format!("nbd+unix:///?socket={}", scratch.path("p.sock").display());
    secondary.command("peer-set", json!({ "uri": uri })).await.unwrap();
    primary.command("switchover", json!({})).await.unwrap();
    secondary.wait("promoted", |s| s["role"] == "promoted").await;
    primary.wait("secondary", |s| s["role"] == "secondary").await;
    primary.stop().await;
    let checkpoint = file(&scratch.path("p.raw"));

    // The new primary has more, and the copy of it is cut short.
    secondary.wait("alone", |s| s["link"] == "disconnected").await;
    let guest = connect(scratch.endpoint("s.sock"), "vda").await;
    fill(&*guest, MIB, 2 * MIB as usize, 0x77).await;
    guest.close();
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.listen = Some(scratch.endpoint("p.sock"));
    config.start = false;
    let primary = Side::run(config);
    primary.wait("up", |_| true).await;
    let disk = faults::of(&scratch.path("p.raw")).upper;
    let hang = disk.hang(Rule::new(Operation::Write).nth(2));
    primary.command("replication-start", json!({})).await.unwrap();
    hang.reached(1).await;
    secondary.stop().await;
    hang.release();
    assert!(file(&scratch.path("p.raw")) != checkpoint, "nothing was overwritten");
    primary.wait("lost", |s| s["link"] == "disconnected").await;
    primary.command("failover", json!({})).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), primary.wait_state("promoted")).await.unwrap();
    primary.stop().await;
    assert!(file(&scratch.path("p.raw")) == checkpoint, "another disk than at the checkpoint");
}
