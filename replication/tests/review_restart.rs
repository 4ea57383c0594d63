//! Sides that are started again.
#![allow(missing_docs)]

mod common;

use std::time::Duration;

use brep_block::Memory;
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use common::{MIB, Scratch, Side, connect};
use serde_json::json;

/// The secondary was promoted, and its disk is now served by another program at the same address.
/// That nobody there knows of a promotion does not make the old primary the disk again.
#[tokio::test]
async fn a_primary_that_meets_a_stranger_does_not_serve_its_guest() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let config = || scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    let primary = Side::run(config());
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.command("failover", json!({})).await.unwrap();
    secondary.wait_state("promoted").await;
    secondary.stop().await;

    let exports = StaticExports::new();
    exports.add(Export::new("vda", Memory::new("vda", MIB)));
    let server = Server::new(std::sync::Arc::new(exports), ServerConfig::default());
    let listener = Server::bind(&scratch.endpoint("s.sock")).await.unwrap();
    let serving = tokio::spawn(async move { server.serve(listener).await });
    let primary = Side::run(config());
    let status = primary.wait("refused", |s| s["link"] == "refused").await;
    assert!(status["reason"].as_str().unwrap().contains("not served"), "{status}");
    let attempt = tokio::time::timeout(
        Duration::from_millis(300),
        connect(scratch.endpoint("p-guest.sock"), "vda"),
    );
    assert!(attempt.await.is_err(), "the guest of the old primary was served");
    primary.stop().await;
    serving.abort();
}

/// A disk that was never replicated is not promoted along with those that were.
#[tokio::test]
async fn a_further_disk_of_a_secondary_with_a_checkpoint_is_left_out_of_its_promotion() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    scratch.raw("t.raw", MIB, 3);
    let secondary = Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]));
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    primary.stop().await;
    secondary.stop().await;
    let disks = vec![scratch.disk("vda", "s.raw"), scratch.disk("vdb", "t.raw")];
    let secondary = Side::run(scratch.secondary(disks));
    secondary.wait("it waits for its primary", |s| s["disks"][1]["state"] == "joining").await;
    let report = secondary.command("failover", json!({})).await.unwrap();
    assert_eq!(report["left-out"], json!(["vdb"]));
    let status = secondary.wait_state("promoted").await;
    assert_eq!(status["disks"].as_array().unwrap().len(), 1, "{status:#}");
    secondary.stop().await;
}
