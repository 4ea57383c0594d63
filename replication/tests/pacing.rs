//! A copy under control: how fast it goes, what it skips, and what it is not asked for.
#![allow(missing_docs)]
mod common;

use std::time::{Duration, Instant};

use brep_block::BlockDevice;
use brep_replication::config::{ResyncLimits, Seeded};
use serde_json::{Value, json};

use self::common::{MIB, Scratch, Side, connect, file, fill};

/// A primary and a blank secondary, whose disks are `same` or not.
fn disks(scratch: &Scratch, size: u64, same: bool) {
    scratch.raw("p.raw", size, 1);
    scratch.raw("s.raw", size, if same { 1 } else { 2 });
}

fn secondary(scratch: &Scratch) -> Side {
    Side::run(scratch.secondary(vec![scratch.disk("vda", "s.raw")]))
}

fn written(status: &Value) -> u64 {
    status["counters"]["replicated-bytes"].as_u64().unwrap()
}

#[tokio::test]
async fn a_resync_keeps_to_its_rate_and_the_rate_can_be_changed_while_it_runs() {
    let scratch = Scratch::new();
    disks(&scratch, 32 * MIB, false);
    let secondary = secondary(&scratch);
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.resync_limits = ResyncLimits { rate: Some(4 * MIB), latency_factor: None };
    let primary = Side::run(config);
    let begun = primary.wait("a copy", |s| s["resync"]["done"].as_u64() > Some(MIB)).await;
    let (since, before) = (Instant::now(), begun["resync"]["done"].as_u64().unwrap());
    assert_eq!(begun["disks"][0]["state"], "resyncing");
    assert_eq!(begun["resync"]["total"], 32 * MIB);
    assert_eq!(begun["resync"]["rate-limit"], 4 * MIB);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let status = primary.status().await;
    let gone = status["resync"]["done"].as_u64().unwrap() - before;
    // What is on its way counts as done, and goes on its way in pieces.
    let allowed = (since.elapsed().as_secs_f64() * 4.0 + 2.0) * MIB as f64;
    assert!((gone as f64) <= allowed && gone >= 2 * MIB, "{gone} of {allowed}: {status:#}");
    let jobs = primary.command("query-block-jobs", json!({})).await.unwrap();
    assert_eq!(jobs[0]["speed"], 4 * MIB, "{jobs:#}");
    for wrong in [json!({ "rate": -1 }), json!({ "latency-factor": 0.5 }), json!({})] {
        primary.command("resync", wrong).await.unwrap_err();
    }
    primary.command("resync", json!({ "rate": 0 })).await.unwrap();
    primary.wait_state("in-sync").await;
    assert!(since.elapsed() < Duration::from_secs(5), "it went on at the old rate");
    assert!(primary.status().await["resync"].is_null());
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

#[tokio::test]
async fn what_reads_as_zeroes_on_both_sides_is_not_sent() {
    let scratch = Scratch::new();
    for name in ["p.raw", "s.raw"] {
        let sparse = std::fs::File::create(scratch.path(name)).unwrap();
        sparse.set_len(4 << 30).unwrap();
    }
    for (name, at) in [("p.raw", 1 << 30), ("s.raw", 3 << 30)] {
        use std::os::unix::fs::FileExt;
        let file = std::fs::File::options().write(true).open(scratch.path(name)).unwrap();
        file.write_all_at(&[7; 100_000], at).unwrap();
    }
    let secondary = secondary(&scratch);
    let primary = Side::run(scratch.primary(vec![scratch.disk("vda", "p.raw")]));
    primary.wait_state("in-sync").await;
    let status = primary.status().await;
    // The data, and zeroes over what only the secondary had.
    assert!(written(&status) <= 96 * MIB, "{status:#}");
    assert!(status["counters"]["replicated-writes"].as_u64() <= Some(8), "{status:#}");
    primary.stop().await;
    secondary.stop().await;
    let there = std::fs::File::open(scratch.path("s.raw")).unwrap();
    use std::os::unix::fs::{FileExt, MetadataExt};
    let mut data = vec![1; 100_000];
    there.read_exact_at(&mut data, 1 << 30).unwrap();
    assert!(data.iter().all(|b| *b == 7));
    there.read_exact_at(&mut data, 3 << 30).unwrap();
    assert!(data.iter().all(|b| *b == 0));
    assert!(there.metadata().unwrap().blocks() * 512 < 4 * MIB, "it is not sparse any more");
}

/// A whole comparison of a pair that is connected, and has drifted apart behind brep's back.
#[tokio::test]
async fn a_comparison_while_connected_sends_what_differs_and_no_more() {
    let scratch = Scratch::new();
    disks(&scratch, 8 * MIB, true);
    let secondary = secondary(&scratch);
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.seeded = Seeded::Compare;
    let primary = Side::run(config);
    let status = primary.wait_state("in-sync").await;
    assert_eq!(written(&status), 0, "equal disks were copied");
    {
        use std::os::unix::fs::FileExt;
        let there = std::fs::File::options().write(true).open(scratch.path("s.raw")).unwrap();
        there.write_all_at(&[9; 512], 5 * MIB + 70_000).unwrap();
    }
    let epoch = primary.status().await["checkpoint"].clone();
    primary.command("resync", json!({ "compare": true })).await.unwrap();
    let ended = |s: &Value| s["disks"][0]["state"] == "in-sync" && s["checkpoint"] != epoch;
    let status = primary.wait("the comparison", ended).await;
    assert_eq!(written(&status), 65536, "{status:#}");
    primary.stop().await;
    secondary.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

#[tokio::test]
async fn a_trusted_copy_is_taken_as_it_is_once_and_a_secondary_that_returns_is_not() {
    let scratch = Scratch::new();
    disks(&scratch, 8 * MIB, true);
    let there = secondary(&scratch);
    let config = || {
        let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
        config.seeded = Seeded::Trust;
        config
    };
    let primary = Side::run(config());
    let status = primary.wait_state("in-sync").await;
    assert_eq!(written(&status), 0);
    primary.checkpoint().await;
    there.stop().await;
    primary.wait_state("disconnected").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    fill(&*guest, MIB, 65536, 0x77).await;
    guest.close();
    primary.stop().await;
    // The option is still there at the next start.
    let primary = Side::run(config());
    let there = secondary(&scratch);
    let status = primary.wait_state("in-sync").await;
    assert_eq!(written(&status), 65536);
    primary.stop().await;
    there.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}

/// Hashes first, also for what was missed: a guest that wrote the same again costs nothing.
#[tokio::test]
async fn with_resync_compare_what_was_missed_is_compared_before_it_is_sent() {
    let scratch = Scratch::new();
    disks(&scratch, 8 * MIB, false);
    let there = secondary(&scratch);
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.resync_compare = true;
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    let before = written(&primary.status().await);
    there.stop().await;
    primary.wait_state("disconnected").await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    let same = guest.read(0, 2 << 20).await.unwrap();
    guest.write(0, same, Default::default()).await.unwrap();
    fill(&*guest, 4 * MIB, 4096, 0x55).await;
    guest.close();
    let there = secondary(&scratch);
    let status = primary.wait_state("in-sync").await;
    assert_eq!(written(&status) - before, 65536, "{status:#}");
    primary.stop().await;
    there.stop().await;
    assert!(file(&scratch.path("p.raw")) == file(&scratch.path("s.raw")));
}
