//! A server, and what a client may send to it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use brep_block::Memory;
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, ExtendedChunkHeader, OptionCode,
    OptionHeader, PAYLOAD_LEN_MAX, RequestHeader, SimpleReply, TransmissionMode,
};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};

use crate::pipe::{self, Other, Pace};

/// The size of the disk, in bytes.
pub(crate) const DISK_LEN: u64 = 256 << 10;

/// Fixed newstyle, and no zeroes after an export's name.
const CLIENT_FLAGS: [u8; 4] = [0, 0, 0, 3];

/// Any bytes, from the first that a client sends on.
///
/// # Panics
/// If the server does not end with its client, or answers otherwise when the same bytes arrive in
/// other pieces.
pub fn nbd_server_handshake(data: &[u8]) {
    // Who gets to the transmission phase may find replies in another order there; where it begins
    // is not looked for, so all that is asked here is that nothing is lost and nothing new.
    let [whole, pieces] = converse(data);
    assert!(sorted(&whole) == sorted(&pieces), "in one piece: {whole:x?}\nin pieces: {pieces:x?}");
}

/// Any bytes after a handshake, of which the first byte says how it was.
///
/// # Panics
/// As for [`nbd_server_handshake`], and if a request is not answered exactly once, in the form that
/// was agreed on.
pub fn nbd_server_transmission(data: &[u8]) {
    let Some((&choice, requests)) = data.split_first() else { return };
    let mode = mode(choice);
    let prefix = handshake(mode, choice & 4 != 0);
    let [greeting, in_pieces] = converse(&prefix);
    assert!(greeting == in_pieces, "{greeting:x?}\nin pieces: {in_pieces:x?}");
    let [mut whole, mut pieces] = converse(&[&prefix, requests].concat()).map(|answer| {
        let replies = answer.strip_prefix(&greeting[..]).expect("the handshake is the same");
        Conversation::of_requests(mode, requests).check(replies)
    });
    // What takes longer may be answered later, then or then; but every reply is the same. Of one
    // request the chunks stay in order.
    whole.sort_by_key(|(cookie, _)| *cookie);
    pieces.sort_by_key(|(cookie, _)| *cookie);
    if let Conversation { to_the_end: true, asked, .. } = Conversation::of_requests(mode, requests)
        && asked.values().all(|asked| asked.requests.len() == 1)
    {
        assert!(whole == pieces, "in one piece: {whole:x?}\nin pieces: {pieces:x?}");
        return;
    }
    // Requests of one cookie may have changed places, and what cannot be followed is no reply.
    whole.sort();
    pieces.sort();
    assert!(whole == pieces, "in one piece: {whole:x?}\nin pieces: {pieces:x?}");
}

/// The mode that an input's first byte chooses.
pub(crate) fn mode(choice: u8) -> TransmissionMode {
    match choice & 3 {
        0 => TransmissionMode::Simple,
        1 => TransmissionMode::Structured,
        _ => TransmissionMode::Extended,
    }
}

/// What the server answers to the same bytes in one piece, and in several.
fn converse(input: &[u8]) -> [Vec<u8>; 2] {
    let seed = input.iter().fold(1_u64, |seed, byte| seed.wrapping_mul(31) + u64::from(*byte));
    [Pace::Whole, Pace::Pieces(seed | 1)].map(|pace| serve(input, pace))
}

fn sorted(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.sort_unstable();
    bytes
}

fn serve(input: &[u8], pace: Pace) -> Vec<u8> {
    let other = Other::sends(input, pace);
    pipe::run(&other, async {
        let exports = StaticExports::new();
        let disk = Memory::new("disk", DISK_LEN);
        exports.add(Export::new("disk", disk).description("a disk").multi_conn(true));
        exports.add(Export::new("", Memory::new("other", 4096)).read_only(true));
        let server = Server::new(Arc::new(exports), ServerConfig::default());
        let listener = Server::bind(&pipe::endpoint()).await.expect("nobody else listens");
        tokio::select! {
            () = server.serve(listener) => {}
            () = other.closed() => {}
        }
        pipe::finite(server.shutdown(Duration::from_secs(1))).await;
        assert_eq!(server.bytes_in_flight(), 0, "memory is still held");
        assert!(server.connections().is_empty(), "a connection is still there");
        other.received()
    })
}

