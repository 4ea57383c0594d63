use bytes::{Buf, Bytes, BytesMut};

use super::BlockSizes;
use crate::proto::wire::{OptionCode, OptionReplyHeader, ReplyType};

/// Longest reply to an option that is taken in, in bytes. The protocol's strings end at 4096; a
/// private reply may need more.
pub(super) const REPLY_LEN_MAX: u32 = 1 << 20;

/// How much of a server's error text is kept, in bytes.
const MESSAGE_LEN_MAX: usize = 1024;

/// Why a handshake came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
#[allow(missing_docs)]
pub enum HandshakeError {
    #[error("this is no NBD server (it began with {0:#018x})")]
    NotNbd(u64),
    #[error("the server speaks only the obsolete oldstyle handshake")]
    Oldstyle,
    #[error("the server is too old to be asked for {0} (no fixed newstyle handshake)")]
    NotFixedNewstyle(OptionCode),
    #[error("the server demands TLS (asked for {0})")]
    TlsRequired(OptionCode),
    #[error("the server has no TLS, and nothing else is wanted of it ({reply}{}{message})", if message.is_empty() { "" } else { ": " })]
    TlsRefused { reply: ReplyType, message: String },
    #[error("protocol violation: something came in the clear after TLS was agreed on")]
    ClearText,
    /// The server does not know the option.
    #[error("the server does not support the option {0}")]
    Unsupported(OptionCode),
    #[error("the server refused {option} with {reply}{}{message}", if message.is_empty() { "" } else { ": " })]
    Refused { option: OptionCode, reply: ReplyType, message: String },
    #[error("the server has no export {0:?}")]
    NotListed(String),
    #[error("export name of {0} bytes: too long")]
    ExportNameTooLong(usize),
    #[error("protocol violation: wrong magic number {0:#x} in an option reply")]
    BadMagic(u64),
    #[error("protocol violation: reply to {got} while {expected} was asked")]
    WrongOption { expected: OptionCode, got: OptionCode },
    #[error("protocol violation: {reply} is no reply to {option}")]
    UnexpectedReply { option: OptionCode, reply: ReplyType },
    #[error("protocol violation: reply of {len} bytes to {option}")]
    ReplyTooLong { option: OptionCode, len: u32 },
    #[error("protocol violation: malformed {0}")]
    Malformed(&'static str),
    #[error("protocol violation: more replies to {0} than anybody can want")]
    TooManyReplies(OptionCode),
    #[error("protocol violation: the server did not say size and flags of the export")]
    NoExportInfo,
    #[error("protocol violation: transmission flags {0:#06x} without HAS_FLAGS")]
    NoFlags(u16),
    #[error(
        "protocol violation: impossible block sizes: minimum {}, preferred {}, maximum {}",
        .0.min, .0.preferred, .0.max
    )]
    BlockSizes(BlockSizes),
    #[error("protocol violation: a size of {0} bytes: no offset reaches its end")]
    SizeTooLarge(u64),
    #[error("protocol violation: the size {size} is not a multiple of the minimum block {min}")]
    SizeNotMultiple { size: u64, min: u32 },
}

impl HandshakeError {
    /// The server broke the protocol: trying again is of no use.
    #[must_use]
    pub fn is_violation(&self) -> bool {
        use HandshakeError as E;
        match self {
            E::NotFixedNewstyle(_)
            | E::TlsRequired(_)
            | E::TlsRefused { .. }
            | E::Unsupported(_)
            | E::Refused { .. }
            | E::NotListed(_)
            | E::ExportNameTooLong(_) => false,
            E::NotNbd(_)
            | E::Oldstyle
            | E::ClearText
            | E::BadMagic(_)
            | E::WrongOption { .. }
            | E::UnexpectedReply { .. }
            | E::ReplyTooLong { .. }
            | E::Malformed(_)
            | E::TooManyReplies(_)
            | E::NoExportInfo
            | E::NoFlags(_)
            | E::BlockSizes(_)
            | E::SizeTooLarge(_)
            | E::SizeNotMultiple { .. } => true,
        }
    }
}

/// A whole reply to an option.
#[derive(Debug)]
pub(super) struct OptionReply {
    pub(super) kind: ReplyType,
    pub(super) data: Bytes,
}

/// Takes one reply to `option` off the front of `input`; `None` if it is not all there yet.
pub(super) fn take(
    input: &mut BytesMut,
    option: OptionCode,
) -> Result<Option<OptionReply>, HandshakeError> {
    let Some(head) = input.first_chunk() else { return Ok(None) };
    let header = OptionReplyHeader::decode(head).map_err(|e| HandshakeError::BadMagic(e.0))?;
    if header.option != option {
        return Err(HandshakeError::WrongOption { expected: option, got: header.option });
    }
    if header.len > REPLY_LEN_MAX {
        return Err(HandshakeError::ReplyTooLong { option, len: header.len });
    }
    let len = header.len as usize;
    if input.len() - OptionReplyHeader::SIZE < len {
        return Ok(None);
    }
    input.advance(OptionReplyHeader::SIZE);
    Ok(Some(OptionReply { kind: header.kind, data: input.split_to(len).freeze() }))
}

impl OptionReply {
    /// The error that an error reply stands for.
    pub(super) fn refusal(&self, option: OptionCode) -> HandshakeError {
        match self.kind {
            ReplyType::ERR_UNSUP => HandshakeError::Unsupported(option),
            ReplyType::ERR_TLS_REQD => HandshakeError::TlsRequired(option),
            reply => HandshakeError::Refused { option, reply, message: message(&self.data) },
        }
    }

    /// The error that an error reply to `STARTTLS` stands for.
    pub(super) fn tls_refused(&self) -> HandshakeError {
        HandshakeError::TlsRefused { reply: self.kind, message: message(&self.data) }
    }

    pub(super) fn unexpected(&self, option: OptionCode) -> HandshakeError {
        HandshakeError::UnexpectedReply { option, reply: self.kind }
    }

    /// An `ACK` has no data.
    pub(super) fn check_empty(&self) -> Result<(), HandshakeError> {
        if self.data.is_empty() { Ok(()) } else { Err(HandshakeError::Malformed("ACK")) }
    }
}

/// A server's text, made fit for a line in a log.
pub(super) fn message(bytes: &[u8]) -> String {
    let kept = &bytes[..bytes.len().min(MESSAGE_LEN_MAX)];
    String::from_utf8_lossy(kept).replace(|c: char| c.is_control(), " ").trim().to_owned()
}
