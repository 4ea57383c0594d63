//! Requests: taken out of the input one by one, and checked against the export (§4, §6, §11).

use bytes::{Buf, Bytes, BytesMut};

use super::agreement::Agreed;
use super::reply::Failure;
use crate::proto::wire::{
    BadMagic, Command, CommandFlags, Errno, PAYLOAD_LEN_MAX, Reader, RequestHeader,
    TransmissionMode,
};

/// Takes requests out of a stream of bytes.
///
/// In two steps, so that a driver can decide whether it has room for a request before it makes
/// room for the payload: [`header`](Self::header), then [`request`](Self::request).
#[derive(Debug)]
pub struct Decoder {
    mode: TransmissionMode,
    header: Option<RequestHeader>,
}

/// A request as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Its fixed part.
    pub header: RequestHeader,
    /// The data to be written, or what an extended request carries. A part of the input's memory.
    pub payload: Bytes,
}

impl Decoder {
    /// At the start of a request.
    #[must_use]
    pub fn new(mode: TransmissionMode) -> Self {
        Decoder { mode, header: None }
    }

    /// The fixed part of the next request, as soon as it is there; the same one until
    /// [`request`](Self::request) has returned it.
    ///
    /// # Errors
    /// If this is no request: the connection has to be dropped.
    pub fn header(&mut self, input: &mut BytesMut) -> Result<Option<RequestHeader>, BadMagic> {
        if self.header.is_none() {
            self.header = if self.mode.is_extended() {
                input.first_chunk().map(RequestHeader::decode_extended).transpose()?
            } else {
                input.first_chunk().map(RequestHeader::decode).transpose()?
            };
            if self.header.is_some() {
                input.advance(self.mode.request_header_size());
            }
        }
        Ok(self.header)
    }

    /// Bytes that follow this header. More than [`PAYLOAD_LEN_MAX`] need not be waited for: the
    /// connection has to be dropped.
    #[must_use]
    pub fn payload_len(&self, header: &RequestHeader) -> u64 {
        // A write has one even without the flag: QEMU 10.0 leaves it out.
        let has_payload = header.command == Command::WRITE
            || (self.mode.is_extended() && header.flags.contains(CommandFlags::PAYLOAD_LEN));
        if has_payload { header.len } else { 0 }
    }

    /// The request whose header has been seen, as soon as its payload is there.
    pub fn request(&mut self, input: &mut BytesMut) -> Option<Request> {
        let header = self.header?;
        let len = usize::try_from(self.payload_len(&header)).ok()?;
        if input.len() < len {
            return None;
        }
        let payload = if len == 0 { Bytes::new() } else { input.split_to(len).freeze() };
        self.request_with(payload)
    }

    /// The request whose header has been seen, with a payload that a driver has received into
    /// memory of its own: [`payload_len`](Self::payload_len) bytes.
    pub fn request_with(&mut self, payload: Bytes) -> Option<Request> {
        let header = self.header.take()?;
        Some(Request { header, payload })
    }

    /// How many bytes are missing until the next step can be taken.
    #[must_use]
    pub fn missing(&self, input: &BytesMut) -> usize {
        let need = match &self.header {
            None => self.mode.request_header_size(),
            Some(header) => usize::try_from(self.payload_len(header)).unwrap_or(usize::MAX),
        };
        need.saturating_sub(input.len())
    }

    /// Nothing of a request has been received yet: this is where a peer may close.
    #[must_use]
    pub fn is_between_requests(&self, input: &BytesMut) -> bool {
        self.header.is_none() && input.is_empty()
    }
}

/// What a request asks the device to do. Every range lies inside the export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum Action {
    Read {
        offset: u64,
        len: usize,
        /// At most one content chunk.
        dont_fragment: bool,
    },
    Write {
        offset: u64,
        data: Bytes,
        fua: bool,
    },
    Flush,
    Trim {
        offset: u64,
        len: u64,
        fua: bool,
    },
    Cache {
        offset: u64,
        len: u64,
    },
    WriteZeroes {
        offset: u64,
        len: u64,
        fua: bool,
        may_unmap: bool,
        fast: bool,
    },
    Resize {
        /// In bytes.
        size: u64,
        fua: bool,
    },
    BlockStatus {
        offset: u64,
        len: u64,
        /// Only the first extent is wanted.
        one: bool,
        /// The ids of the contexts that are asked for, each once; none: all that are selected.
        contexts: Option<Vec<u32>>,
    },
}

