//! Copies from standard input and to standard output: raw, in order.
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;

use anyhow::Context;
use brep_block::{BlockDevice, Operation, WriteFlags, ZeroFlags, is_zero};
use bytes::Bytes;
use indicatif::ProgressBar;
use tokio::task::{JoinHandle, JoinSet, spawn_blocking};

use super::target::Target;
use crate::args::CopyArgs;
use crate::exit::Failure;

/// Writes what comes on standard input, with many writes in flight.
pub(super) async fn from_stdin(
    args: &CopyArgs,
    target: &Target,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    // Not the standard library's, which reads through a buffer of its own.
    let mut stdin = File::from(io::stdin().as_fd().try_clone_to_owned().context("stdin")?);
    let device = target.device();
    let mut writes = JoinSet::new();
    let mut at = 0;
    loop {
        let mut buffer = vec![0; piece_len(args, device) as usize];
        let (file, read) = spawn_blocking(move || {
            let read = read_full(&mut stdin, &mut buffer).map(|len| {
                buffer.truncate(len);
                Bytes::from(buffer)
            });
            (stdin, read)
        })
        .await
        .context("reading standard input")?;
        stdin = file;
        let data = read.with_context(|| format!("standard input, at offset {at}"))?;
        if data.is_empty() {
            break;
        }
        while writes.len() >= args.requests {
            ended(writes.join_next().await)?;
        }
        let len = data.len() as u64;
        let zero = args.sparse > 0 && !args.allocated && is_zero(&data);
        let left_out = zero && target.is_zero;
        if left_out && !target.grows() {
            // What does not fit has not been copied, whatever it holds.
            device.check_range(Operation::WriteZeroes, at, len)?;
        }
        if !left_out {
            let device = Arc::clone(device);
            writes.spawn(async move {
                if zero {
                    let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
                    return device.write_zeroes(at, len, flags).await;
                }
                device.write(at, data, WriteFlags::default()).await
            });
        }
        at += len;
        bar.inc(len);
    }
    while !writes.is_empty() {
        ended(writes.join_next().await)?;
    }
    if target.grows() {
        // Zeroes at the end have not been written.
        device.truncate(at).await?;
    }
    Ok(())
}

/// In bytes: whole blocks, which are powers of two as well.
fn piece_len(args: &CopyArgs, device: &Arc<dyn BlockDevice>) -> u32 {
    let limits = device.limits();
    args.request_size.min(limits.transfer_max).max(limits.block_size)
}

fn ended(
    joined: Option<Result<brep_block::Result<()>, tokio::task::JoinError>>,
) -> Result<(), Failure> {
    match joined {
        None => Ok(()),
        Some(joined) => Ok(joined.context("a write")??),
    }
}

/// Reads until the buffer is full or the stream ends.
fn read_full(stream: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        match stream.read(&mut buffer[done..]) {
            Ok(0) => break,
            Ok(len) => done += len,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Reads ahead, and writes to standard output in order.
pub(super) async fn to_stdout(
    args: &CopyArgs,
    source: &Arc<dyn BlockDevice>,
    bar: &ProgressBar,
) -> Result<(), Failure> {
    let mut stdout = File::from(io::stdout().as_fd().try_clone_to_owned().context("stdout")?);
    let piece = u64::from(piece_len(args, source));
    let mut reads: VecDeque<JoinHandle<brep_block::Result<Bytes>>> = VecDeque::new();
    let mut at = 0;
    loop {
        while at < source.size() && reads.len() < args.requests {
            let (device, offset) = (Arc::clone(source), at);
            // At most as long as one request, which fits.
            let len = piece.min(source.size() - at) as usize;
            reads.push_back(tokio::spawn(async move { device.read(offset, len).await }));
            at += len as u64;
        }
        let Some(read) = reads.pop_front() else { return Ok(()) };
        let data = read.await.context("a read")??;
        let len = data.len() as u64;
        let (file, written) = spawn_blocking(move || {
            let written = stdout.write_all(&data);
            (stdout, written)
        })
        .await
        .context("writing standard output")?;
        stdout = file;
        written.context("standard output")?;
        bar.inc(len);
    }
}
