//! Replies, simple and structured (§5, §6).

use bytes::{BufMut, Bytes, BytesMut};

use super::handshake::{Agreed, truncated};
use super::output::Output;
use crate::proto::wire::{AllocationFlags, ChunkFlags, ChunkHeader, ChunkType, Errno, SimpleReply};

/// A failed request: a number for programs, and a text that is sent where the reply has room
/// for one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The reason as a number; never [`Errno::OK`].
    pub errno: Errno,
    /// The reason in words.
    pub message: String,
}

impl Failure {
    /// A request failed.
    pub fn new(errno: Errno, message: impl Into<String>) -> Self {
        Failure { errno, message: message.into() }
    }
}

/// A part of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ReadChunk {
    /// Bytes; not empty.
    Data {
        /// Where they lie in the export, in bytes.
        offset: u64,
        /// The bytes.
        data: Bytes,
    },
    /// A range that reads as zeroes.
    Hole {
        /// Where it starts, in bytes.
        offset: u64,
        /// Its length in bytes; not 0.
        len: u32,
    },
}

/// A range whose bytes share a state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// In bytes; not 0.
    pub len: u32,
    /// The state.
    pub flags: AllocationFlags,
}

/// What a successful request gives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// Nothing but the success.
    Done,
    /// What a read found, in one piece that starts at the request's offset.
    Data {
        /// Offset of the request.
        offset: u64,
        /// As many bytes as were asked for.
        data: Bytes,
    },
    /// What a read found, in pieces that cover the request; only with structured replies.
    Chunks(Vec<ReadChunk>),
    /// What a block status found: at least one extent; only with structured replies.
    Extents(Vec<Extent>),
}

/// Lays replies out as it was agreed.
#[derive(Debug, Clone, Copy)]
pub struct ReplyEncoder {
    structured: bool,
    base_allocation_id: u32,
}

impl ReplyEncoder {
    /// For a connection with this agreement.
    #[must_use]
    pub fn new(agreed: &Agreed) -> Self {
        ReplyEncoder {
            structured: agreed.structured,
            base_allocation_id: agreed.base_allocation_id.unwrap_or_default(),
        }
    }

    /// Appends the whole reply to the request with this cookie.
    pub fn encode(&self, cookie: u64, result: Result<Content, Failure>, output: &mut Output) {
        match result {
            // Success without content is a simple reply in both modes.
            Ok(Content::Done) => simple(cookie, Errno::OK, output),
            Ok(Content::Data { offset, data }) if self.structured => {
                data_chunk(cookie, ChunkFlags::DONE, offset, data, output);
            }
            Ok(Content::Data { data, .. }) => {
                simple(cookie, Errno::OK, output);
                output.put_bytes(data);
            }
            Ok(Content::Chunks(chunks)) => read_chunks(cookie, chunks, output),
            Ok(Content::Extents(extents)) => self.extents(cookie, &extents, output),
            Err(failure) if self.structured => error_chunk(cookie, &failure, output),
            Err(failure) => simple(cookie, failure.errno, output),
        }
    }

    fn extents(&self, cookie: u64, extents: &[Extent], output: &mut Output) {
        let mut payload = BytesMut::with_capacity(4 + 8 * extents.len());
        payload.put_u32(self.base_allocation_id);
        for extent in extents {
            payload.put_u32(extent.len);
            payload.put_u32(extent.flags.0);
        }
        header(cookie, ChunkFlags::DONE, ChunkType::BLOCK_STATUS, payload.len(), output);
        output.put_bytes(payload.freeze());
    }
}

fn simple(cookie: u64, error: Errno, output: &mut Output) {
    output.put_slice(&SimpleReply { error, cookie }.encode());
}

fn header(cookie: u64, flags: ChunkFlags, kind: ChunkType, len: usize, output: &mut Output) {
    let len = u32::try_from(len).expect("a chunk is at most as long as a request allows");
    output.put_slice(&ChunkHeader { flags, kind, cookie, len }.encode());
}

fn data_chunk(cookie: u64, flags: ChunkFlags, offset: u64, data: Bytes, output: &mut Output) {
    if data.is_empty() {
        return header(cookie, flags, ChunkType::NONE, 0, output);
    }
    header(cookie, flags, ChunkType::OFFSET_DATA, 8 + data.len(), output);
    output.put_slice(&offset.to_be_bytes());
    output.put_bytes(data);
}

fn read_chunks(cookie: u64, chunks: Vec<ReadChunk>, output: &mut Output) {
    let last = chunks.len().saturating_sub(1);
    if chunks.is_empty() {
        return header(cookie, ChunkFlags::DONE, ChunkType::NONE, 0, output);
    }
    for (index, chunk) in chunks.into_iter().enumerate() {
        let flags = if index == last { ChunkFlags::DONE } else { ChunkFlags::NONE };
        match chunk {
            ReadChunk::Data { offset, data } => data_chunk(cookie, flags, offset, data, output),
            ReadChunk::Hole { offset, len } => {
                header(cookie, flags, ChunkType::OFFSET_HOLE, 12, output);
                output.put_slice(&offset.to_be_bytes());
                output.put_slice(&len.to_be_bytes());
            }
        }
    }
}

fn error_chunk(cookie: u64, failure: &Failure, output: &mut Output) {
    let message = truncated(&failure.message);
    header(cookie, ChunkFlags::DONE, ChunkType::ERROR, 6 + message.len(), output);
    output.put_slice(&failure.errno.0.to_be_bytes());
    output.put_slice(&u16::try_from(message.len()).unwrap_or_default().to_be_bytes());
    output.put_slice(message.as_bytes());
}
