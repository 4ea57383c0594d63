//! Extended headers: how they are agreed on, 64-bit lengths, and payloads of every command.

mod server_support;

use brep_block::{BlockDevice, Memory, WriteFlags};
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkType, Command, CommandFlags, Errno, OptionCode, ReplyType, RequestHeader,
    TransmissionFlags,
};
use server_support::{Fixture, Raw, SIZE, info_data, request, request_bytes};

const GIB: u64 = 1 << 30;

/// An extended request with a 64-bit length.
fn long(command: Command, offset: u64, len: u64) -> RequestHeader {
    RequestHeader { len, ..request(command, 9, offset, 0) }
}

/// A request whose length is that of its payload.
fn carrying(command: Command, offset: u64, payload: &[u8]) -> RequestHeader {
    let flags = CommandFlags::PAYLOAD_LEN;
    RequestHeader { flags, ..long(command, offset, payload.len() as u64) }
}

/// The payload of a block status that asks for some contexts only.
fn status_payload(len: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = len.to_be_bytes().to_vec();
    payload.extend(ids.iter().flat_map(|id| id.to_be_bytes()));
    payload
}

async fn outcome(raw: &mut Raw, header: RequestHeader, payload: &[u8]) -> Errno {
    raw.extended_request(header, payload).await;
    raw.extended_outcome(header).await
}

/// The extents that one chunk tells.
fn extents(payload: &[u8]) -> (u32, Vec<(u64, u64)>) {
    let (id, rest) = payload.split_at(4);
    let (count, rest) = rest.split_at(4);
    let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
    let extents: Vec<_> = rest.chunks(16).map(|e| (word(&e[..8]), word(&e[8..]))).collect();
    assert_eq!(count, (extents.len() as u32).to_be_bytes());
    (u32::from_be_bytes(id.try_into().expect("four bytes")), extents)
}

async fn status(raw: &mut Raw, header: RequestHeader, payload: &[u8]) -> (u32, Vec<(u64, u64)>) {
    raw.extended_request(header, payload).await;
    let (chunk, payload) = raw.extended_chunk().await;
    assert_eq!((chunk.kind, chunk.flags), (ChunkType::BLOCK_STATUS_EXT, ChunkFlags::DONE));
    assert_eq!(chunk.offset, header.offset);
    extents(&payload)
}

#[tokio::test]
async fn extended_headers_are_agreed_on_once_and_include_structured_replies() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    // They may follow structured replies, but not the other way round.
    raw.structured().await;
    assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, b"data").await, ReplyType::ERR_INVALID);
    assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, &[]).await, ReplyType::ACK);
    assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, &[]).await, ReplyType::ERR_INVALID);
    let again = raw.outcome(OptionCode::STRUCTURED_REPLY, &[]).await;
    assert_eq!(again, ReplyType::ERR_EXT_HEADER_REQD);
    raw.select_allocation("disk").await;
    raw.go("disk").await;
    assert_eq!(outcome(&mut raw, long(Command::FLUSH, 0, 0), &[]).await, Errno::OK);
}

#[tokio::test]
async fn an_export_cannot_be_chosen_without_go_after_extended_headers() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, &[]).await, ReplyType::ACK);
    raw.send(&server_support::option_bytes(OptionCode::EXPORT_NAME, b"disk")).await;
    assert!(raw.is_closed().await);
}

#[tokio::test]
async fn payloads_of_block_status_are_offered_once_a_context_is_selected() {
    let fixture = Fixture::memory().await;
    let offered = async |extended: bool, contexts: bool| {
        let mut raw = fixture.client().await;
        match extended {
            true => {
                assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, &[]).await, ReplyType::ACK)
            }
            false => raw.structured().await,
        }
        if contexts {
            raw.select_allocation("disk").await;
        }
        let replies = raw.option(OptionCode::GO, &info_data("disk", &[])).await;
        let export = replies.iter().find(|(_, data)| data.len() == 12).expect("EXPORT info");
        let flags = u16::from_be_bytes([export.1[10], export.1[11]]);
        TransmissionFlags(flags).contains(TransmissionFlags::BLOCK_STATUS_PAYLOAD)
    };
    assert!(offered(true, true).await);
    assert!(!offered(true, false).await);
    assert!(!offered(false, true).await);
}

