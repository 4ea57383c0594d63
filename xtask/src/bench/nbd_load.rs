//! Random reads or writes over NBD, with simple replies, that cost the client as little as possible.
//!
//! fio and QEMU's tools take more of a processor than a fast server does, and always ask for
//! structured replies, in which servers do more than read. Written without brep's own client: what is
//! measured shall not depend on it.

mod address;

use std::io::{IoSlice, Read, Write};
use std::sync::Barrier;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use self::address::{Address, Socket};
use super::usage::{self, Usage};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The server: HOST:PORT, or the path of its unix socket
    address: Address,
    /// The name of the export
    #[arg(long, default_value = "")]
    export: String,
    /// Write instead of reading
    #[arg(long)]
    write: bool,
    /// How many connections, each with a thread of its own
    #[arg(long, default_value_t = 1)]
    connections: usize,
    /// How many requests a connection has in flight
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// Bytes a request
    #[arg(long, default_value_t = 4096)]
    length: usize,
    /// Seconds
    #[arg(long, default_value_t = 1.0)]
    runtime: f64,
    /// The server's process: tell what it has used meanwhile
    #[arg(long)]
    server_pid: Option<u32>,
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
const INPUT_BYTES: usize = 256 << 10;

/// Prints a JSON object: operations a second, latencies in microseconds, what they cost.
pub(crate) fn main(args: &Args) -> Result<bool> {
    ensure!(args.depth > 0 && args.length > 0 && args.connections > 0, "nothing to do");
    let loads: Result<Vec<Load>> = (1..=args.connections).map(|n| Load::new(args, n)).collect();
    let before = Usage::now(args.server_pid)?;
    let started = Instant::now();
    let loads = run(loads?, Duration::from_secs_f64(args.runtime))?;
    let elapsed = started.elapsed();
    let used = Usage::now(args.server_pid)?.since(&before);
    let mut latencies: Vec<u64> = loads.into_iter().flat_map(|load| load.latencies_ns).collect();
    latencies.sort_unstable();
    let percentile_us =
        |part: usize| latencies.get(latencies.len() * part / 100).map(|ns| *ns as f64 / 1000.0);
    let operations = latencies.len();
    let mut report = serde_json::json!({
        "iops": operations as f64 / elapsed.as_secs_f64(),
        "p50_us": percentile_us(50),
        "p99_us": percentile_us(99),
    });
    usage::report(&used, operations as f64, elapsed, &mut report);
    println!("{report}");
    Ok(true)
}

/// All begin at the same time.
fn run(loads: Vec<Load>, runtime: Duration) -> Result<Vec<Load>> {
    let barrier = &Barrier::new(loads.len());
    std::thread::scope(|scope| {
        let threads: Vec<_> = loads
            .into_iter()
            .map(|mut load| {
                scope.spawn(move || {
                    barrier.wait();
                    load.run(runtime).map(|()| load)
                })
            })
            .collect();
        let join = |thread: std::thread::ScopedJoinHandle<'_, Result<Load>>| {
            thread.join().map_err(|_| anyhow!("a load has panicked"))?
        };
        threads.into_iter().map(join).collect()
    })
}

/// One connection and its requests in flight, one for each cookie from 0.
struct Load {
    socket: Socket,
    /// Requests of this length that fit into the export.
    blocks: u64,
    length: usize,
    /// What is written; empty if the load reads.
    payload: Vec<u8>,
    random: Random,
    /// When the request of each cookie was sent.
    submitted: Vec<Instant>,
    latencies_ns: Vec<u64>,
    input: Vec<u8>,
}

impl Load {
    fn new(args: &Args, number: usize) -> Result<Self> {
        let mut socket = args.address.connect()?;
        let size = negotiate(&mut socket, &args.export)?;
        let blocks = size / args.length as u64;
        ensure!(blocks > 0, "the export is smaller than a request");
        Ok(Load {
            socket,
            blocks,
            length: args.length,
            payload: if args.write { vec![0x5a; args.length] } else { Vec::new() },
            random: Random(0x9e37_79b9_7f4a_7c15 ^ number as u64),
            submitted: vec![Instant::now(); args.depth],
            latencies_ns: Vec::new(),
            input: vec![0; INPUT_BYTES],
        })
    }