/// Says what a request means on an export, or why it is refused. `DISC` has no reply and is no
/// action: the driver handles it before.
///
/// # Errors
/// As the protocol asks for: `EPERM` for changes to a read-only export, `ENOSPC` for writes beyond
/// the end (and for everything beyond an end that clients may move), `EINVAL` for everything else.
/// The connection survives.
pub fn check(mut request: Request, agreed: &Agreed) -> Result<Action, Failure> {
    check_flags(&request.header, agreed)?;
    let contexts = status_payload(&mut request, agreed)?;
    let header = request.header;
    check_range(&header, agreed)?;
    let RequestHeader { flags, offset, len, .. } = header;
    let fua = flags.contains(CommandFlags::FUA);
    Ok(match header.command {
        Command::READ => Action::Read {
            offset,
            len: len as usize,
            dont_fragment: flags.contains(CommandFlags::DF),
        },
        Command::WRITE => Action::Write { offset, data: request.payload, fua },
        Command::FLUSH => Action::Flush,
        Command::TRIM => Action::Trim { offset, len, fua },
        Command::CACHE => Action::Cache { offset, len },
        Command::WRITE_ZEROES => Action::WriteZeroes {
            offset,
            len,
            fua,
            may_unmap: !flags.contains(CommandFlags::NO_HOLE),
            fast: flags.contains(CommandFlags::FAST_ZERO),
        },
        Command::BLOCK_STATUS => {
            let one = flags.contains(CommandFlags::REQ_ONE);
            Action::BlockStatus { offset, len, one, contexts }
        }
        Command::RESIZE if agreed.export.resizable => Action::Resize { size: offset, fua },
        _ => return invalid("unknown command"),
    })
}

fn invalid<T>(message: &str) -> Result<T, Failure> {
    Err(Failure::new(Errno::EINVAL, message))
}

fn check_flags(header: &RequestHeader, agreed: &Agreed) -> Result<(), Failure> {
    let extended = agreed.mode.is_extended();
    let extra = match header.command {
        Command::READ if agreed.mode.is_structured() => CommandFlags::DF,
        Command::WRITE if extended => CommandFlags::PAYLOAD_LEN,
        Command::WRITE_ZEROES => CommandFlags::NO_HOLE.with(CommandFlags::FAST_ZERO),
        Command::BLOCK_STATUS => CommandFlags::REQ_ONE
            .with_if(extended && !agreed.contexts.is_empty(), CommandFlags::PAYLOAD_LEN),
        _ => CommandFlags::NONE,
    };
    if header.flags.without(CommandFlags::FUA.with(extra)).is_empty() {
        Ok(())
    } else {
        invalid("a flag that this command does not have")
    }
}

/// Takes in the payload of a block status: the length of the range, and which contexts it asks
/// for.
fn status_payload(request: &mut Request, agreed: &Agreed) -> Result<Option<Vec<u32>>, Failure> {
    let Request { header, payload } = request;
    if header.command != Command::BLOCK_STATUS || !header.flags.contains(CommandFlags::PAYLOAD_LEN)
    {
        return Ok(None);
    }
    let mut reader = Reader::new(payload);
    let Some(len) = reader.u64() else { return invalid("no length in the payload") };
    header.len = len;
    let mut ids = Vec::new();
    while let Some(id) = reader.u32() {
        let is_known = agreed.contexts.iter().any(|context| context.id == id);
        if !is_known || ids.contains(&id) {
            return invalid("a meta context that is not selected, or asked for twice");
        }
        ids.push(id);
    }
    if ids.is_empty() || !reader.is_empty() {
        return invalid("no list of meta contexts in the payload");
    }
    Ok(Some(ids))
}

fn check_range(header: &RequestHeader, agreed: &Agreed) -> Result<(), Failure> {
    let export = &agreed.export;
    let changes = matches!(
        header.command,
        Command::WRITE | Command::TRIM | Command::WRITE_ZEROES | Command::RESIZE
    );
    if changes && export.read_only {
        return Err(Failure::new(Errno::EPERM, "the export is read-only"));
    }
    let is_long = header.len > u64::from(PAYLOAD_LEN_MAX);
    match header.command {
        Command::FLUSH if header.offset != 0 || header.len != 0 => {
            return invalid("a flush has no range");
        }
        Command::FLUSH | Command::RESIZE => return Ok(()),
        Command::READ if is_long => return invalid("longer than 32 MiB"),
        Command::CACHE if is_long && !agreed.mode.is_extended() => {
            return invalid("longer than 32 MiB");
        }
        Command::BLOCK_STATUS if agreed.contexts.is_empty() => {
            return invalid("no meta context is selected for this export");
        }
        Command::BLOCK_STATUS if header.len == 0 => return invalid("an empty range has no status"),
        _ => {}
    }
    // By subtraction, so that no sum can overflow.
    if header.offset > export.size || header.len > export.size - header.offset {
        let errno = match header.command {
            Command::WRITE | Command::WRITE_ZEROES => Errno::ENOSPC,
            // It may have been inside when it was sent.
            _ if export.resizable => Errno::ENOSPC,
            _ => Errno::EINVAL,
        };
        return Err(Failure::new(errno, "beyond the end of the export"));
    }
    let block_size = u64::from(export.block_size.max(1));
    let end = header.offset + header.len;
    let aligned = header.offset.is_multiple_of(block_size)
        && (end.is_multiple_of(block_size) || end == export.size);
    if agreed.block_size_agreed && !aligned {
        return invalid("not aligned to the block size of the export");
    }
    Ok(())
}
