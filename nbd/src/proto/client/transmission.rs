use std::collections::VecDeque;

use bytes::{Bytes, BytesMut};

use super::Slab;
use super::option_reply::message;
use super::outstanding::{Outstanding, known};
use super::read_buffer::ReadBuffer;
use crate::proto::wire::{
    BadMagic, ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, EXTENDED_REPLY_MAGIC,
    Errno, ExtendedChunkHeader, Reader, RequestHeader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
    SimpleReply, TransmissionMode,
};

/// Longest error chunk, in bytes: the text has at most 64 KiB; kinds of errors that we do not know
/// may have more to say, but not without bounds.
const ERROR_LEN_MAX: u32 = 1 << 20;

/// How the server broke the protocol. The stream is then of no further use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum ReplyError {
    #[error("wrong magic number {0:#010x} in a reply")]
    Magic(u32),
    #[error("a reply to a request that was never sent (cookie {0:#x})")]
    Cookie(u64),
    #[error("a simple reply to a {0}")]
    Simple(Command),
    #[error("a reply of a kind that was not agreed on (magic number {0:#010x})")]
    Mode(u32),
    #[error("a reply to offset {0}, at which nothing was asked for")]
    Offset(u64),
    #[error("a chunk of type {kind} in the reply to a {command}")]
    Chunk { kind: ChunkType, command: Command },
    #[error("a chunk of type {kind} with {len} bytes")]
    ChunkLength { kind: ChunkType, len: u64 },
    #[error("an empty chunk that is not the last one")]
    EmptyNotDone,
    #[error("data outside the range that was asked for")]
    OutsideRequest,
    #[error("a hole without length")]
    EmptyHole,
    #[error("two chunks for the same bytes")]
    Overlap,
    #[error("a read cut into more pieces than anybody can want")]
    TooManyChunks,
    #[error("a read that is reported as successful, but not all of whose data came")]
    Incomplete,
    #[error("a list of extents that is not as long as it says")]
    ExtentCount,
    #[error("an extent without length")]
    EmptyExtent,
    #[error("the state of a range in context {0}, which was not agreed on")]
    Context(u32),
    #[error("the state of a range told twice")]
    RepeatedContext,
    #[error("the state of a range that is reported as successful, but was not told")]
    NoExtent,
    #[error("an error chunk that reports no error")]
    ErrorWithoutError,
    #[error("an error text longer than its chunk")]
    ErrorText,
    #[error("an error at an offset outside the range that was asked for")]
    ErrorOffset,
}

/// A request, apart from the payload of a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub command: Command,
    /// Modifiers.
    pub flags: CommandFlags,
    /// First byte of the range, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes; below 4 GiB unless headers are extended.
    pub len: u64,
}

/// The end of a request.
#[derive(Debug, PartialEq, Eq)]
pub struct Completion {
    /// What the caller gave with the request.
    pub tag: u64,
    /// The request itself.
    pub request: Request,
    /// What the server said.
    pub result: Result<Answer, Refusal>,
}

/// A successful reply.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// Done.
    Done,
    /// What was read: exactly as much as was asked for.
    Data(Bytes),
    /// The extents of a range from its beginning on, at least one for each context, in the order
    /// in which [`Transmission::new`] was given the contexts.
    Extents(Vec<Vec<Extent>>),
}

/// Bytes that share their state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// In bytes: not 0, otherwise as the server sent it.
    pub len: u64,
    /// What they mean is up to the context; for `base:allocation`,
    /// [`AllocationFlags`](crate::proto::wire::AllocationFlags).
    pub flags: u64,
}

/// A request that the server refused, or failed to carry out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// One of those that the protocol lists.
    pub errno: Errno,
    /// What the server says about it; may be empty.
    pub message: String,
}

/// A place for data that are about to arrive: receive at most `missing` bytes to the end of
/// `buffer`, then call [`Transmission::received_directly`].
#[derive(Debug)]
pub struct DirectRead<'a> {
    /// Has room for all of them.
    pub buffer: &'a mut BytesMut,
    /// How many bytes are to come.
    pub missing: usize,
}

/// A client's side of the transmission phase: numbers the requests, and decodes the replies.
///
/// Nothing that a server sends is believed: whatever does not fit the request that it claims to
/// answer is a [`ReplyError`]. Memory is bounded by the requests outstanding.
#[derive(Debug)]
pub struct Transmission {
    mode: TransmissionMode,
    /// The ids of the meta contexts.
    contexts: Vec<u32>,
    /// Extents that are being kept.
    extents: usize,
    outstanding: Slab<Outstanding>,
    state: State,
    completed: VecDeque<Completion>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    Header,
    Chunk(Chunk),
}

