//! Random reads over NBD with simple replies.
//!
//! fio and QEMU's tools always ask for structured replies, in which servers do more than read.
//! Written without brep's own client: what is measured shall not depend on it.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The server's unix socket
    socket: PathBuf,
    /// The name of the export
    #[arg(long, default_value = "")]
    export: String,
    /// How many reads are in flight
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// Bytes a read
    #[arg(long, default_value_t = 4096)]
    length: usize,
    /// Seconds
    #[arg(long, default_value_t = 1.0)]
    runtime: f64,
}

const OPTION_MAGIC: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
const INFO_EXPORT: u16 = 0;
/// Fixed newstyle, and no zeroes behind the handshake.
const CLIENT_FLAGS: u32 = 3;
/// An option's answer is longer only if something is wrong.
const ANSWER_BYTES_MAX: usize = 1 << 16;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const REPLY_BYTES: usize = 16;

/// Prints a JSON object with the reads a second and latencies in microseconds.
pub(crate) fn main(args: &Args) -> Result<bool> {
    ensure!(args.depth > 0 && args.length > 0, "nothing to read");
    let mut socket = UnixStream::connect(&args.socket)
        .with_context(|| format!("cannot connect to {}", args.socket.display()))?;
    let size = negotiate(&mut socket, &args.export)?;
    let blocks = size / args.length as u64;
    ensure!(blocks > 0, "the export is smaller than a read");
    let mut load = Load {
        socket,
        blocks,
        length: args.length,
        random: Random(0x9e37_79b9_7f4a_7c15),
        submitted: vec![Instant::now(); args.depth],
        latencies_us: Vec::new(),
    };
    let elapsed = load.run(Duration::from_secs_f64(args.runtime))?;
    let mut latencies = load.latencies_us;
    latencies.sort_unstable();
    let percentile = |part: usize| latencies.get(latencies.len() * part / 100).copied();
    let report = serde_json::json!({
        "iops": latencies.len() as f64 / elapsed.as_secs_f64(),
        "p50_us": percentile(50),
        "p99_us": percentile(99),
    });
    println!("{report}");
    Ok(true)
}

/// The size of the export, ready for requests.
fn negotiate(socket: &mut UnixStream, export: &str) -> Result<u64> {
    let greeting: [u8; 18] = read(socket)?;
    ensure!(greeting.starts_with(b"NBDMAGICIHAVEOPT"), "not an NBD server");
    let name_bytes = u32::try_from(export.len())?;
    let mut go = Vec::new();
    go.extend(CLIENT_FLAGS.to_be_bytes());
    go.extend(OPTION_MAGIC.to_be_bytes());
    go.extend(OPTION_GO.to_be_bytes());
    go.extend((name_bytes + 6).to_be_bytes());
    go.extend(name_bytes.to_be_bytes());
    go.extend(export.as_bytes());
    // No request for information besides what is always told.
    go.extend(0_u16.to_be_bytes());
    socket.write_all(&go)?;
    let mut size = None;
    loop {
        ensure!(u64::from_be_bytes(read(socket)?) == OPTION_REPLY_MAGIC, "not an option's reply");
        ensure!(u32::from_be_bytes(read(socket)?) == OPTION_GO, "a reply to another option");
        let kind = u32::from_be_bytes(read(socket)?);
        let length = u32::from_be_bytes(read(socket)?) as usize;
        ensure!(length <= ANSWER_BYTES_MAX, "an answer of {length} bytes");
        let mut answer = vec![0; length];
        socket.read_exact(&mut answer)?;
        match kind {
            REPLY_ACK => return size.context("the server has told no size"),
            REPLY_INFO => size = export_size(&answer).or(size),
            _ => bail!("the export {export:?} is not served: {}", String::from_utf8_lossy(&answer)),
        }
    }
}

fn export_size(info: &[u8]) -> Option<u64> {
    let (kind, rest) = info.split_first_chunk()?;
    let size = rest.first_chunk()?;
    (u16::from_be_bytes(*kind) == INFO_EXPORT).then(|| u64::from_be_bytes(*size))
}

fn read<const BYTES: usize>(socket: &mut UnixStream) -> Result<[u8; BYTES]> {
    let mut data = [0; BYTES];
    socket.read_exact(&mut data).context("the server has closed the connection")?;
    Ok(data)
}

/// Reads in flight, one for each cookie from 0.
struct Load {
    socket: UnixStream,
    blocks: u64,
    length: usize,
    random: Random,
    /// When the read of each cookie was sent.
    submitted: Vec<Instant>,
    latencies_us: Vec<u64>,
}

impl Load {
    /// Every reply is followed by a new request until the time is over; then all are awaited.
    fn run(&mut self, runtime: Duration) -> Result<Duration> {
        let reply_bytes = REPLY_BYTES + self.length;
        let mut input = vec![0; reply_bytes * self.submitted.len()];
        let mut filled = 0;
        let mut output = Vec::new();
        let started = Instant::now();
        for cookie in 0..self.submitted.len() {
            self.submit(cookie, started, &mut output);
        }
        let mut in_flight = self.submitted.len();
        while in_flight > 0 {
            self.socket.write_all(&output)?;
            output.clear();
            let space = input.get_mut(filled..).unwrap_or_default();
            let received = self.socket.read(space)?;
            ensure!(received > 0, "the server has closed the connection");
            filled += received;
            let now = Instant::now();
            let complete = filled - filled % reply_bytes;
            for reply in input.chunks_exact(reply_bytes).take(complete / reply_bytes) {
                let cookie = self.complete(reply, now)?;
                if now - started < runtime {
                    self.submit(cookie, now, &mut output);
                } else {
                    in_flight -= 1;
                }
            }
            input.copy_within(complete..filled, 0);
            filled -= complete;
        }
        Ok(started.elapsed())
    }

    fn submit(&mut self, cookie: usize, now: Instant, output: &mut Vec<u8>) {
        let offset = self.random.next() % self.blocks * self.length as u64;
        output.extend(REQUEST_MAGIC.to_be_bytes());
        // No flags; command 0 reads.
        output.extend(0_u32.to_be_bytes());
        output.extend((cookie as u64).to_be_bytes());
        output.extend(offset.to_be_bytes());
        output.extend((self.length as u32).to_be_bytes());
        if let Some(submitted) = self.submitted.get_mut(cookie) {
            *submitted = now;
        }
    }

    fn complete(&mut self, reply: &[u8], now: Instant) -> Result<usize> {
        let (magic, rest) = reply.split_first_chunk().context("a short reply")?;
        let (error, rest) = rest.split_first_chunk().context("a short reply")?;
        let cookie = rest.first_chunk().context("a short reply")?;
        ensure!(u32::from_be_bytes(*magic) == REPLY_MAGIC, "not a simple reply");
        ensure!(u32::from_be_bytes(*error) == 0, "a read failed");
        let cookie = usize::try_from(u64::from_be_bytes(*cookie))?;
        let submitted = self.submitted.get(cookie).context("a reply to no request")?;
        self.latencies_us.push(u64::try_from((now - *submitted).as_micros())?);
        Ok(cookie)
    }
}

/// Good enough for offsets, and the same in every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_is_taken_from_the_right_information() {
        let export = [0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5];
        assert_eq!(export_size(&export), Some(1 << 16));
        assert_eq!(export_size(&[0, 3, 0, 0, 0, 0, 0, 1, 0, 0, 0, 5]), None);
        assert_eq!(export_size(&export[..6]), None);
    }
}
