//! What requests do to the device.

use std::sync::Arc;

use brep_block::{BlockDevice, Error, ErrorKind, FlushLevel, WriteFlags, ZeroFlags};
use bytes::{Bytes, BytesMut};

use super::connection::Stop;
use super::contexts::{MetaContext, Target};
use crate::proto::server::{Action, Content, ContextExtents, Extent, Failure, ReadChunk};
use crate::proto::wire::{Errno, PAYLOAD_LEN_MAX};

/// Shorter holes are sent as data: a chunk of its own costs more.
const HOLE_LEN_MIN: u64 = 4096;
/// Most chunks that one read is cut into; after that all is data.
const CHUNKS_MAX: usize = 256;
/// Most extents of one context in a block status reply. A client asks again for what is missing.
pub(super) const EXTENTS_MAX: usize = 1024;
/// Most questions for a block status reply, about all contexts together; more than extents, because
/// neighbours may be equal.
const STATUS_CALLS_MAX: usize = 4096;
/// Most that a device is asked to zero or to discard at once, in bytes: some have to write every
/// byte of it, and a stop can only come in between.
const PIECE_LEN_MAX: u64 = 128 << 20;
/// How much a `CACHE` reads at a time, in bytes.
pub(super) const CACHE_LEN: u64 = 1 << 20;
/// Most that a `CACHE` reads, in bytes; it is a hint, and has to come to an end.
const CACHE_LEN_MAX: u64 = PAYLOAD_LEN_MAX as u64;

/// Carries a request out. The device is called, and its answer awaited, with everything owned,
/// so that the future may outlive its connection. `ask_for_holes`: a read may leave out what
/// reads as zeroes.
pub(super) async fn execute(
    target: Arc<Target>,
    action: Action,
    ask_for_holes: bool,
) -> Result<Content, Failure> {
    let device = &*target.device;
    match action {
        Action::Read { offset, len, .. } if ask_for_holes => {
            read_with_holes(device, offset, len).await
        }
        Action::Read { offset, len, .. } => {
            let data = read(device, offset, len).await?;
            Ok(Content::Data { offset, data })
        }
        Action::Write { offset, data, fua } => write(device, offset, data, fua).await,
        Action::Flush => flush(device).await,
        Action::Trim { offset, len, fua } => {
            let mut pieces = Pieces::new(&target, offset, len);
            while let Some((offset, len)) = pieces.next().await? {
                match device.discard(offset, len).await {
                    // A hint: not to follow it is no failure.
                    Err(error) if error.kind() == ErrorKind::Unsupported => break,
                    result => result.map_err(|error| failure(&error))?,
                }
            }
            if fua { flush(device).await } else { Ok(Content::Done) }
        }
        Action::Cache { offset, len } => cache(device, offset, len).await,
        Action::WriteZeroes { offset, len, fua, may_unmap, fast } => {
            write_zeroes(&target, offset, len, ZeroFlags { fua, may_unmap, fast }).await
        }
        Action::Resize { size, fua } => {
            device.truncate(size).await.map_err(|error| failure(&error))?;
            if fua { flush(device).await } else { Ok(Content::Done) }
        }
        Action::BlockStatus { offset, len, one, contexts } => {
            let extents_max = if one { 1 } else { EXTENTS_MAX };
            let is_wanted = |id: &u32| contexts.as_ref().is_none_or(|wanted| wanted.contains(id));
            let wanted: Vec<_> = target.contexts.iter().filter(|(id, _)| is_wanted(id)).collect();
            let calls_max = (STATUS_CALLS_MAX / wanted.len().max(1)).max(1);
            let mut found = Vec::new();
            for (id, context) in wanted {
                let extents = block_status(&**context, offset, len, extents_max, calls_max).await?;
                found.push(ContextExtents { id: *id, extents });
            }
            Ok(Content::Extents(found))
        }
    }
}

fn done(result: brep_block::Result<()>) -> Result<Content, Failure> {
    result.map(|()| Content::Done).map_err(|error| failure(&error))
}

/// The protocol keeps `ENOTSUP` and `EOVERFLOW` for cases of their own.
fn failure(error: &Error) -> Failure {
    let errno = match Errno(error.nbd_errno()) {
        Errno::ENOTSUP => Errno::EINVAL,
        Errno::EOVERFLOW => Errno::EIO,
        errno => errno,
    };
    tracing::debug!(%error, "a request failed");
    Failure::new(errno, error.to_string())
}

async fn flush(device: &dyn BlockDevice) -> Result<Content, Failure> {
    done(device.flush(FlushLevel::Durable).await)
}

/// The most that may be asked of a device at once.
fn transfer_max(device: &dyn BlockDevice) -> usize {
    device.limits().transfer_max.max(1) as usize
}

/// One call of the device; what it returns is as long as it has to be.
async fn read_once(device: &dyn BlockDevice, offset: u64, len: usize) -> Result<Bytes, Failure> {
    let data = device.read(offset, len).await.map_err(|error| failure(&error))?;
    if data.len() == len {
        return Ok(data);
    }
    // Sending it would put the connection out of step.
    let message = format!("{}: read {} instead of {len} bytes", device.name(), data.len());
    Err(Failure::new(Errno::EIO, message))
}

async fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> Result<Bytes, Failure> {
    let part_max = transfer_max(device);
    if len <= part_max {
        return read_once(device, offset, len).await;
    }
    let mut whole = BytesMut::with_capacity(len);
    while whole.len() < len {
        let part = part_max.min(len - whole.len());
        whole.extend_from_slice(&read_once(device, offset + whole.len() as u64, part).await?);
    }
    Ok(whole.freeze())
}

