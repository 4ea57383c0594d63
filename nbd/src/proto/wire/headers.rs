//! The fixed parts of messages.

use super::{
    ChunkFlags, ChunkType, Command, CommandFlags, EXTENDED_REPLY_MAGIC, EXTENDED_REQUEST_MAGIC,
    Errno, OPTION_MAGIC, OPTION_REPLY_MAGIC, OptionCode, REQUEST_MAGIC, Reader, ReplyType,
    SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};

/// The magic number of a header is not the expected one: the peers are out of step, or the peer
/// speaks something else. Holds what came instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("wrong magic number {0:#x}")]
pub struct BadMagic(pub u64);

/// Lays values out one after the other; the caller's sizes add up to `N`.
struct Layout<const N: usize> {
    bytes: [u8; N],
    len: usize,
}

impl<const N: usize> Layout<N> {
    const fn new() -> Self {
        Layout { bytes: [0; N], len: 0 }
    }

    fn put<const M: usize>(mut self, value: [u8; M]) -> Self {
        self.bytes[self.len..self.len + M].copy_from_slice(&value);
        self.len += M;
        self
    }

    fn end(self) -> [u8; N] {
        debug_assert_eq!(self.len, N);
        self.bytes
    }
}

/// Start of an option request; `len` bytes of data follow (§2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// What is asked for.
    pub option: OptionCode,
    /// Length of the data, in bytes.
    pub len: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 16;

    /// As sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        Layout::new()
            .put(OPTION_MAGIC.to_be_bytes())
            .put(self.option.0.to_be_bytes())
            .put(self.len.to_be_bytes())
            .end()
    }

    /// As received.
    ///
    /// # Errors
    /// If this is no option request.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u64().unwrap_or_default();
        if magic != OPTION_MAGIC {
            return Err(BadMagic(magic));
        }
        Ok(OptionHeader {
            option: OptionCode(reader.u32().unwrap_or_default()),
            len: reader.u32().unwrap_or_default(),
        })
    }
}

/// Start of a reply to an option; `len` bytes of data follow (§2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is answered.
    pub option: OptionCode,
    /// What kind of answer.
    pub kind: ReplyType,
    /// Length of the data, in bytes.
    pub len: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 20;

    /// As sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        Layout::new()
            .put(OPTION_REPLY_MAGIC.to_be_bytes())
            .put(self.option.0.to_be_bytes())
            .put(self.kind.0.to_be_bytes())
            .put(self.len.to_be_bytes())
            .end()
    }

    /// As received.
    ///
    /// # Errors
    /// If this is no reply to an option.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u64().unwrap_or_default();
        if magic != OPTION_REPLY_MAGIC {
            return Err(BadMagic(magic));
        }
        Ok(OptionReplyHeader {
            option: OptionCode(reader.u32().unwrap_or_default()),
            kind: ReplyType(reader.u32().unwrap_or_default()),
            len: reader.u32().unwrap_or_default(),
        })
    }
}

/// A request (§4).
///
/// A compact one is followed by a payload of `len` bytes if it is a `WRITE`; an extended one if it
/// has the flag [`PAYLOAD_LEN`](CommandFlags::PAYLOAD_LEN), which every `WRITE` should have, and
/// otherwise `len` is what it applies to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestHeader {
    /// Modifiers.
    pub flags: CommandFlags,
    /// What is asked for.
    pub command: Command,
    /// Echoed in the reply; opaque to the server.
    pub cookie: u64,
    /// First byte of the range, in bytes.
    pub offset: u64,
    /// Length of the range, in bytes; below 4 GiB in a compact request.
    pub len: u64,
}

impl RequestHeader {
    /// Bytes on the wire of a compact request.
    pub const SIZE: usize = 28;
    /// Bytes on the wire of an extended request.
    pub const EXTENDED_SIZE: usize = 32;

