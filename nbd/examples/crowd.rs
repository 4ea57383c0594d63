//! The latency of one client, alone and next to a crowd: 1000 idle clients, 100 that never finish
//! their handshake, and one that asks for much and takes none of it. Medians of five interleaved
//! rounds.
//!
//! `cargo run --release -p brep-nbd --example crowd` (needs 3000 open files: `ulimit -n 4000`)

use std::sync::Arc;
use std::time::{Duration, Instant};

use brep_block::{BlockDevice, Memory};
use brep_nbd::Endpoint;
use brep_nbd::client::{ConnectOptions, Connection};
use brep_nbd::proto::wire::{Command, CommandFlags, OptionCode, OptionHeader, RequestHeader};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

const ROUNDS: usize = 5;
const READS: u64 = 5000;
const IDLE: usize = 1000;
const HALF_OPEN: usize = 100;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let endpoint = Endpoint::Unix { path: directory.path().join("socket") };
    let exports = StaticExports::new();
    exports.add(Export::new("disk", Memory::new("disk", 256 << 20)));
    let config = ServerConfig::default()
        .connections_max(2 * IDLE)
        .handshake_timeout(Duration::from_secs(600));
    let server = Server::new(Arc::new(exports), config);
    serve(Arc::clone(&server), endpoint.clone());
    while !directory.path().join("socket").exists() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let (mut alone, mut crowded) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        let disk = connect(&endpoint).await?;
        alone.push(median_us(&disk).await?);
        let crowd = Crowd::gather(&endpoint).await?;
        crowded.push(median_us(&disk).await?);
        println!("held for the crowd: {} bytes", server.bytes_in_flight());
        drop(crowd);
        while server.connections().len() > 1 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    let (alone, crowded) = (median(&mut alone), median(&mut crowded));
    println!("4 KiB read, depth 1: alone {alone:.1} us, in the crowd {crowded:.1} us");
    println!("ratio {:.2}", crowded / alone);
    Ok(())
}

/// In a thread of its own: the crowd is no load on it by being dropped or gathered.
fn serve(server: Arc<Server>, endpoint: Endpoint) {
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let listener = Server::bind(&endpoint).await.expect("a socket");
            server.serve(listener).await;
        });
    });
}

async fn connect(endpoint: &Endpoint) -> Result<Arc<Connection>> {
    Ok(Connection::connect(&ConnectOptions::new(endpoint.clone(), "disk")).await?)
}

async fn median_us(disk: &Connection) -> Result<f64> {
    let mut times = Vec::new();
    for index in 0..READS {
        let start = Instant::now();
        disk.read(index * 4096, 4096).await?;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    Ok(median(&mut times))
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

struct Crowd {
    _idle: Vec<Arc<Connection>>,
    _streams: Vec<UnixStream>,
}

impl Crowd {
    async fn gather(endpoint: &Endpoint) -> Result<Self> {
        let Endpoint::Unix { path } = endpoint else { return Err("a unix socket".into()) };
        let mut idle = Vec::new();
        for _ in 0..IDLE {
            idle.push(connect(endpoint).await?);
        }
        let mut streams = Vec::new();
        for _ in 0..HALF_OPEN {
            streams.push(UnixStream::connect(path).await?);
        }
        let mut deaf = UnixStream::connect(path).await?;
        deaf.write_all(&deaf_bytes()).await?;
        streams.push(deaf);
        Ok(Crowd { _idle: idle, _streams: streams })
    }
}

/// Client flags, a `GO`, and 64 reads of 1 MiB.
fn deaf_bytes() -> Vec<u8> {
    let mut bytes = vec![0, 0, 0, 3];
    bytes.extend(OptionHeader { option: OptionCode::GO, len: 10 }.encode());
    bytes.extend(b"\0\0\0\x04disk\0\0");
    for cookie in 0..64 {
        let (flags, command) = (CommandFlags::NONE, Command::READ);
        bytes.extend(RequestHeader { flags, command, cookie, offset: 0, len: 1 << 20 }.encode());
    }
    bytes
}
