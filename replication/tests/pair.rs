//! The main job, end to end, in one process.
#![allow(missing_docs)]

mod common;

use common::{MIB, Scratch, Side, connect, file, fill, read};
use serde_json::json;

#[tokio::test]
async fn writes_are_replicated_checkpointed_and_failed_over() {
    let scratch = Scratch::new();
    let primary_file = scratch.raw("p.raw", 4 * MIB, 1);
    let secondary_file = scratch.raw("s.raw", 4 * MIB, 99);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    assert_eq!(file(&primary_file), file(&secondary_file), "after the full copy");

    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, 4096, 4096, 0x22).await;
    let epoch = primary.checkpoint().await;
    let checkpoint = file(&primary_file);
    assert_eq!(secondary.status().await["checkpoint"], epoch);

    fill(&*guest, 4096, 4096, 0x33).await;
    fill(&*guest, MIB + 100, 5000, 0x44).await;
    assert_eq!(file(&primary_file), file(&secondary_file), "acknowledged in sync mode");
    guest.close();
    primary.stop().await;

    let report = secondary.command("failover", json!({ "to": "checkpoint" })).await.unwrap();
    assert!(report["differing-bytes"].as_u64().unwrap() >= 9096, "{report}");
    let promoted = connect(scratch.endpoint("s.sock"), "vda").await;
    assert_eq!(read(&*promoted, 0, 4 << 20).await, checkpoint);
    secondary.wait_state("promoted").await;
    assert_eq!(file(&secondary_file), checkpoint, "the file alone after the merge");
    promoted.close();
    secondary.stop().await;
}

#[tokio::test]
async fn a_control_socket_that_cannot_be_bound_is_an_error_that_names_it() {
    let scratch = Scratch::new();
    scratch.raw("s.raw", MIB, 1);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.control = Some(scratch.path("missing").join("control.sock"));
    let error = Side::run(config).ended().await.unwrap_err();
    assert!(error.to_string().contains("missing/control.sock"), "{error}");
}

#[tokio::test]
async fn every_checkpoint_that_the_secondary_asks_for_is_answered() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", 2 * MIB, 1);
    scratch.raw("s.raw", 2 * MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let ask = || secondary.command("checkpoint", json!({ "timeout-ms": 10_000 }));
    for answer in futures_util::future::join_all((0..16).map(|_| ask())).await {
        assert!(answer.unwrap()["epoch"].is_u64());
    }
    primary.stop().await;
    secondary.stop().await;
}
