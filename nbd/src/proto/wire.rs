//! What the two sides send each other, byte by byte: constants, and headers with their codecs.
//!
//! Everything is big-endian. Codes that a peer may extend (options, reply types, commands, ...)
//! are newtypes with associated constants, so that an unknown value is representable, printable
//! and can be echoed. The section numbers are those of the protocol facts that the names follow:
//! handshake, transmission flags, requests, replies, errors, meta contexts, sizes.

use std::fmt;

/// Start of every handshake ("NBDMAGIC").
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// Start of every option, and second word of a newstyle greeting ("IHAVEOPT").
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Second word of an oldstyle greeting; a client recognises it only to say so.
pub const OLDSTYLE_MAGIC: u64 = 0x0000_4202_8186_1253;
/// Start of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Start of every compact request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Start of every simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Start of every structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// Start of every extended request.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// Start of every extended reply chunk.
pub const EXTENDED_REPLY_MAGIC: u32 = 0x6e8a_278c;

/// The port that is meant where a TCP address names none.
pub const DEFAULT_PORT: u16 = 10809;
/// Longest export name, description, context name or message, in bytes.
pub const STRING_LEN_MAX: usize = 4096;
/// Longest payload of a request or reply if nothing else is agreed, in bytes.
pub const PAYLOAD_LEN_MAX: u32 = 32 << 20;
/// Longest option that is consumed and answered, in bytes; beyond it the connection is dropped.
pub const OPTION_LEN_MAX: u32 = 32 << 20;
/// Zero bytes that follow the answer to `EXPORT_NAME` unless both sides set `NO_ZEROES`.
pub const EXPORT_NAME_PADDING: usize = 124;
/// Most extents in one block status chunk that peers have to cope with.
pub const EXTENTS_MAX: usize = 1 << 20;
/// A read with `DF` of this many bytes always has to be supported.
pub const DF_LEN_MIN: u32 = 65_536;

/// First option number of the private range ("bre\0"): it and the 255 above it are not NBD's.
pub const PRIVATE_OPTION_BASE: u32 = 0x6272_6500;
/// Last option number of the private range.
pub const PRIVATE_OPTION_LAST: u32 = PRIVATE_OPTION_BASE + 0xff;
/// Reply type that carries the data of the answer to a private option; an `ACK` follows it.
pub const PRIVATE_REPLY: ReplyType = ReplyType(0x6272_6500);

/// An open set of codes: a newtype, its known values, and a `Debug` that names them.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$vdoc:meta])* $value:ident = $number:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$vdoc])* pub const $value: Self = Self($number);)*

            /// The protocol's name of the code, if it is a known one.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$value => Some(stringify!($value)),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

/// A set of bits: a newtype, its known bits, and the operations on sets that are needed.
macro_rules! bits {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$vdoc:meta])* $value:ident = $number:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$vdoc])* pub const $value: Self = Self($number);)*
            /// No bit set.
            pub const NONE: Self = Self(0);

            /// Every bit of `other` is set.
            #[must_use]
            pub const fn contains(self, other: Self) -> bool {
                self.0 & other.0 == other.0
            }

            /// The bits of either.
            #[must_use]
            pub const fn with(self, other: Self) -> Self {
                Self(self.0 | other.0)
            }

            /// The bits of `other` if `condition` holds, too.
            #[must_use]
            pub const fn with_if(self, condition: bool, other: Self) -> Self {
                if condition { self.with(other) } else { self }
            }

            /// The bits that are not in `other`.
            #[must_use]
            pub const fn without(self, other: Self) -> Self {
                Self(self.0 & !other.0)
            }

            /// No bit is set.
            #[must_use]
            pub const fn is_empty(self) -> bool {
                self.0 == 0
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut rest = *self;
                let mut separator = "";
                f.write_str("{")?;
                $(if rest.contains(Self::$value) {
                    write!(f, "{separator}{}", stringify!($value))?;
                    rest = rest.without(Self::$value);
                    separator = " ";
                })*
                if !rest.is_empty() {
                    write!(f, "{separator}{:#x}", rest.0)?;
                }
                f.write_str("}")
            }
        }
    };
}

bits! {
    /// What the server offers in its greeting (§2).
    HandshakeFlags(u16) {
        /// Options can be refused without ending the connection.
        FIXED_NEWSTYLE = 1 << 0;
        /// The padding after `EXPORT_NAME` can be left out.
        NO_ZEROES = 1 << 1;
    }
}