    /// As sent in a compact request.
    ///
    /// # Panics
    /// If the length does not fit.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        let len = u32::try_from(self.len).expect("a compact request is shorter than 4 GiB");
        Layout::new()
            .put(REQUEST_MAGIC.to_be_bytes())
            .put(self.flags.0.to_be_bytes())
            .put(self.command.0.to_be_bytes())
            .put(self.cookie.to_be_bytes())
            .put(self.offset.to_be_bytes())
            .put(len.to_be_bytes())
            .end()
    }

    /// As sent in an extended request.
    #[must_use]
    pub fn encode_extended(self) -> [u8; Self::EXTENDED_SIZE] {
        Layout::new()
            .put(EXTENDED_REQUEST_MAGIC.to_be_bytes())
            .put(self.flags.0.to_be_bytes())
            .put(self.command.0.to_be_bytes())
            .put(self.cookie.to_be_bytes())
            .put(self.offset.to_be_bytes())
            .put(self.len.to_be_bytes())
            .end()
    }

    /// As received in a compact request.
    ///
    /// # Errors
    /// If this is no compact request.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        let mut reader = magic(bytes, REQUEST_MAGIC)?;
        let header = Self::decode_head(&mut reader);
        Ok(RequestHeader { len: reader.u32().unwrap_or_default().into(), ..header })
    }

    /// As received in an extended request.
    ///
    /// # Errors
    /// If this is no extended request.
    pub fn decode_extended(bytes: &[u8; Self::EXTENDED_SIZE]) -> Result<Self, BadMagic> {
        let mut reader = magic(bytes, EXTENDED_REQUEST_MAGIC)?;
        let header = Self::decode_head(&mut reader);
        Ok(RequestHeader { len: reader.u64().unwrap_or_default(), ..header })
    }

    /// What both kinds have between the magic number and the length.
    fn decode_head(reader: &mut Reader<'_>) -> Self {
        RequestHeader {
            flags: CommandFlags(reader.u16().unwrap_or_default()),
            command: Command(reader.u16().unwrap_or_default()),
            cookie: reader.u64().unwrap_or_default(),
            offset: reader.u64().unwrap_or_default(),
            len: 0,
        }
    }
}

/// The rest of a header that begins with the right magic number.
fn magic(bytes: &[u8], expected: u32) -> Result<Reader<'_>, BadMagic> {
    let mut reader = Reader::new(bytes);
    match reader.u32().unwrap_or_default() {
        magic if magic == expected => Ok(reader),
        magic => Err(BadMagic(magic.into())),
    }
}

/// A simple reply; data follow only after a successful `READ` (§5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SimpleReply {
    /// 0 for success.
    pub error: Errno,
    /// That of the request.
    pub cookie: u64,
}

impl SimpleReply {
    /// Bytes on the wire.
    pub const SIZE: usize = 16;

    /// As sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        Layout::new()
            .put(SIMPLE_REPLY_MAGIC.to_be_bytes())
            .put(self.error.0.to_be_bytes())
            .put(self.cookie.to_be_bytes())
            .end()
    }

    /// As received.
    ///
    /// # Errors
    /// If this is no simple reply.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        let mut reader = magic(bytes, SIMPLE_REPLY_MAGIC)?;
        Ok(SimpleReply {
            error: Errno(reader.u32().unwrap_or_default()),
            cookie: reader.u64().unwrap_or_default(),
        })
    }
}

/// Start of a structured reply chunk; `len` bytes of payload follow (§5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkHeader {
    /// Modifiers.
    pub flags: ChunkFlags,
    /// What the payload is.
    pub kind: ChunkType,
    /// That of the request.
    pub cookie: u64,
    /// Length of the payload, in bytes.
    pub len: u32,
}

impl ChunkHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 20;

    /// As sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        Layout::new()
            .put(STRUCTURED_REPLY_MAGIC.to_be_bytes())
            .put(self.flags.0.to_be_bytes())
            .put(self.kind.0.to_be_bytes())
            .put(self.cookie.to_be_bytes())
            .put(self.len.to_be_bytes())
            .end()
    }

    /// As received.
    ///
    /// # Errors
    /// If this is no structured reply chunk.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        let mut reader = magic(bytes, STRUCTURED_REPLY_MAGIC)?;
        Ok(ChunkHeader {
            flags: ChunkFlags(reader.u16().unwrap_or_default()),
            kind: ChunkType(reader.u16().unwrap_or_default()),
            cookie: reader.u64().unwrap_or_default(),
            len: reader.u32().unwrap_or_default(),
        })
    }
}

/// Start of an extended reply chunk; `len` bytes of payload follow (§5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedChunkHeader {
    /// Modifiers.
    pub flags: ChunkFlags,
    /// What the payload is.
    pub kind: ChunkType,
    /// That of the request.
    pub cookie: u64,
    /// That of the request, in bytes.
    pub offset: u64,
    /// Length of the payload, in bytes.
    pub len: u64,
}

impl ExtendedChunkHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 32;

    /// As sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        Layout::new()
            .put(EXTENDED_REPLY_MAGIC.to_be_bytes())
            .put(self.flags.0.to_be_bytes())
            .put(self.kind.0.to_be_bytes())
            .put(self.cookie.to_be_bytes())
            .put(self.offset.to_be_bytes())
            .put(self.len.to_be_bytes())
            .end()
    }

    /// As received.
    ///
    /// # Errors
    /// If this is no extended reply chunk.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        let mut reader = magic(bytes, EXTENDED_REPLY_MAGIC)?;
        Ok(ExtendedChunkHeader {
            flags: ChunkFlags(reader.u16().unwrap_or_default()),
            kind: ChunkType(reader.u16().unwrap_or_default()),
            cookie: reader.u64().unwrap_or_default(),
            offset: reader.u64().unwrap_or_default(),
            len: reader.u64().unwrap_or_default(),
        })
    }
}