/// What is being received. Lengths count what has not been taken in yet.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    cookie: u64,
    done: bool,
    len: u32,
    body: Body,
}

#[derive(Debug, Clone, Copy)]
enum Body {
    DataOffset,
    Data,
    Hole,
    Context,
    Extents,
    /// As the two before, in 64 bits, and with a count.
    LongContext,
    LongExtents,
    ErrorHead(ChunkType),
    ErrorText {
        len: u32,
        with_offset: bool,
    },
    ErrorOffset,
    Skip,
}

impl Transmission {
    /// No request is outstanding. Mode and ids of the meta contexts as the handshake has agreed.
    #[must_use]
    pub fn new(mode: TransmissionMode, contexts: Vec<u32>) -> Self {
        Transmission {
            mode,
            contexts,
            extents: 0,
            outstanding: Slab::default(),
            state: State::Header,
            completed: VecDeque::new(),
        }
    }

    /// How requests and replies are laid out.
    #[must_use]
    pub fn mode(&self) -> TransmissionMode {
        self.mode
    }

    /// How many requests have no complete reply yet.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding.len()
    }

    /// Registers a request; the header is to be sent now, and then the payload of a write. `tag`
    /// comes back with the completion.
    ///
    /// # Panics
    /// If a read is longer than 4 GiB.
    pub fn start(&mut self, request: Request, tag: u64) -> RequestHeader {
        let read_len = if request.command == Command::READ { request.len } else { 0 };
        let read_len = u32::try_from(read_len).expect("a read has a payload's length");
        let contexts =
            if request.command == Command::BLOCK_STATUS { self.contexts.len() } else { 0 };
        let cookie = self.outstanding.insert(Outstanding {
            tag,
            request,
            begun: false,
            refusal: None,
            text: Vec::new(),
            texts: 0,
            read: ReadBuffer::new(read_len),
            extents: vec![Vec::new(); contexts],
            context: 0,
        });
        let Request { command, flags, offset, len } = request;
        let has_payload = self.mode.is_extended() && command == Command::WRITE;
        let flags = flags.with_if(has_payload, CommandFlags::PAYLOAD_LEN);
        RequestHeader { flags, command, cookie, offset, len }
    }

    /// The next request that has ended.
    pub fn pop(&mut self) -> Option<Completion> {
        self.completed.pop_front()
    }

    /// Takes in what has been received; returns how many bytes of it are used up. The rest, less
    /// than a header, is to be given again together with what follows.
    ///
    /// # Errors
    /// The server broke the protocol. Call nothing but [`pop`](Self::pop) afterwards.
    pub fn receive(&mut self, input: &[u8]) -> Result<usize, ReplyError> {
        let mut rest = input;
        loop {
            let before = rest.len();
            let done = match self.state {
                State::Header => !self.header(&mut rest)?,
                State::Chunk(chunk) => !self.body(chunk, &mut rest)?,
            };
            if done {
                return Ok(input.len() - before);
            }
        }
    }

    /// Where to receive the bytes that come next, if they are the data of a read in order.
    pub fn direct_read(&mut self) -> Option<DirectRead<'_>> {
        let State::Chunk(Chunk { cookie, len, body: Body::Data, .. }) = self.state else {
            return None;
        };
        let buffer = self.outstanding.get_mut(cookie)?.read.spare()?;
        Some(DirectRead { buffer, missing: len as usize })
    }

    /// `len` bytes have been put where [`direct_read`](Self::direct_read) said.
    ///
    /// # Errors
    /// As for [`receive`](Self::receive).
    pub fn received_directly(&mut self, len: usize) -> Result<(), ReplyError> {
        if let State::Chunk(mut chunk) = self.state {
            chunk.len = chunk.len.saturating_sub(u32::try_from(len).unwrap_or(u32::MAX));
            self.go_on(chunk)?;
        }
        Ok(())
    }

    /// `Ok(false)`: there is not enough yet.
    fn header(&mut self, rest: &mut &[u8]) -> Result<bool, ReplyError> {
        let Some(magic) = rest.first_chunk() else { return Ok(false) };
        match (u32::from_be_bytes(*magic), self.mode) {
            (SIMPLE_REPLY_MAGIC, TransmissionMode::Simple | TransmissionMode::Structured) => {
                match take(rest) {
                    Some(head) => self.simple(SimpleReply::decode(head).map_err(wrong_magic)?)?,
                    None => return Ok(false),
                }
            }
            (STRUCTURED_REPLY_MAGIC, TransmissionMode::Structured) => match take(rest) {
                Some(head) => self.chunk(ChunkHeader::decode(head).map_err(wrong_magic)?)?,
                None => return Ok(false),
            },
            (EXTENDED_REPLY_MAGIC, TransmissionMode::Extended) => match take(rest) {
                Some(head) => {
                    self.extended(ExtendedChunkHeader::decode(head).map_err(wrong_magic)?)?;
                }
                None => return Ok(false),
            },
            (magic @ (SIMPLE_REPLY_MAGIC | STRUCTURED_REPLY_MAGIC | EXTENDED_REPLY_MAGIC), _) => {
                return Err(ReplyError::Mode(magic));
            }
            (magic, _) => return Err(ReplyError::Magic(magic)),
        }
        Ok(true)
    }

    fn simple(&mut self, reply: SimpleReply) -> Result<(), ReplyError> {
        let structured = self.mode.is_structured();
        let cookie = reply.cookie;
        let slot = self.outstanding.get_mut(cookie).ok_or(ReplyError::Cookie(cookie))?;
        let command = slot.request.command;
        if slot.begun || (structured && command == Command::READ) {
            return Err(ReplyError::Simple(command));
        }
        if reply.error != Errno::OK {
            slot.refusal = Some(Refusal { errno: known(reply.error), message: String::new() });
            return self.complete(cookie);
        }
        let len = slot.read.len();
        if command == Command::READ && len > 0 {
            slot.begun = true;
            slot.read.begin(0, len)?;
            self.state = State::Chunk(Chunk { cookie, done: true, len, body: Body::Data });
            return Ok(());
        }
        self.complete(cookie)
    }

    /// What extended chunks have more than structured ones.
    fn extended(&mut self, header: ExtendedChunkHeader) -> Result<(), ReplyError> {
        let ExtendedChunkHeader { flags, kind, cookie, offset, len } = header;
        let slot = self.outstanding.get_mut(cookie).ok_or(ReplyError::Cookie(cookie))?;
        if slot.request.offset != offset {
            return Err(ReplyError::Offset(offset));
        }
        let len = u32::try_from(len).map_err(|_| ReplyError::ChunkLength { kind, len })?;
        self.chunk(ChunkHeader { flags, kind, cookie, len })
    }

    fn chunk(&mut self, header: ChunkHeader) -> Result<(), ReplyError> {
        let ChunkHeader { kind, cookie, len, .. } = header;
        let done = header.flags.contains(ChunkFlags::DONE);
        let extended = self.mode.is_extended();
        let slot = self.outstanding.get_mut(cookie).ok_or(ReplyError::Cookie(cookie))?;
        slot.begun = true;
        let command = slot.request.command;
        let fits = |condition| {
            let violation = ReplyError::ChunkLength { kind, len: len.into() };
            if condition { Ok(()) } else { Err(violation) }
        };
        let body = match (kind, command) {
            (ChunkType::NONE, _) => {
                fits(len == 0)?;
                return if done { self.complete(cookie) } else { Err(ReplyError::EmptyNotDone) };
            }
            (ChunkType::OFFSET_DATA, Command::READ) => {
                fits(len > 8)?;
                Body::DataOffset
            }
            (ChunkType::OFFSET_HOLE, Command::READ) => {
                fits(len == 12)?;
                Body::Hole
            }
            (ChunkType::BLOCK_STATUS, Command::BLOCK_STATUS) => {
                fits(len >= 12 && len % 8 == 4)?;
                Body::Context
            }
            (ChunkType::BLOCK_STATUS_EXT, Command::BLOCK_STATUS) if extended => {
                fits(len >= 24 && len % 16 == 8)?;
                Body::LongContext
            }
            (kind, _) if kind.is_error() => {
                fits((6..=ERROR_LEN_MAX).contains(&len))?;
                Body::ErrorHead(kind)
            }
            _ => return Err(ReplyError::Chunk { kind, command }),
        };
        self.state = State::Chunk(Chunk { cookie, done, len, body });
        Ok(())
    }

    /// `Ok(false)`: there is not enough yet.
    fn body(&mut self, mut chunk: Chunk, rest: &mut &[u8]) -> Result<bool, ReplyError> {
        let cookie = chunk.cookie;
        let slot = self.outstanding.get_mut(cookie).ok_or(ReplyError::Cookie(cookie))?;
        match chunk.body {
            Body::DataOffset => {
                let Some(offset) = take(rest) else { return Ok(false) };
                chunk.len -= 8;
                slot.read.begin(slot.relative(u64::from_be_bytes(*offset))?, chunk.len)?;
                chunk.body = Body::Data;
            }
            Body::Data => {
                let Some(bytes) = take_some(rest, chunk.len) else { return Ok(false) };
                slot.read.put(bytes);
                chunk.len -= bytes.len() as u32;
            }
            Body::Hole => {
                let Some(body) = take::<12>(rest) else { return Ok(false) };
                slot.hole(body)?;
                chunk.len = 0;
            }
            Body::Context => {
                let Some(id) = take(rest) else { return Ok(false) };
                slot.begin_context(u32::from_be_bytes(*id), &self.contexts)?;
                chunk.len -= 4;
                chunk.body = Body::Extents;
            }
            Body::Extents => {
                let Some(extent) = take::<8>(rest) else { return Ok(false) };
                let mut reader = Reader::new(extent);
                let (len, flags) = (reader.u32().map(u64::from), reader.u32().map(u64::from));
                slot.extent(len, flags, &mut self.extents)?;
                chunk.len -= 8;
            }
            Body::LongContext => {
                let Some(head) = take::<8>(rest) else { return Ok(false) };
                let mut reader = Reader::new(head);
                slot.begin_context(reader.u32().unwrap_or_default(), &self.contexts)?;
                chunk.len -= 8;
                if reader.u32() != Some(chunk.len / 16) {
                    return Err(ReplyError::ExtentCount);
                }
                chunk.body = Body::LongExtents;
            }
            Body::LongExtents => {
                let Some(extent) = take::<16>(rest) else { return Ok(false) };
                let mut reader = Reader::new(extent);
                slot.extent(reader.u64(), reader.u64(), &mut self.extents)?;
                chunk.len -= 16;
            }
            Body::ErrorHead(kind) => {
                let Some(head) = take::<6>(rest) else { return Ok(false) };
                chunk.len -= 6;
                let len = slot.error(head, kind, chunk.len)?;
                let with_offset = kind == ChunkType::ERROR_OFFSET;
                chunk.body = Body::ErrorText { len, with_offset };
            }
            Body::ErrorText { len: 0, with_offset: true } => chunk.body = Body::ErrorOffset,
            Body::ErrorText { len: 0, with_offset: false } => chunk.body = Body::Skip,
            Body::ErrorText { len, with_offset } => {
                let Some(text) = take_some(rest, len) else { return Ok(false) };
                slot.error_text(text);
                let taken = text.len() as u32;
                chunk.len -= taken;
                chunk.body = Body::ErrorText { len: len - taken, with_offset };
            }
            Body::ErrorOffset => {
                let Some(offset) = take(rest) else { return Ok(false) };
                slot.error_offset(u64::from_be_bytes(*offset))?;
                chunk.len -= 8;
                chunk.body = Body::Skip;
            }
            Body::Skip => {
                let Some(bytes) = take_some(rest, chunk.len) else { return Ok(false) };
                chunk.len -= bytes.len() as u32;
            }
        }
        self.go_on(chunk)?;
        Ok(true)
    }

    /// Part of a chunk has been taken in: the rest of it, or the next header, comes next.
    fn go_on(&mut self, chunk: Chunk) -> Result<(), ReplyError> {
        if chunk.len > 0 {
            self.state = State::Chunk(chunk);
            return Ok(());
        }
        self.state = State::Header;
        if chunk.done { self.complete(chunk.cookie) } else { Ok(()) }
    }

    fn complete(&mut self, cookie: u64) -> Result<(), ReplyError> {
        let slot = self.outstanding.remove(cookie).ok_or(ReplyError::Cookie(cookie))?;
        self.extents -= slot.extents.iter().map(Vec::len).sum::<usize>();
        let result = match (slot.refusal, slot.request.command) {
            (Some(refusal), _) => Err(Refusal { message: message(&slot.text), ..refusal }),
            (None, Command::READ) => Ok(Answer::Data(slot.read.finish()?)),
            (None, Command::BLOCK_STATUS) => {
                if slot.extents.is_empty() || slot.extents.iter().any(Vec::is_empty) {
                    return Err(ReplyError::NoExtent);
                }
                Ok(Answer::Extents(slot.extents))
            }
            (None, _) => Ok(Answer::Done),
        };
        self.completed.push_back(Completion { tag: slot.tag, request: slot.request, result });
        Ok(())
    }
}

fn wrong_magic(error: BadMagic) -> ReplyError {
    ReplyError::Magic(error.0 as u32)
}

/// The next `N` bytes, if they are there.
fn take<'a, const N: usize>(rest: &mut &'a [u8]) -> Option<&'a [u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(head)
}

/// Up to `len` bytes; `None` if there are none.
fn take_some<'a>(rest: &mut &'a [u8], len: u32) -> Option<&'a [u8]> {
    let (head, tail) = rest.split_at(rest.len().min(len as usize));
    *rest = tail;
    if head.is_empty() { None } else { Some(head) }
}
