//! Random 4 KiB reads and writes of one file, many at a time: how many a second.
//!
//!     cargo run --release -p brep-block --example random_io -- FILE [none|writeback] [SECONDS]
//!
//! The file is created with 1 GiB if it does not exist, and is overwritten.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use brep_block::{BlockDevice, CacheMode, RawFile, RawFileOptions, Result, WriteFlags};
use bytes::Bytes;

const BLOCK_LEN: u64 = 4096;
const DEPTH: u64 = 32;
const SIZE: u64 = 1 << 30;

#[tokio::main(flavor = "current_thread")]
async fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or("name a file")?;
    let cache = match arguments.next().as_deref() {
        None | Some("none") => CacheMode::None,
        Some("writeback") => CacheMode::Writeback,
        Some(other) => return Err(format!("{other}: none or writeback").into()),
    };
    let seconds = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let options = RawFileOptions { create: Some(SIZE), cache, ..RawFileOptions::default() };
    let disk: Arc<dyn BlockDevice> = RawFile::open(path, options)?;
    fill(&*disk).await?;
    for write in [false, true] {
        let rate = run(&disk, write, Duration::from_secs(seconds)).await?;
        let what = if write { "writes" } else { "reads" };
        println!("{what}: {rate:.0} per second at depth {DEPTH}");
    }
    Ok(())
}

async fn fill(disk: &dyn BlockDevice) -> Result<()> {
    let data = Bytes::from(vec![0x5A; 1 << 20]);
    for offset in (0..disk.size()).step_by(data.len()) {
        disk.write(offset, data.clone(), WriteFlags::default()).await?;
    }
    disk.flush(brep_block::FlushLevel::Durable).await
}

async fn run(disk: &Arc<dyn BlockDevice>, write: bool, time: Duration) -> Result<f64> {
    let done = Arc::new(AtomicU64::new(0));
    let start = Instant::now();
    let mut workers = Vec::new();
    for worker in 0..DEPTH {
        let (disk, done) = (Arc::clone(disk), Arc::clone(&done));
        workers.push(tokio::spawn(async move {
            let blocks = disk.size() / BLOCK_LEN;
            let data = Bytes::from(vec![worker as u8; BLOCK_LEN as usize]);
            let mut place = worker + 1;
            while start.elapsed() < time {
                place = place.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let offset = (place >> 20) % blocks * BLOCK_LEN;
                if write {
                    disk.write(offset, data.clone(), WriteFlags::default()).await?;
                } else {
                    disk.read(offset, BLOCK_LEN as usize).await?;
                }
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        }));
    }
    for worker in workers {
        worker.await.expect("no worker panics")?;
    }
    Ok(done.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64())
}