    /// Every reply is followed by a new request until the time is over; then all are awaited.
    fn run(&mut self, runtime: Duration) -> Result<()> {
        let started = Instant::now();
        let mut headers: Vec<_> =
            (0..self.submitted.len()).map(|cookie| self.next_request(cookie, started)).collect();
        let mut in_flight = headers.len();
        let mut replies = Replies::new(if self.payload.is_empty() { self.length } else { 0 });
        while in_flight > 0 {
            self.send(&headers)?;
            headers.clear();
            let received = self.socket.read(&mut self.input)?;
            ensure!(received > 0, "the server has closed the connection");
            let now = Instant::now();
            let mut rest = received;
            while rest > 0 {
                let from = received - rest;
                let (taken, cookie) =
                    replies.take(self.input.get(from..received).unwrap_or(&[]))?;
                rest -= taken;
                let Some(cookie) = cookie else { continue };
                let submitted = self.submitted.get(cookie).context("a reply to no request")?;
                self.latencies_ns.push(u64::try_from((now - *submitted).as_nanos())?);
                if now - started < runtime {
                    headers.push(self.next_request(cookie, now));
                } else {
                    in_flight -= 1;
                }
            }
        }
        Ok(())
    }

    fn next_request(&mut self, cookie: usize, now: Instant) -> [u8; 28] {
        let offset = self.random.next() % self.blocks * self.length as u64;
        let command = u32::from(!self.payload.is_empty());
        if let Some(submitted) = self.submitted.get_mut(cookie) {
            *submitted = now;
        }
        let mut header = [0; 28];
        let parts: [&[u8]; 5] = [
            &REQUEST_MAGIC.to_be_bytes(),
            // No flags.
            &command.to_be_bytes(),
            &(cookie as u64).to_be_bytes(),
            &offset.to_be_bytes(),
            &(self.length as u32).to_be_bytes(),
        ];
        header.copy_from_slice(&parts.concat());
        header
    }

    /// All at once, payloads without a copy.
    fn send(&mut self, headers: &[[u8; 28]]) -> Result<()> {
        let mut slices: Vec<IoSlice<'_>> = headers
            .iter()
            .flat_map(|header| [IoSlice::new(header), IoSlice::new(&self.payload)])
            .collect();
        let mut left = &mut slices[..];
        IoSlice::advance_slices(&mut left, 0);
        while !left.is_empty() {
            let written = self.socket.write_vectored(left)?;
            ensure!(written > 0, "the server takes nothing");
            IoSlice::advance_slices(&mut left, written);
        }
        Ok(())
    }
}

/// Follows a stream of simple replies.
struct Replies {
    payload: usize,
    header: Vec<u8>,
    /// Bytes of the present reply's payload that are still to come.
    to_come: usize,
}

impl Replies {
    fn new(payload: usize) -> Self {
        Replies { payload, header: Vec::with_capacity(REPLY_BYTES), to_come: 0 }
    }

    /// How much of the input it has taken, and the cookie of the reply if that was the end of one.
    fn take(&mut self, input: &[u8]) -> Result<(usize, Option<usize>)> {
        let mut taken = 0;
        if self.header.len() < REPLY_BYTES {
            taken = input.len().min(REPLY_BYTES - self.header.len());
            self.header.extend_from_slice(input.get(..taken).unwrap_or_default());
            if self.header.len() < REPLY_BYTES {
                return Ok((taken, None));
            }
            self.to_come = self.payload;
        }
        let data = self.to_come.min(input.len() - taken);
        self.to_come -= data;
        if self.to_come > 0 {
            return Ok((taken + data, None));
        }
        let cookie = cookie(&self.header)?;
        self.header.clear();
        Ok((taken + data, Some(cookie)))
    }
}

fn cookie(reply: &[u8]) -> Result<usize> {
    let (magic, rest) = reply.split_first_chunk().context("a short reply")?;
    let (error, rest) = rest.split_first_chunk().context("a short reply")?;
    let cookie = rest.first_chunk().context("a short reply")?;
    ensure!(u32::from_be_bytes(*magic) == REPLY_MAGIC, "not a simple reply");
    ensure!(u32::from_be_bytes(*error) == 0, "a request failed");
    Ok(usize::try_from(u64::from_be_bytes(*cookie))?)
}

/// The size of the export, ready for requests.
fn negotiate(socket: &mut Socket, export: &str) -> Result<u64> {
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

fn read<const BYTES: usize>(socket: &mut Socket) -> Result<[u8; BYTES]> {
    let mut data = [0; BYTES];
    socket.read_exact(&mut data).context("the server has closed the connection")?;
    Ok(data)
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

    #[test]
    fn replies_are_found_however_the_stream_is_cut() {
        let reply =
            |cookie: u8| [&REPLY_MAGIC.to_be_bytes()[..], &[0; 11], &[cookie], b"abc"].concat();
        let stream = [reply(7), reply(9)].concat();
        for cut in 1..stream.len() {
            let mut replies = Replies::new(3);
            let mut found = Vec::new();
            for mut part in [&stream[..cut], &stream[cut..]] {
                while !part.is_empty() {
                    let (taken, cookie) = replies.take(part).unwrap();
                    part = &part[taken..];
                    found.extend(cookie);
                }
            }
            assert_eq!(found, [7, 9], "cut at {cut}");
        }
    }
}
