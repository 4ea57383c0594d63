//! Point-in-time copies of a disk in use, and the disk as it was, over NBD.
//!
//! ```sh
//! qemu-img create -f qcow2 disk.qcow2 1G
//! cargo run --release -p brep-backup --example copy -- \
//!     --listen 'nbd+unix:///?socket=copy.sock' disk.qcow2 --target monday.qcow2 --sync full
//! ```
//!
//! The guest uses the export `disk`. While a job runs, the export `snapshot` is the disk as it was
//! when the job started (fleecing); `--sync none` is a job that does only that. `monday.qcow2` is
//! made if it does not exist, and holds the same state when the job has completed; others may use
//! it from the event `TARGET_CLOSED` on.
//!
//! Events come on stdout, one JSON object in a line. Commands are read from stdin in the same
//! way, and answered on stdout. An incremental chain:
//!
//! ```text
//! {"execute": "block-dirty-bitmap-add", "arguments": {"name": "b"}}
//! {"execute": "blockdev-backup", "arguments": {"target": "full.qcow2", "sync": "full",
//!     "bitmap": "b", "bitmap-mode": "on-success"}}
//! {"execute": "blockdev-backup", "arguments": {"target": "inc.qcow2", "sync": "incremental",
//!     "bitmap": "b", "target-backing": ["full.qcow2"]}}
//! ```
//!
//! (each on one line). The others: `query-block-jobs`, `block-job-pause`, `-resume`, `-set-speed`,
//! `-cancel`, `-complete`, `-finalize`, `-dismiss`, `checkpoint` (`sync` none), `query-dirty-bitmaps`,
//! `block-dirty-bitmap-clear`, `-remove`, `-enable`, `-disable`, `quit`.
mod args;
mod control;
mod images;
mod json;

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use brep_backup::{Jobs, LiveDisk};
use brep_block::{BlockDevice, FlushLevel};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use clap::Parser;
use serde_json::Value;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;

use crate::args::Args;
use crate::control::Control;

type Error = Box<dyn std::error::Error>;

fn main() -> ExitCode {
    match start(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("copy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn start(args: Args) -> Result<(), Error> {
    // A thread of its own, so that nobody who is slow to read holds up the disk.
    let (output, lines) = sync_channel::<Value>(1000);
    let printer = std::thread::spawn(move || lines.iter().for_each(|line| println!("{line}")));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let tasks = tokio::task::LocalSet::new();
    let result = runtime.block_on(tasks.run_until(run(args, output)));
    // With the tasks go the last who could print.
    drop((tasks, runtime));
    printer.join().map_err(|_| "standard output was closed")?;
    result
}

async fn run(args: Args, output: SyncSender<Value>) -> Result<(), Error> {
    let source = images::open(&args.source, &args.backing, None).await?;
    let disk = LiveDisk::new("disk", source.device.clone());
    let exports = Arc::new(StaticExports::new());
    // A flush reaches the whole disk, whichever client asks for it.
    exports.add(Export::new("disk", disk.clone()).multi_conn(true));
    let server = Server::new(exports.clone(), ServerConfig::default());
    let listener = Server::bind(&args.listen.endpoint).await?;
    eprintln!("serving {} on {}", args.source.display(), listener.endpoint());

    let events = output.clone();
    // Whoever does not read misses events; a few come in a second.
    let jobs = Jobs::new(move |event| drop(events.try_send(json::event(&event))));
    let control = Control::new(disk.clone(), jobs, exports, output);
    if args.job.target.is_some() {
        control.backup(args.job).await?;
    }
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        () = server.serve(listener) => {}
        () = control.take_commands(commands()) => {}
        _ = terminate.recv() => {}
        result = tokio::signal::ctrl_c() => result?,
    }
    server.shutdown(Duration::from_secs(5)).await;
    control.cancel_all().await;
    disk.flush(FlushLevel::Durable).await?;
    source.close().await
}

/// The lines of stdin. A thread waits for them: a read of a terminal cannot be given up.
fn commands() -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel(1);
    std::thread::spawn(move || {
        for line in std::io::stdin().lines().map_while(Result::ok) {
            if sender.blocking_send(line).is_err() {
                return;
            }
        }
    });
    receiver
}