bits! {
    /// What the client accepts of the greeting (§2).
    ClientFlags(u32) {
        /// Options can be refused without ending the connection.
        FIXED_NEWSTYLE = 1 << 0;
        /// The padding after `EXPORT_NAME` is left out.
        NO_ZEROES = 1 << 1;
    }
}

bits! {
    /// What an export can do (§3).
    TransmissionFlags(u16) {
        /// Always set.
        HAS_FLAGS = 1 << 0;
        /// No command that changes content is accepted.
        READ_ONLY = 1 << 1;
        /// `FLUSH` is there.
        SEND_FLUSH = 1 << 2;
        /// The `FUA` flag is there.
        SEND_FUA = 1 << 3;
        /// A disk that turns.
        ROTATIONAL = 1 << 4;
        /// `TRIM` is there.
        SEND_TRIM = 1 << 5;
        /// `WRITE_ZEROES`, and its flag `NO_HOLE`, are there.
        SEND_WRITE_ZEROES = 1 << 6;
        /// The flag `DF` of reads is there.
        SEND_DF = 1 << 7;
        /// A flush on one connection covers writes completed on all.
        CAN_MULTI_CONN = 1 << 8;
        /// Experimental.
        SEND_RESIZE = 1 << 9;
        /// `CACHE` is there.
        SEND_CACHE = 1 << 10;
        /// The flag `FAST_ZERO` of `WRITE_ZEROES` is there.
        SEND_FAST_ZERO = 1 << 11;
        /// `BLOCK_STATUS` takes a payload (extended headers only).
        BLOCK_STATUS_PAYLOAD = 1 << 12;
    }
}

bits! {
    /// Modifiers of a command (§4).
    CommandFlags(u16) {
        /// Reply only when the data are on stable storage.
        FUA = 1 << 0;
        /// The area of a `WRITE_ZEROES` must be allocated.
        NO_HOLE = 1 << 1;
        /// At most one content chunk.
        DF = 1 << 2;
        /// Exactly one extent, not longer than the request.
        REQ_ONE = 1 << 3;
        /// Fail at once if zeroing is not faster than writing.
        FAST_ZERO = 1 << 4;
        /// The length is that of the payload (extended headers only).
        PAYLOAD_LEN = 1 << 5;
    }
}

bits! {
    /// Modifiers of a structured or extended reply chunk (§5).
    ChunkFlags(u16) {
        /// The last chunk of its reply.
        DONE = 1 << 0;
    }
}

bits! {
    /// The state of an extent in the context `base:allocation` (§7).
    AllocationFlags(u32) {
        /// Occupies no space.
        HOLE = 1 << 0;
        /// Reads as zeroes.
        ZERO = 1 << 1;
    }
}

codes! {
    /// Something a client asks for during the handshake (§2).
    OptionCode(u32) {
        /// Chooses an export without a way to refuse.
        EXPORT_NAME = 1;
        /// Ends the connection.
        ABORT = 2;
        /// Lists the exports.
        LIST = 3;
        /// Withdrawn.
        PEEK_EXPORT = 4;
        /// Starts TLS.
        STARTTLS = 5;
        /// Describes an export.
        INFO = 6;
        /// Describes an export and starts transmission.
        GO = 7;
        /// Switches to structured replies.
        STRUCTURED_REPLY = 8;
        /// Lists meta contexts.
        LIST_META_CONTEXT = 9;
        /// Chooses meta contexts.
        SET_META_CONTEXT = 10;
        /// Switches to extended headers.
        EXTENDED_HEADERS = 11;
    }
}

impl OptionCode {
    /// Lies in the range that [`PRIVATE_OPTION_BASE`] starts.
    #[must_use]
    pub fn is_private(self) -> bool {
        (PRIVATE_OPTION_BASE..=PRIVATE_OPTION_LAST).contains(&self.0)
    }
}

