use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::common::{MIB, Scratch, connect};
use super::write;
use crate::control::ControlClient;
use crate::state::faults::Faulty;

/// A side in a thread of its own, as a process has it: what hangs in there hangs nobody else.
fn thread<F>(run: impl FnOnce(CancellationToken) -> F + Send + 'static) -> Thread
where
    F: Future<Output = crate::Result<()>>,
{
    let shutdown = CancellationToken::new();
    let token = shutdown.clone();
    let thread = std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(token))
    });
    Thread { shutdown, thread }
}

struct Thread {
    shutdown: CancellationToken,
    thread: std::thread::JoinHandle<crate::Result<()>>,
}

impl Thread {
    async fn stop(self) {
        self.shutdown.cancel();
        tokio::task::spawn_blocking(|| self.thread.join().unwrap()).await.unwrap().unwrap();
    }
}

/// Everything that only asks is answered at once.
async fn all_queries(scratch: &Scratch, dir: &str) {
    let socket = scratch.path(dir).join("control.sock");
    let asking = move || {
        for command in [
            "query-status",
            "query-block-jobs",
            "query-named-block-nodes",
            "query-xen-replication-status",
            "query-colo-status",
            "query-yank",
            "query-block-exports",
        ] {
            let begun = Instant::now();
            let mut client = ControlClient::connect(&socket, Duration::from_secs(5)).unwrap();
            client.execute(command, json!({})).unwrap();
            assert!(begun.elapsed() < Duration::from_secs(4), "{command} has waited");
        }
    };
    tokio::task::spawn_blocking(asking).await.unwrap();
}

/// A state directory that hangs holds the data path up, and no query.
#[tokio::test]
async fn queries_are_answered_while_a_state_record_cannot_be_written() {
    let scratch = Scratch::new();
    scratch.raw("p.raw", MIB, 1);
    scratch.raw("s.raw", MIB, 2);
    let config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    let there = thread(|shutdown| crate::run(config, shutdown));
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.checkpoint_interval = Some(Duration::from_millis(50));
    let control = config.state_dir.join("control.sock");
    let here = thread(|shutdown| crate::run(config, shutdown));
    let wait = async |what: &str, fits: fn(&Value) -> bool| {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let control = control.clone();
            let asking = move || {
                let mut client = ControlClient::connect(&control, Duration::from_secs(5))?;
                client.execute("query-status", json!({}))
            };
            match tokio::task::spawn_blocking(asking).await.unwrap() {
                Ok(status) if fits(&status) => return,
                last => assert!(Instant::now() < deadline, "{what}: {last:?}"),
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // And no checkpoint is being taken.
    let in_sync: fn(&Value) -> bool = |s| {
        let committed = s["checkpoint"].as_u64().map(|epoch| epoch + 1);
        s["disks"][0]["state"] == "in-sync" && s["epoch"].as_u64() == committed
    };
    wait("in sync", in_sync).await;
    for dir in ["s.state", "p.state"] {
        let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
        let stuck = Faulty::stuck(&scratch.path(dir));
        // The next checkpoint saves a record on both sides.
        let waiting = write(&guest, 0, 0x77);
        stuck.reached().await;
        all_queries(&scratch, dir).await;
        drop(stuck);
        waiting.await.unwrap().unwrap();
        guest.close();
        wait("in sync again", in_sync).await;
    }
    here.stop().await;
    there.stop().await;
}
