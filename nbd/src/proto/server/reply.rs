//! Replies: simple, structured and extended (§5, §6).

use bytes::{BufMut, Bytes, BytesMut};

use super::agreement::Agreed;
use super::handshake::truncated;
use super::output::Output;
use crate::proto::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Errno, ExtendedChunkHeader, RequestHeader, SimpleReply,
    TransmissionMode,
};

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
    /// In bytes; not 0, and below 4 GiB unless headers are extended.
    pub len: u64,
    /// The state, as the meta context defines it.
    pub flags: u32,
}

/// What a block status found in one meta context.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContextExtents {
    /// The id under which the context was selected.
    pub id: u32,
    /// At least one, from the start of the request.
    pub extents: Vec<Extent>,
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
    /// What a block status found, in at least one context; only with structured replies.
    Extents(Vec<ContextExtents>),
}

/// What a reply repeats of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestId {
    /// As the client chose it.
    pub cookie: u64,
    /// In bytes.
    pub offset: u64,
}

impl From<&RequestHeader> for RequestId {
    fn from(header: &RequestHeader) -> Self {
        RequestId { cookie: header.cookie, offset: header.offset }
    }
}

/// Lays replies out as it was agreed.
#[derive(Debug, Clone, Copy)]
pub struct ReplyEncoder {
    mode: TransmissionMode,
}

impl ReplyEncoder {
    /// For a connection with this agreement.
    #[must_use]
    pub fn new(agreed: &Agreed) -> Self {
        ReplyEncoder { mode: agreed.mode }
    }

    /// Appends the whole reply to this request.
    pub fn encode(&self, id: RequestId, result: Result<Content, Failure>, output: &mut Output) {
        let mut reply = Reply { mode: self.mode, id, output };
        match result {
            Ok(Content::Done) => reply.done(),
            Ok(Content::Data { offset, data }) if self.mode.is_structured() => {
                reply.data_chunk(ChunkFlags::DONE, offset, data);
            }
            Ok(Content::Data { data, .. }) => {
                reply.simple(Errno::OK);
                reply.output.put_bytes(data);
            }
            Ok(Content::Chunks(chunks)) => reply.read_chunks(chunks),
            Ok(Content::Extents(contexts)) => reply.extents(&contexts),
            Err(failure) if self.mode.is_structured() => reply.error_chunk(&failure),
            Err(failure) => reply.simple(failure.errno),
        }
    }
}

/// One reply while it is being laid out.
struct Reply<'a> {
    mode: TransmissionMode,
    id: RequestId,
    output: &'a mut Output,
}

impl Reply<'_> {
    /// Success without content: a simple reply, unless headers are extended.
    fn done(&mut self) {
        if self.mode.is_extended() {
            self.header(ChunkFlags::DONE, ChunkType::NONE, 0);
        } else {
            self.simple(Errno::OK);
        }
    }

    fn simple(&mut self, error: Errno) {
        self.output.put_slice(&SimpleReply { error, cookie: self.id.cookie }.encode());
    }

    fn header(&mut self, flags: ChunkFlags, kind: ChunkType, len: usize) {
        let RequestId { cookie, offset } = self.id;
        if self.mode.is_extended() {
            let len = len as u64;
            let header = ExtendedChunkHeader { flags, kind, cookie, offset, len };
            return self.output.put_slice(&header.encode());
        }
        let len = u32::try_from(len).expect("a chunk is at most as long as a request allows");
        self.output.put_slice(&ChunkHeader { flags, kind, cookie, len }.encode());
    }

    fn data_chunk(&mut self, flags: ChunkFlags, offset: u64, data: Bytes) {
        if data.is_empty() {
            return self.header(flags, ChunkType::NONE, 0);
        }
        self.header(flags, ChunkType::OFFSET_DATA, 8 + data.len());
        self.output.put_slice(&offset.to_be_bytes());
        self.output.put_bytes(data);
    }

    fn read_chunks(&mut self, chunks: Vec<ReadChunk>) {
        let last = chunks.len().saturating_sub(1);
        if chunks.is_empty() {
            return self.header(ChunkFlags::DONE, ChunkType::NONE, 0);
        }
        for (index, chunk) in chunks.into_iter().enumerate() {
            let flags = done_if(index == last);
            match chunk {
                ReadChunk::Data { offset, data } => self.data_chunk(flags, offset, data),
                ReadChunk::Hole { offset, len } => {
                    self.header(flags, ChunkType::OFFSET_HOLE, 12);
                    self.output.put_slice(&offset.to_be_bytes());
                    self.output.put_slice(&len.to_be_bytes());
                }
            }
        }
    }

    fn extents(&mut self, contexts: &[ContextExtents]) {
        let last = contexts.len().saturating_sub(1);
        for (index, ContextExtents { id, extents }) in contexts.iter().enumerate() {
            let mut payload = BytesMut::with_capacity(8 + 16 * extents.len());
            payload.put_u32(*id);
            let kind = if self.mode.is_extended() {
                payload.put_u32(extents.len() as u32);
                for extent in extents {
                    payload.put_u64(extent.len);
                    payload.put_u64(extent.flags.into());
                }
                ChunkType::BLOCK_STATUS_EXT
            } else {
                for extent in extents {
                    let len = u32::try_from(extent.len);
                    payload.put_u32(len.expect("not longer than a compact request"));
                    payload.put_u32(extent.flags);
                }
                ChunkType::BLOCK_STATUS
            };
            self.header(done_if(index == last), kind, payload.len());
            self.output.put_bytes(payload.freeze());
        }
    }

    fn error_chunk(&mut self, failure: &Failure) {
        let message = truncated(&failure.message);
        self.header(ChunkFlags::DONE, ChunkType::ERROR, 6 + message.len());
        self.output.put_slice(&failure.errno.0.to_be_bytes());
        let len = u16::try_from(message.len()).unwrap_or_default();
        self.output.put_slice(&len.to_be_bytes());
        self.output.put_slice(message.as_bytes());
    }
}

fn done_if(last: bool) -> ChunkFlags {
    if last { ChunkFlags::DONE } else { ChunkFlags::NONE }
}