codes! {
    /// The kind of a reply to an option (§2).
    ReplyType(u32) {
        /// Done.
        ACK = 1;
        /// One export of a list.
        SERVER = 2;
        /// One piece of information on an export.
        INFO = 3;
        /// One meta context.
        META_CONTEXT = 4;
        /// The option is not known or not allowed in this phase.
        ERR_UNSUP = (1 << 31) + 1;
        /// Forbidden by configuration.
        ERR_POLICY = (1 << 31) + 2;
        /// Malformed.
        ERR_INVALID = (1 << 31) + 3;
        /// Not possible on this platform.
        ERR_PLATFORM = (1 << 31) + 4;
        /// Only with TLS.
        ERR_TLS_REQD = (1 << 31) + 5;
        /// No such export, or it is not available.
        ERR_UNKNOWN = (1 << 31) + 6;
        /// The server goes away.
        ERR_SHUTDOWN = (1 << 31) + 7;
        /// Only for clients that asked for the block size.
        ERR_BLOCK_SIZE_REQD = (1 << 31) + 8;
        /// Too much asked for.
        ERR_TOO_BIG = (1 << 31) + 9;
        /// Only with extended headers.
        ERR_EXT_HEADER_REQD = (1 << 31) + 10;
    }
}

impl ReplyType {
    /// An error; its data is a text.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 & (1 << 31) != 0
    }
}

codes! {
    /// A piece of information on an export (§2).
    InfoType(u16) {
        /// Size and transmission flags.
        EXPORT = 0;
        /// Canonical name.
        NAME = 1;
        /// Description for people.
        DESCRIPTION = 2;
        /// Minimum, preferred and maximum size of requests.
        BLOCK_SIZE = 3;
    }
}

codes! {
    /// What a request asks for (§4).
    Command(u16) {
        /// Reads a range.
        READ = 0;
        /// Writes the payload.
        WRITE = 1;
        /// Ends the session; has no reply.
        DISC = 2;
        /// Makes completed writes durable.
        FLUSH = 3;
        /// Content no longer needed.
        TRIM = 4;
        /// Content soon needed.
        CACHE = 5;
        /// Makes a range read as zeroes.
        WRITE_ZEROES = 6;
        /// Asks for the state of a range in every selected context.
        BLOCK_STATUS = 7;
        /// Experimental.
        RESIZE = 8;
    }
}

codes! {
    /// The kind of a structured or extended reply chunk (§5).
    ChunkType(u16) {
        /// Nothing but the end of the reply.
        NONE = 0;
        /// Offset and data.
        OFFSET_DATA = 1;
        /// Offset and size of a range of zeroes.
        OFFSET_HOLE = 2;
        /// Extents of one context.
        BLOCK_STATUS = 5;
        /// Extents of one context, 64 bits wide.
        BLOCK_STATUS_EXT = 6;
        /// Failure of the request.
        ERROR = (1 << 15) + 1;
        /// Failure at an offset.
        ERROR_OFFSET = (1 << 15) + 2;
    }
}

impl ChunkType {
    /// Of the error class, whether known or not.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 & (1 << 15) != 0
    }
}

codes! {
    /// An error number as it is sent (§6).
    Errno(u32) {
        /// No error.
        OK = 0;
        /// Not permitted: a write to a read-only export.
        EPERM = 1;
        /// Input or output failed.
        EIO = 5;
        /// Out of memory.
        ENOMEM = 12;
        /// Not acceptable. What a client does not know counts as this.
        EINVAL = 22;
        /// No space, or a write beyond the end.
        ENOSPC = 28;
        /// Too much asked for.
        EOVERFLOW = 75;
        /// A `FAST_ZERO` that would not be fast.
        ENOTSUP = 95;
        /// The server goes away.
        ESHUTDOWN = 108;
    }
}

/// The magic number of a header is not the expected one: the peers are out of step, or the peer
/// speaks something else. Holds what came instead.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("wrong magic number {0:#x}")]
pub struct BadMagic(pub u64);

/// Takes integers off the front of a slice; `None` as soon as there are too few bytes.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader(bytes)
    }

    /// The next `N` bytes.
    pub fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next two bytes as a number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next four bytes as a number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next eight bytes as a number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    /// A 32-bit length and that many bytes.
    pub fn bytes_u32(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(usize::try_from(len).ok()?)
    }

    /// All that is left.
    #[must_use]
    pub fn rest(self) -> &'a [u8] {
        self.0
    }

    /// Nothing is left.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0.is_empty()
    }
}

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

/// A compact request; only a `WRITE` is followed by a payload of `len` bytes (§4).
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
    /// Length of the range, in bytes.
    pub len: u32,
}

impl RequestHeader {
    /// Bytes on the wire.
    pub const SIZE: usize = 28;

