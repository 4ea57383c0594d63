//! Random 4 KiB reads and writes of one file, many at a time: how many a second, and what one
//! costs.
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
        let (start, before) = (Instant::now(), processor_time()?);
        let done = run(&disk, write, Duration::from_secs(seconds)).await?;
        let rate = done as f64 / start.elapsed().as_secs_f64();
        let cost = (processor_time()? - before).as_secs_f64() / done as f64 * 1e6;
        let what = if write { "writes" } else { "reads" };
        println!("{what}: {rate:.0} per second at depth {DEPTH}, {cost:.0} us of processor each");
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

async fn run(disk: &Arc<dyn BlockDevice>, write: bool, time: Duration) -> Result<u64> {
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
    Ok(done.load(Ordering::Relaxed))
}

/// Of all threads of this process, those of the kernel that work for it included.
fn processor_time() -> std::io::Result<Duration> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    // Fields 14 and 15, in hundredths of a second; the second one may contain spaces.
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    let ticks: u64 = fields.filter_map(|field| field.parse::<u64>().ok()).sum();
    Ok(Duration::from_millis(ticks * 10))
}