/// What a client sends until the transmission phase.
fn handshake(mode: TransmissionMode, with_contexts: bool) -> Vec<u8> {
    let option = |option: OptionCode, data: &[u8]| {
        let header = OptionHeader { option, len: data.len() as u32 };
        [&header.encode()[..], data].concat()
    };
    let mut bytes = CLIENT_FLAGS.to_vec();
    match mode {
        TransmissionMode::Simple => {}
        TransmissionMode::Structured => bytes.extend(option(OptionCode::STRUCTURED_REPLY, &[])),
        TransmissionMode::Extended => bytes.extend(option(OptionCode::EXTENDED_HEADERS, &[])),
    }
    if mode.is_structured() && with_contexts {
        let query = b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation";
        bytes.extend(option(OptionCode::SET_META_CONTEXT, query));
    }
    bytes.extend(option(OptionCode::GO, b"\0\0\0\x04disk\0\0"));
    bytes
}

/// The requests in an input, as far as it can be followed.
struct Conversation {
    mode: TransmissionMode,
    /// By cookie.
    asked: BTreeMap<u64, Asked>,
    /// All of the input was understood, and all replies can be.
    to_the_end: bool,
}

/// The requests under one cookie.
#[derive(Debug, Default)]
struct Asked {
    /// More than one: nobody can tell which of them an answer is for.
    requests: Vec<RequestHeader>,
    answers: usize,
}

impl Conversation {
    fn of_requests(mode: TransmissionMode, mut input: &[u8]) -> Self {
        let mut conversation = Conversation { mode, asked: BTreeMap::new(), to_the_end: false };
        loop {
            let Some((header, rest)) = request(mode, input) else {
                conversation.to_the_end = input.is_empty();
                return conversation;
            };
            if header.command == Command::DISC {
                conversation.to_the_end = true;
                return conversation;
            }
            let payload = payload_len(mode, &header);
            conversation.asked.entry(header.cookie).or_default().requests.push(header);
            match usize::try_from(payload).ok().and_then(|payload| rest.get(payload..)) {
                Some(rest) if payload <= PAYLOAD_LEN_MAX.into() => input = rest,
                // Refused before its payload, or never complete.
                _ => return conversation,
            }
        }
    }

    /// Every reply is well formed and answers a request; if the input was understood to its end,
    /// every request has been answered. Returns the cookies and bytes of the replies, or of their
    /// chunks; what cannot be followed is the last one.
    fn check(mut self, mut replies: &[u8]) -> Vec<(u64, Vec<u8>)> {
        let mut each = Vec::new();
        while !replies.is_empty() {
            let (done, cookie, rest) = self.one_reply(replies);
            each.push((cookie, replies[..replies.len() - rest.len()].to_vec()));
            replies = rest;
            let asked = self.asked.get_mut(&cookie).expect("a reply to a request");
            assert!(asked.answers < asked.requests.len(), "one answer too many: {asked:?}");
            asked.answers += usize::from(done);
        }
        let open = self.asked.values().find(|asked| asked.answers < asked.requests.len());
        assert!(!self.to_the_end || open.is_none(), "never answered: {open:?}");
        each
    }

