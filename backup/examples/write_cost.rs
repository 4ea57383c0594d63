//! What copy-before-write adds to a write of 4 KiB, with devices in memory.
//!
//! `cargo run --release -p brep-backup --example write_cost`

use std::sync::Arc;
use std::time::Instant;

use brep_backup::{CbwOptions, CopyBeforeWrite};
use brep_block::{BlockDevice, Memory, WriteFlags};
use bytes::Bytes;

const SIZE: u64 = 256 << 20;
const WRITES: u64 = SIZE / 4096;

async fn pass(what: &str, device: &dyn BlockDevice) {
    let data = Bytes::from(vec![0xA5; 4096]);
    let begin = Instant::now();
    for i in 0..WRITES {
        // An odd factor visits every block once, out of order.
        let block = i.wrapping_mul(0x9E37_79B1) % WRITES;
        let written = device.write(block * 4096, data.clone(), WriteFlags::default()).await;
        written.expect("memory does not fail");
    }
    println!("{what:<28} {:>6.0} ns per write", begin.elapsed().as_nanos() as f64 / WRITES as f64);
}

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let disk = Memory::new("disk", SIZE);
    pass("disk, first touch", &*disk).await;
    pass("disk alone", &*disk).await;
    for unit_bytes in [2048, 4096, 65536] {
        let buffers = [Memory::new("a", SIZE), Memory::new("b", SIZE)];
        let options = CbwOptions::new("filter").unit_bytes(unit_bytes);
        let source: Arc<dyn BlockDevice> = disk.clone();
        let filter =
            CopyBeforeWrite::new(source, buffers[0].clone(), options).expect("fitting devices");
        println!("unit {unit_bytes} bytes");
        pass("  target's first touch", &*filter).await;
        pass("  copied already", &*filter).await;
        let begin = Instant::now();
        filter.checkpoint().expect("nothing is in flight");
        println!("  {:<26} {:>6} ns", "checkpoint", begin.elapsed().as_nanos());
        pass("  copied before every write", &*filter).await;
    }
}