    /// As sent.
    #[must_use]
    pub fn encode(self) -> [u8; Self::SIZE] {
        Layout::new()
            .put(REQUEST_MAGIC.to_be_bytes())
            .put(self.flags.0.to_be_bytes())
            .put(self.command.0.to_be_bytes())
            .put(self.cookie.to_be_bytes())
            .put(self.offset.to_be_bytes())
            .put(self.len.to_be_bytes())
            .end()
    }

    /// As received.
    ///
    /// # Errors
    /// If this is no compact request.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Result<Self, BadMagic> {
        let mut reader = Reader::new(bytes);
        let magic = reader.u32().unwrap_or_default();
        if magic != REQUEST_MAGIC {
            return Err(BadMagic(magic.into()));
        }
        Ok(RequestHeader {
            flags: CommandFlags(reader.u16().unwrap_or_default()),
            command: Command(reader.u16().unwrap_or_default()),
            cookie: reader.u64().unwrap_or_default(),
            offset: reader.u64().unwrap_or_default(),
            len: reader.u32().unwrap_or_default(),
        })
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
        let mut reader = Reader::new(bytes);
        let magic = reader.u32().unwrap_or_default();
        if magic != SIMPLE_REPLY_MAGIC {
            return Err(BadMagic(magic.into()));
        }
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
        let mut reader = Reader::new(bytes);
        let magic = reader.u32().unwrap_or_default();
        if magic != STRUCTURED_REPLY_MAGIC {
            return Err(BadMagic(magic.into()));
        }
        Ok(ChunkHeader {
            flags: ChunkFlags(reader.u16().unwrap_or_default()),
            kind: ChunkType(reader.u16().unwrap_or_default()),
            cookie: reader.u64().unwrap_or_default(),
            len: reader.u32().unwrap_or_default(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_come_back_as_they_were_sent() {
        let option = OptionHeader { option: OptionCode::GO, len: 0x0102_0304 };
        assert_eq!(OptionHeader::decode(&option.encode()), Ok(option));
        let reply = OptionReplyHeader { option: OptionCode::GO, kind: ReplyType::INFO, len: 12 };
        assert_eq!(OptionReplyHeader::decode(&reply.encode()), Ok(reply));
        let request = RequestHeader {
            flags: CommandFlags::FUA,
            command: Command::WRITE,
            cookie: 0x1122_3344_5566_7788,
            offset: 0x99aa_bbcc_ddee_ff00,
            len: 0x0102_0304,
        };
        assert_eq!(RequestHeader::decode(&request.encode()), Ok(request));
        let simple = SimpleReply { error: Errno::ENOSPC, cookie: 7 };
        assert_eq!(SimpleReply::decode(&simple.encode()), Ok(simple));
        let chunk =
            ChunkHeader { flags: ChunkFlags::DONE, kind: ChunkType::ERROR, cookie: 9, len: 6 };
        assert_eq!(ChunkHeader::decode(&chunk.encode()), Ok(chunk));
    }

    #[test]
    fn a_request_is_laid_out_as_the_protocol_says() {
        let bytes = RequestHeader {
            flags: CommandFlags(0x0102),
            command: Command(0x0304),
            cookie: 0x0506_0708_090a_0b0c,
            offset: 0x0d0e_0f10_1112_1314,
            len: 0x1516_1718,
        }
        .encode();
        assert_eq!(bytes[..4], [0x25, 0x60, 0x95, 0x13]);
        assert_eq!(bytes[4..], *(1..=24).collect::<Vec<u8>>());
    }

    #[test]
    fn a_wrong_magic_is_reported_with_its_value() {
        let mut bytes = SimpleReply { error: Errno::OK, cookie: 1 }.encode();
        bytes[3] ^= 1;
        assert_eq!(SimpleReply::decode(&bytes), Err(BadMagic(0x6744_6699)));
        assert_eq!(OptionHeader::decode(&[0; 16]), Err(BadMagic(0)));
    }

    #[test]
    fn a_reader_never_reads_past_the_end() {
        let mut reader = Reader::new(&[0, 0, 0, 5, 1, 2]);
        assert_eq!(reader.bytes_u32(), None);
        let mut reader = Reader::new(&[1, 2, 3]);
        assert_eq!((reader.u16(), reader.u16(), reader.rest()), (Some(0x102), None, &[3][..]));
    }

    #[test]
    fn unknown_codes_and_bits_can_be_printed() {
        assert_eq!(format!("{:?} {}", OptionCode(99), OptionCode::GO), "0x63 GO");
        assert_eq!(format!("{:?}", CommandFlags(0x8001)), "{FUA 0x8000}");
    }
}