#[tokio::test]
async fn every_command_is_answered_in_chunks_that_repeat_cookie_and_offset() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.extended().await;
    let write = carrying(Command::WRITE, SIZE - 5, b"hello");
    assert_eq!(outcome(&mut raw, write, b"hello").await, Errno::OK);
    raw.extended_request(long(Command::READ, SIZE - 6, 6), &[]).await;
    let (chunk, payload) = raw.extended_chunk().await;
    assert_eq!((chunk.kind, chunk.flags), (ChunkType::OFFSET_DATA, ChunkFlags::DONE));
    assert_eq!((chunk.cookie, chunk.offset, chunk.len), (9, SIZE - 6, 14));
    assert_eq!(payload, [&(SIZE - 6).to_be_bytes()[..], b"\0hello"].concat());
    for command in [Command::TRIM, Command::WRITE_ZEROES, Command::CACHE] {
        let header = RequestHeader { flags: CommandFlags::FUA, ..long(command, 1, SIZE - 1) };
        assert_eq!(outcome(&mut raw, header, &[]).await, Errno::OK, "{command}");
    }
    assert_eq!(outcome(&mut raw, long(Command::FLUSH, 0, 0), &[]).await, Errno::OK);
    // A long read of holes: a chunk that says so in 12 bytes.
    raw.extended_request(long(Command::READ, 0, 1 << 20), &[]).await;
    let (chunk, payload) = raw.extended_chunk().await;
    assert_eq!((chunk.kind, chunk.len), (ChunkType::OFFSET_HOLE, 12));
    assert_eq!(payload, [&0_u64.to_be_bytes()[..], &(1_u32 << 20).to_be_bytes()].concat());
}

#[tokio::test]
async fn lengths_beyond_four_gib_are_zeroed_trimmed_cached_and_described_in_one_request() {
    let device = Memory::new("memory", 64 * GIB);
    for offset in [0, 5 * GIB, 48 * GIB] {
        device.write(offset, vec![7; 4096].into(), WriteFlags::default()).await.unwrap();
    }
    let fixture = Fixture::device(device.clone()).await;
    let mut raw = fixture.extended().await;
    assert_eq!(outcome(&mut raw, long(Command::CACHE, 0, 64 * GIB), &[]).await, Errno::OK);
    assert_eq!(outcome(&mut raw, long(Command::TRIM, 1, 6 * GIB), &[]).await, Errno::OK);
    let zero = long(Command::WRITE_ZEROES, 16 * GIB, 48 * GIB);
    assert_eq!(outcome(&mut raw, zero, &[]).await, Errno::OK);
    // Only the first chunk is left.
    let (id, extents) = status(&mut raw, long(Command::BLOCK_STATUS, 0, 64 * GIB), &[]).await;
    assert_eq!(id, 1);
    assert_eq!(extents.len(), 2, "{extents:?}");
    let (data, hole) = (extents[0], extents[1]);
    assert_eq!((data.1, hole.1, data.0 + hole.0), (0, 3, 64 * GIB));
    assert_eq!(device.read(48 * GIB, 10).await.unwrap(), [0; 10][..]);
}

#[tokio::test]
async fn a_block_status_may_ask_for_some_of_the_selected_contexts() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.extended().await;
    let payload = status_payload(SIZE, &[1]);
    let asked = carrying(Command::BLOCK_STATUS, 0, &payload);
    assert_eq!(status(&mut raw, asked, &payload).await, (1, vec![(SIZE, 3)]));
    let refused: [(&str, Vec<u8>); 8] = [
        ("unknown id", status_payload(SIZE, &[1, 2])),
        ("id asked for twice", status_payload(SIZE, &[1, 1])),
        ("no id", status_payload(SIZE, &[])),
        ("no length", vec![0; 7]),
        ("nothing at all", Vec::new()),
        ("half an id", status_payload(SIZE, &[1])[..11].to_vec()),
        ("a range beyond the end", status_payload(SIZE + 1, &[1])),
        ("an empty range", status_payload(0, &[1])),
    ];
    for (name, payload) in refused {
        let header = carrying(Command::BLOCK_STATUS, 0, &payload);
        assert_eq!(outcome(&mut raw, header, &payload).await, Errno::EINVAL, "{name}");
    }
    assert_eq!(status(&mut raw, asked, &payload).await.0, 1, "out of step");
}