    /// Whether it is the last one for its request, the cookie, and what follows.
    fn one_reply<'a>(&mut self, replies: &'a [u8]) -> (bool, u64, &'a [u8]) {
        if let Some((reply, rest)) = replies.split_first_chunk()
            && let Ok(reply) = SimpleReply::decode(reply)
        {
            assert!(!self.mode.is_extended(), "a simple reply to an extended request");
            return (true, reply.cookie, self.after_simple(&reply, rest));
        }
        assert!(self.mode.is_structured(), "chunks that were not agreed on");
        let (flags, kind, cookie, len, rest) = chunk_header(self.mode, replies);
        let (payload, rest) = rest.split_at(usize::try_from(len).expect("a length"));
        check_chunk(self.mode, kind, payload);
        let done = flags.contains(ChunkFlags::DONE);
        assert!(done || kind != ChunkType::NONE, "an empty chunk that ends nothing");
        (done, cookie, rest)
    }

    /// What follows a simple reply and its data.
    fn after_simple<'a>(&mut self, reply: &SimpleReply, rest: &'a [u8]) -> &'a [u8] {
        let asked = &self.asked.get(&reply.cookie).expect("a reply to a request").requests;
        let is_read = |header: &RequestHeader| header.command == Command::READ;
        let chunks = self.mode.is_structured();
        assert!(!chunks || !asked.iter().all(is_read), "a simple reply to a read");
        let len = |header| if is_read(header) && reply.error.0 == 0 { header.len } else { 0 };
        let same = |one, other| if one == other { one } else { u64::MAX };
        let len = asked.iter().map(len).reduce(same).unwrap_or_default();
        let rest = usize::try_from(len).ok().and_then(|len| rest.get(len..));
        self.to_the_end &= rest.is_some();
        rest.unwrap_or_default()
    }
}

fn request(mode: TransmissionMode, input: &[u8]) -> Option<(RequestHeader, &[u8])> {
    if mode.is_extended() {
        let (header, rest) = input.split_first_chunk()?;
        return Some((RequestHeader::decode_extended(header).ok()?, rest));
    }
    let (header, rest) = input.split_first_chunk()?;
    Some((RequestHeader::decode(header).ok()?, rest))
}

fn payload_len(mode: TransmissionMode, header: &RequestHeader) -> u64 {
    let flagged = mode.is_extended() && header.flags.contains(CommandFlags::PAYLOAD_LEN);
    if flagged || header.command == Command::WRITE { header.len } else { 0 }
}

fn chunk_header(
    mode: TransmissionMode,
    replies: &[u8],
) -> (ChunkFlags, ChunkType, u64, u64, &[u8]) {
    if mode.is_extended() {
        let (header, rest) = replies.split_first_chunk().expect("a whole header");
        let header = ExtendedChunkHeader::decode(header).expect("a chunk");
        return (header.flags, header.kind, header.cookie, header.len, rest);
    }
    let (header, rest) = replies.split_first_chunk().expect("a whole header");
    let header = ChunkHeader::decode(header).expect("a chunk");
    (header.flags, header.kind, header.cookie, header.len.into(), rest)
}

fn check_chunk(mode: TransmissionMode, kind: ChunkType, payload: &[u8]) {
    match kind {
        ChunkType::NONE => assert!(payload.is_empty()),
        ChunkType::OFFSET_DATA => assert!(payload.len() > 8),
        ChunkType::OFFSET_HOLE => assert!(payload.len() == 12 && payload[8..] != [0; 4]),
        ChunkType::BLOCK_STATUS => {
            assert!(!mode.is_extended() && payload.len() > 4 && payload.len() % 8 == 4);
            let mut extents = payload[4..].chunks_exact(8);
            assert!(extents.all(|extent| extent[..4] != [0; 4]), "an empty extent");
        }
        ChunkType::BLOCK_STATUS_EXT => {
            assert!(mode.is_extended() && payload.len() > 8 && payload.len() % 16 == 8);
            let mut extents = payload[8..].chunks_exact(16);
            assert!(extents.all(|extent| extent[..8] != [0; 8]), "an empty extent");
        }
        ChunkType::ERROR | ChunkType::ERROR_OFFSET => {
            let (errno, rest) = payload.split_first_chunk::<4>().expect("an error number");
            let (text, rest) = rest.split_first_chunk().expect("the length of a text");
            let text = usize::from(u16::from_be_bytes(*text));
            let more = if kind == ChunkType::ERROR_OFFSET { 8 } else { 0 };
            assert!(*errno != [0; 4] && rest.len() == text + more);
        }
        other => panic!("an unknown chunk: {other:?}"),
    }
}
