//! The data of options, parsed once and completely.

use std::fmt;

use crate::proto::wire::{InfoType, OptionCode, OptionHeader, Reader, ReplyType, STRING_LEN_MAX};

/// Longest option data that is kept in memory, in bytes: a `GO` that carries the longest name and
/// as many information requests as can be counted. What is longer is consumed and refused.
pub const OPTION_DATA_LEN_MAX: u32 = 4 + 4096 + 2 + 2 * 65_535;

/// Why an option is refused: a code for programs, a text for people.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} ({code})")]
pub struct OptionError {
    /// The class of the refusal.
    pub code: OptionErrorCode,
    /// The reason in words; sent to the client.
    pub message: String,
}

impl OptionError {
    /// A refusal.
    pub fn new(code: OptionErrorCode, message: impl Into<String>) -> Self {
        OptionError { code, message: message.into() }
    }

    /// There is no such export, or it cannot be used now.
    pub fn unknown_export(name: &str) -> Self {
        Self::new(OptionErrorCode::Unknown, format!("there is no export \"{name}\""))
    }

    pub(super) fn invalid(message: &str) -> Self {
        Self::new(OptionErrorCode::Invalid, message)
    }
}

/// The classes of refusals (§2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum OptionErrorCode {
    /// Not known, or not in this phase.
    Unsup,
    /// Forbidden by configuration.
    Policy,
    /// Malformed.
    Invalid,
    /// Not possible here.
    Platform,
    /// Only with TLS.
    TlsRequired,
    /// No such export, or it is not available.
    Unknown,
    /// The server goes away.
    Shutdown,
    /// Only for clients that asked for the block size.
    BlockSizeRequired,
    /// Too much asked for.
    TooBig,
    /// Only with extended headers.
    ExtendedHeadersRequired,
}

impl OptionErrorCode {
    /// As sent.
    #[must_use]
    pub fn reply_type(self) -> ReplyType {
        match self {
            OptionErrorCode::Unsup => ReplyType::ERR_UNSUP,
            OptionErrorCode::Policy => ReplyType::ERR_POLICY,
            OptionErrorCode::Invalid => ReplyType::ERR_INVALID,
            OptionErrorCode::Platform => ReplyType::ERR_PLATFORM,
            OptionErrorCode::TlsRequired => ReplyType::ERR_TLS_REQD,
            OptionErrorCode::Unknown => ReplyType::ERR_UNKNOWN,
            OptionErrorCode::Shutdown => ReplyType::ERR_SHUTDOWN,
            OptionErrorCode::BlockSizeRequired => ReplyType::ERR_BLOCK_SIZE_REQD,
            OptionErrorCode::TooBig => ReplyType::ERR_TOO_BIG,
            OptionErrorCode::ExtendedHeadersRequired => ReplyType::ERR_EXT_HEADER_REQD,
        }
    }
}

impl fmt::Display for OptionErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.reply_type(), f)
    }
}

/// Which pieces of information an `INFO` or `GO` asked for. Unknown ones are ignored, repeated
/// ones count once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct InfoRequests {
    pub(super) name: bool,
    pub(super) description: bool,
    pub(super) block_size: bool,
}

/// `INFO` or `GO`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct InfoOption {
    pub(super) export: String,
    pub(super) requests: InfoRequests,
}

/// A string as the protocol allows it: UTF-8 without NUL, at most 4096 bytes.
pub(super) fn string(bytes: &[u8]) -> Result<String, OptionError> {
    if bytes.len() > STRING_LEN_MAX {
        return Err(OptionError::invalid("the export name is longer than 4096 bytes"));
    }
    if bytes.contains(&0) {
        return Err(OptionError::invalid("the export name contains a NUL"));
    }
    match std::str::from_utf8(bytes) {
        Ok(name) => Ok(name.to_owned()),
        Err(_) => Err(OptionError::invalid("the export name is not UTF-8")),
    }
}

pub(super) fn inconsistent() -> OptionError {
    OptionError::invalid("the lengths inside the option do not match its length")
}

/// Parses the data of `INFO` and `GO`.
pub(super) fn parse_info(data: &[u8]) -> Result<InfoOption, OptionError> {
    let mut reader = Reader::new(data);
    let name = reader.bytes_u32().ok_or_else(inconsistent)?;
    let count = reader.u16().ok_or_else(inconsistent)?;
    let mut requests = InfoRequests::default();
    for _ in 0..count {
        match InfoType(reader.u16().ok_or_else(inconsistent)?) {
            InfoType::NAME => requests.name = true,
            InfoType::DESCRIPTION => requests.description = true,
            InfoType::BLOCK_SIZE => requests.block_size = true,
            _ => {}
        }
    }
    if !reader.is_empty() {
        return Err(inconsistent());
    }
    Ok(InfoOption { export: string(name)?, requests })
}

/// Options whose data need not be looked at, because they are refused in any case; `ABORT` is
/// among them for its data only.
pub(super) fn refused_unread(header: OptionHeader) -> Option<OptionError> {
    let known = header.option.is_private()
        || matches!(
            header.option,
            OptionCode::EXPORT_NAME
                | OptionCode::ABORT
                | OptionCode::LIST
                | OptionCode::STARTTLS
                | OptionCode::INFO
                | OptionCode::GO
                | OptionCode::STRUCTURED_REPLY
                | OptionCode::LIST_META_CONTEXT
                | OptionCode::SET_META_CONTEXT
                | OptionCode::EXTENDED_HEADERS
        );
    if !known {
        return Some(unsupported("unknown option"));
    }
    (header.len > OPTION_DATA_LEN_MAX).then(|| match header.option {
        OptionCode::LIST
        | OptionCode::STARTTLS
        | OptionCode::STRUCTURED_REPLY
        | OptionCode::EXTENDED_HEADERS => OptionError::invalid("this option has no data"),
        _ => OptionError::new(OptionErrorCode::TooBig, "the option is too long"),
    })
}

pub(super) fn unsupported(message: &str) -> OptionError {
    OptionError::new(OptionErrorCode::Unsup, message)
}

pub(super) fn without_data(data: &[u8]) -> Result<(), OptionError> {
    if data.is_empty() { Ok(()) } else { Err(OptionError::invalid("this option has no data")) }
}