#[tokio::test]
async fn a_payload_that_a_command_does_not_have_is_consumed_and_refused() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.extended().await;
    let commands = [
        Command::READ,
        Command::FLUSH,
        Command::TRIM,
        Command::CACHE,
        Command::WRITE_ZEROES,
        Command::RESIZE,
        Command(42),
    ];
    for command in commands {
        let header = carrying(command, 0, &[5; 100]);
        assert_eq!(outcome(&mut raw, header, &[5; 100]).await, Errno::EINVAL, "{command}");
    }
    assert_eq!(outcome(&mut raw, long(Command::FLUSH, 0, 0), &[]).await, Errno::OK, "out of step");

    // A client that has selected no context cannot ask for some.
    let mut raw = fixture.client().await;
    assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, &[]).await, ReplyType::ACK);
    raw.go("disk").await;
    let payload = status_payload(SIZE, &[1]);
    let header = carrying(Command::BLOCK_STATUS, 0, &payload);
    assert_eq!(outcome(&mut raw, header, &payload).await, Errno::EINVAL);
}

#[tokio::test]
async fn a_write_that_does_not_say_so_has_a_payload_all_the_same() {
    // As QEMU 10.0 sends it.
    let fixture = Fixture::memory().await;
    let mut raw = fixture.extended().await;
    assert_eq!(outcome(&mut raw, long(Command::WRITE, 0, 5), b"hello").await, Errno::OK);
    raw.extended_request(long(Command::READ, 0, 5), &[]).await;
    assert!(raw.extended_chunk().await.1.ends_with(b"hello"));
}

#[tokio::test]
async fn ranges_beyond_the_end_are_refused_however_long_they_are() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.extended().await;
    for (command, errno) in [
        (Command::READ, Errno::EINVAL),
        (Command::TRIM, Errno::EINVAL),
        (Command::CACHE, Errno::EINVAL),
        (Command::BLOCK_STATUS, Errno::EINVAL),
        (Command::WRITE_ZEROES, Errno::ENOSPC),
    ] {
        for (offset, len) in
            [(0, SIZE + 1), (0, u64::MAX), (1, u64::MAX), (SIZE, u64::MAX), (u64::MAX, u64::MAX)]
        {
            let header = long(command, offset, len);
            assert_eq!(outcome(&mut raw, header, &[]).await, errno, "{command} {offset} {len}");
        }
    }
}

#[tokio::test]
async fn a_payload_longer_than_32_mib_ends_the_connection_unread() {
    let fixture = Fixture::memory().await;
    for (command, len) in
        [(Command::WRITE, (32 << 20) + 1), (Command::WRITE, u64::MAX), (Command::READ, 1 << 32)]
    {
        let mut raw = fixture.extended().await;
        let flags = CommandFlags::PAYLOAD_LEN;
        let header = RequestHeader { flags, ..long(command, 0, len) };
        assert_eq!(outcome(&mut raw, header, &[]).await, Errno::EINVAL);
        assert!(raw.is_closed().await);
    }
}

#[tokio::test]
async fn headers_of_the_other_kind_end_the_connection() {
    let fixture = Fixture::memory().await;
    let mut extended = fixture.extended().await;
    extended.send(&request_bytes(request(Command::FLUSH, 1, 0, 0), &[0; 4])).await;
    assert!(extended.is_closed().await);
    let mut compact = fixture.session(true).await;
    compact.extended_request(long(Command::FLUSH, 0, 0), &[]).await;
    assert!(compact.is_closed().await);
}