/// Reads a range and leaves out what reads as zeroes anyway.
async fn read_with_holes(
    device: &dyn BlockDevice,
    offset: u64,
    len: usize,
) -> Result<Content, Failure> {
    let end = offset + len as u64;
    let mut chunks = Vec::new();
    let (mut data_start, mut position) = (offset, offset);
    while position < end {
        let left = end - position;
        let status = match device.block_status(position, left).await {
            Ok(status) if chunks.len() < CHUNKS_MAX => status,
            // Too scattered, or unknown: data is always a right answer.
            _ => {
                position = end;
                break;
            }
        };
        let extent = status.len.clamp(1, left);
        if status.flags.zero && extent >= HOLE_LEN_MIN {
            read_into(device, data_start, position, &mut chunks).await?;
            let len = u32::try_from(extent).expect("not longer than the request");
            chunks.push(ReadChunk::Hole { offset: position, len });
            data_start = position + extent;
        }
        position += extent;
    }
    read_into(device, data_start, position, &mut chunks).await?;
    Ok(Content::Chunks(chunks))
}

async fn read_into(
    device: &dyn BlockDevice,
    mut start: u64,
    end: u64,
    chunks: &mut Vec<ReadChunk>,
) -> Result<(), Failure> {
    let part_max = transfer_max(device) as u64;
    while start < end {
        let part = part_max.min(end - start);
        let data = read_once(device, start, part as usize).await?;
        chunks.push(ReadChunk::Data { offset: start, data });
        start += part;
    }
    Ok(())
}

async fn write(
    device: &dyn BlockDevice,
    mut offset: u64,
    mut data: Bytes,
    fua: bool,
) -> Result<Content, Failure> {
    let part_max = transfer_max(device);
    let flags = WriteFlags { fua };
    while data.len() > part_max {
        done(device.write(offset, data.split_to(part_max), flags).await)?;
        offset += part_max as u64;
    }
    done(device.write(offset, data, flags).await)
}

async fn cache(device: &dyn BlockDevice, offset: u64, len: u64) -> Result<Content, Failure> {
    let end = offset + len.min(CACHE_LEN_MAX);
    let mut position = offset;
    while position < end {
        let part = CACHE_LEN.min(transfer_max(device) as u64).min(end - position);
        read_once(device, position, part as usize).await?;
        position += part;
        // What is in the page cache is copied at once: others shall have the thread in between.
        tokio::task::yield_now().await;
    }
    Ok(Content::Done)
}

/// A range in pieces that a device may be asked to change at once. They end at multiples of their
/// length, which are whole blocks and clusters.
struct Pieces<'a> {
    target: &'a Target,
    first: u64,
    position: u64,
    end: u64,
}

impl<'a> Pieces<'a> {
    fn new(target: &'a Target, offset: u64, len: u64) -> Self {
        Pieces { target, first: offset, position: offset, end: offset + len }
    }

    /// Offset and length of the next one.
    ///
    /// # Errors
    /// If there is one, but no time left for it.
    async fn next(&mut self) -> Result<Option<(u64, u64)>, Failure> {
        if self.position == self.end {
            return Ok(None);
        }
        let offset = self.position;
        if offset > self.first {
            // Devices that answer at once leave the thread to others in between.
            tokio::task::yield_now().await;
            if self.target.connection.stop_level() == Stop::Abort {
                return Err(shutting_down());
            }
        }
        let len = (PIECE_LEN_MAX - offset % PIECE_LEN_MAX).min(self.end - offset);
        self.position += len;
        Ok(Some((offset, len)))
    }

    fn is_one(&self) -> bool {
        self.end - self.first <= PIECE_LEN_MAX - self.first % PIECE_LEN_MAX
    }
}

async fn write_zeroes(
    target: &Target,
    offset: u64,
    len: u64,
    flags: ZeroFlags,
) -> Result<Content, Failure> {
    let device = &*target.device;
    let mut pieces = Pieces::new(target, offset, len);
    let in_one = pieces.is_one();
    let each = ZeroFlags { fua: flags.fua && in_one, ..flags };
    while let Some((offset, len)) = pieces.next().await? {
        match device.write_zeroes(offset, len, each).await {
            Err(error) if flags.fast && error.kind() == ErrorKind::Unsupported => {
                return Err(Failure::new(Errno::ENOTSUP, error.to_string()));
            }
            result => result.map_err(|error| failure(&error))?,
        }
    }
    if flags.fua && !in_one { flush(device).await } else { Ok(Content::Done) }
}

/// What is left of a request gets this when there is no more time for it.
pub(super) fn shutting_down() -> Failure {
    Failure::new(Errno::ESHUTDOWN, "the server is shutting down")
}

/// The extents of one context from `offset` on, as far as one reply goes.
async fn block_status(
    context: &dyn MetaContext,
    offset: u64,
    len: u64,
    extents_max: usize,
    calls_max: usize,
) -> Result<Vec<Extent>, Failure> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut position = 0;
    for _ in 0..calls_max {
        tokio::task::coop::consume_budget().await;
        let status = context
            .status(offset + position, len - position)
            .await
            .map_err(|error| failure(&error))?;
        let part = status.len.clamp(1, len - position);
        position += part;
        let full = extents.len() == extents_max;
        match extents.last_mut() {
            Some(last) if last.flags == status.flags => last.len += part,
            Some(_) if full => break,
            _ => extents.push(Extent { len: part, flags: status.flags }),
        }
        if position == len {
            break;
        }
    }
    Ok(extents)
}
