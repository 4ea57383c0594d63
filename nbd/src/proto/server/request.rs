//! Requests: taken out of the input one by one, and checked against the export (§4, §6, §11).

use bytes::{Buf, Bytes, BytesMut};

use super::handshake::Agreed;
use super::reply::Failure;
use crate::proto::wire::{BadMagic, Command, CommandFlags, Errno, PAYLOAD_LEN_MAX, RequestHeader};

/// Takes requests out of a stream of bytes.
///
/// In two steps, so that a driver can decide whether it has room for a request before it makes
/// room for the payload: [`header`](Self::header), then [`request`](Self::request).
#[derive(Debug, Default)]
pub struct Decoder {
    header: Option<RequestHeader>,
}

/// A request as it was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    /// Its fixed part.
    pub header: RequestHeader,
    /// The data to be written; empty for all commands but `WRITE`. A part of the input's memory.
    pub payload: Bytes,
}

impl Decoder {
    /// At the start of a request.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The fixed part of the next request, as soon as it is there; the same one until
    /// [`request`](Self::request) has returned it.
    ///
    /// # Errors
    /// If this is no request: the connection has to be dropped.
    pub fn header(&mut self, input: &mut BytesMut) -> Result<Option<RequestHeader>, BadMagic> {
        if self.header.is_none()
            && let Some(bytes) = input.first_chunk()
        {
            let header = RequestHeader::decode(bytes)?;
            input.advance(RequestHeader::SIZE);
            self.header = Some(header);
        }
        Ok(self.header)
    }

    /// The request whose header has been seen, as soon as its payload is there.
    pub fn request(&mut self, input: &mut BytesMut) -> Option<Request> {
        let header = self.header?;
        let len = payload_len(&header);
        if input.len() < len {
            return None;
        }
        self.header = None;
        let payload = if len == 0 { Bytes::new() } else { input.split_to(len).freeze() };
        Some(Request { header, payload })
    }

    /// How many bytes are missing until the next step can be taken.
    #[must_use]
    pub fn missing(&self, input: &BytesMut) -> usize {
        let need = match &self.header {
            None => RequestHeader::SIZE,
            Some(header) => payload_len(header),
        };
        need.saturating_sub(input.len())
    }

    /// Nothing of a request has been received yet: this is where a peer may close.
    #[must_use]
    pub fn is_between_requests(&self, input: &BytesMut) -> bool {
        self.header.is_none() && input.is_empty()
    }
}

fn payload_len(header: &RequestHeader) -> usize {
    if header.command == Command::WRITE { header.len as usize } else { 0 }
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
    BlockStatus {
        offset: u64,
        len: u64,
        /// Only the first extent is wanted.
        one: bool,
    },
}

/// Says what a request means on an export, or why it is refused. `DISC` has no reply and is no
/// action: the driver handles it before.
///
/// # Errors
/// As the protocol asks for: `EPERM` for changes to a read-only export, `ENOSPC` for writes beyond
/// the end, `EINVAL` for everything else. The connection survives.
pub fn check(request: Request, agreed: &Agreed) -> Result<Action, Failure> {
    let header = request.header;
    check_flags(&header, agreed)?;
    check_range(&header, agreed)?;
    let RequestHeader { flags, offset, .. } = header;
    let len = u64::from(header.len);
    let fua = flags.contains(CommandFlags::FUA);
    Ok(match header.command {
        Command::READ => Action::Read {
            offset,
            len: header.len as usize,
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
            Action::BlockStatus { offset, len, one: flags.contains(CommandFlags::REQ_ONE) }
        }
        _ => return Err(Failure::new(Errno::EINVAL, "unknown command")),
    })
}

fn check_flags(header: &RequestHeader, agreed: &Agreed) -> Result<(), Failure> {
    let extra = match header.command {
        Command::READ if agreed.structured => CommandFlags::DF,
        Command::WRITE_ZEROES => CommandFlags::NO_HOLE.with(CommandFlags::FAST_ZERO),
        Command::BLOCK_STATUS => CommandFlags::REQ_ONE,
        _ => CommandFlags::NONE,
    };
    if header.flags.without(CommandFlags::FUA.with(extra)).is_empty() {
        Ok(())
    } else {
        Err(Failure::new(Errno::EINVAL, "a flag that this command does not have"))
    }
}

fn check_range(header: &RequestHeader, agreed: &Agreed) -> Result<(), Failure> {
    let export = &agreed.export;
    let invalid = |message| Err(Failure::new(Errno::EINVAL, message));
    let changes = matches!(header.command, Command::WRITE | Command::TRIM | Command::WRITE_ZEROES);
    if changes && export.read_only {
        return Err(Failure::new(Errno::EPERM, "the export is read-only"));
    }
    match header.command {
        Command::FLUSH if header.offset != 0 || header.len != 0 => {
            return invalid("a flush has no range");
        }
        Command::FLUSH => return Ok(()),
        Command::READ | Command::CACHE if header.len > PAYLOAD_LEN_MAX => {
            return invalid("longer than 32 MiB");
        }
        Command::BLOCK_STATUS if agreed.base_allocation_id.is_none() => {
            return invalid("no meta context is selected for this export");
        }
        Command::BLOCK_STATUS if header.len == 0 => return invalid("an empty range has no status"),
        _ => {}
    }
    // By subtraction, so that no sum can overflow.
    let len = u64::from(header.len);
    if header.offset > export.size || len > export.size - header.offset {
        let errno = match header.command {
            Command::WRITE | Command::WRITE_ZEROES => Errno::ENOSPC,
            _ => Errno::EINVAL,
        };
        return Err(Failure::new(errno, "beyond the end of the export"));
    }
    let block_size = u64::from(export.block_size.max(1));
    let end = header.offset + len;
    let aligned = header.offset.is_multiple_of(block_size)
        && (end.is_multiple_of(block_size) || end == export.size);
    if agreed.block_size_agreed && !aligned {
        return invalid("not aligned to the block size of the export");
    }
    Ok(())
}
