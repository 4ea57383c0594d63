//! What the two sides send each other, byte by byte: constants, and headers with their codecs.
//!
//! Everything is big-endian. Codes that a peer may extend (options, reply types, commands, ...)
//! are newtypes with associated constants, so that an unknown value is representable, printable
//! and can be echoed. The section numbers are those of the protocol facts that the names follow:
//! handshake, transmission flags, requests, replies, errors, meta contexts, sizes.

mod codes;
mod flags;
mod headers;
mod mode;
mod reader;

pub use codes::{ChunkType, Command, Errno, InfoType, OptionCode, ReplyType};
pub use flags::{
    AllocationFlags, ChunkFlags, ClientFlags, CommandFlags, HandshakeFlags, TransmissionFlags,
};
pub use headers::{
    BadMagic, ChunkHeader, ExtendedChunkHeader, OptionHeader, OptionReplyHeader, RequestHeader,
    SimpleReply,
};
pub use mode::TransmissionMode;
pub use reader::Reader;

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

/// The meta context that says which parts of an export are holes, and which read as zeroes
/// ([`AllocationFlags`]).
pub const BASE_ALLOCATION: &str = "base:allocation";
/// The meta context that says in which layer the content of a range lies: 0 in none, 1 in the
/// top one, 2 in the one below it, ...
pub const ALLOCATION_DEPTH: &str = "qemu:allocation-depth";
/// What the names of dirty bitmaps' meta contexts begin with; bit 0 of their flags is "dirty".
pub const DIRTY_BITMAP_PREFIX: &str = "qemu:dirty-bitmap:";

/// First option number of the private range ("bre\0"): it and the 255 above it are not NBD's.
pub const PRIVATE_OPTION_BASE: u32 = 0x6272_6500;
/// Last option number of the private range.
pub const PRIVATE_OPTION_LAST: u32 = PRIVATE_OPTION_BASE + 0xff;
/// Reply type that carries the data of the answer to a private option; an `ACK` follows it.
pub const PRIVATE_REPLY: ReplyType = ReplyType(0x6272_6500);

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
        let long = RequestHeader { len: 0x0102_0304_0506_0708, ..request };
        assert_eq!(RequestHeader::decode_extended(&long.encode_extended()), Ok(long));
        let simple = SimpleReply { error: Errno::ENOSPC, cookie: 7 };
        assert_eq!(SimpleReply::decode(&simple.encode()), Ok(simple));
        let chunk =
            ChunkHeader { flags: ChunkFlags::DONE, kind: ChunkType::ERROR, cookie: 9, len: 6 };
        assert_eq!(ChunkHeader::decode(&chunk.encode()), Ok(chunk));
        let ChunkHeader { flags, kind, cookie, .. } = chunk;
        let chunk = ExtendedChunkHeader { flags, kind, cookie, offset: 1 << 40, len: 1 << 33 };
        assert_eq!(ExtendedChunkHeader::decode(&chunk.encode()), Ok(chunk));
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
    fn extended_headers_are_laid_out_as_the_protocol_says() {
        let request = RequestHeader {
            flags: CommandFlags(0x0102),
            command: Command(0x0304),
            cookie: 0x0506_0708_090a_0b0c,
            offset: 0x0d0e_0f10_1112_1314,
            len: 0x1516_1718_191a_1b1c,
        };
        let bytes = request.encode_extended();
        assert_eq!(bytes[..4], [0x21, 0xe4, 0x1c, 0x71]);
        assert_eq!(bytes[4..], *(1..=28).collect::<Vec<u8>>());
        let bytes = ExtendedChunkHeader {
            flags: ChunkFlags(0x0102),
            kind: ChunkType(0x0304),
            cookie: 0x0506_0708_090a_0b0c,
            offset: 0x0d0e_0f10_1112_1314,
            len: 0x1516_1718_191a_1b1c,
        }
        .encode();
        assert_eq!(bytes[..4], [0x6e, 0x8a, 0x27, 0x8c]);
        assert_eq!(bytes[4..], *(1..=28).collect::<Vec<u8>>());
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
