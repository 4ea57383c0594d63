//! What has brought other servers down. The numbers
//! are those of the public list of vulnerabilities; each test shows that this server is not
//! affected.

mod server_support;

use std::time::Duration;

use brep_block::{
    BlockDevice, BlockStatus, Count, FlushLevel, Io, Limits, Memory, Operation, StatusFlags,
    WriteFlags, ZeroFlags,
};
use brep_nbd::proto::wire::{ChunkType, Command, CommandFlags, Errno, OptionCode, ReplyType};
use bytes::Bytes;
use server_support::{
    Fixture, Raw, info_data, meta_data, option_bytes, request, request_bytes, until, within,
};

const MIB: u64 = 1 << 20;

/// The server still serves others.
async fn assert_serves(fixture: &Fixture) {
    let mut raw = fixture.session(false).await;
    assert_eq!(raw.write(7, b"fine").await, Errno::OK);
    assert_eq!(raw.read(7, 4).await, b"fine");
}

/// Option data that begins with a name that claims this length.
fn claims(len: u32, rest: usize) -> Vec<u8> {
    [&len.to_be_bytes()[..], &vec![b'x'; rest]].concat()
}

#[tokio::test]
async fn cve_2017_15118_and_2022_26495_names_longer_than_they_may_be() {
    let fixture = Fixture::memory().await;
    let options = [
        OptionCode::GO,
        OptionCode::INFO,
        OptionCode::LIST_META_CONTEXT,
        OptionCode::SET_META_CONTEXT,
    ];
    for option in options {
        let mut raw = fixture.client().await;
        raw.structured().await;
        for (len, rest) in
            [(4097, 4103), (u32::MAX, 6), (u32::MAX - 3, 100), (0x8000_0000, 6), (65_536, 65_542)]
        {
            let outcome = raw.outcome(option, &claims(len, rest)).await;
            assert_eq!(outcome, ReplyType::ERR_INVALID, "{option} {len}");
        }
    }
    for len in [4097, 65_536, u32::MAX] {
        let mut raw = fixture.client().await;
        let header = option_bytes(OptionCode::EXPORT_NAME, &[]);
        raw.send(&[&header[..12], &len.to_be_bytes()].concat()).await;
        assert!(raw.is_closed().await);
    }
    assert_serves(&fixture).await;
}

#[tokio::test]
async fn cve_2017_15119_options_of_any_length_are_not_waited_for() {
    let fixture = Fixture::memory().await;
    for len in [(32 << 20) + 1, u32::MAX] {
        let mut raw = fixture.client().await;
        let header = option_bytes(OptionCode(99), &[]);
        raw.send(&[&header[..12], &len.to_be_bytes()].concat()).await;
        assert!(raw.is_closed().await);
    }
    assert_serves(&fixture).await;
}

#[tokio::test]
async fn cve_2020_10761_an_error_about_the_longest_name_fits_its_reply() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    // Three bytes for each character: the text is cut between them.
    let name = "\u{20ac}".repeat(4096 / 3);
    for option in [OptionCode::INFO, OptionCode::GO] {
        let replies = raw.option(option, &info_data(&name, &[])).await;
        let (kind, text) = replies.last().expect("a reply");
        assert_eq!(*kind, ReplyType::ERR_UNKNOWN);
        assert!(text.len() <= 4096 && std::str::from_utf8(text).is_ok());
    }
    let outcome = raw.outcome(OptionCode::LIST_META_CONTEXT, &meta_data(&name, &[])).await;
    assert_eq!(outcome, ReplyType::ERR_UNKNOWN);
}

#[tokio::test]
async fn cve_2017_9524_clients_that_reset_at_once_are_forgotten() {
    let fixture = Fixture::memory().await;
    for sent in [&[][..], &[0, 0], &[0, 0, 0, 3], &option_bytes(OptionCode::LIST, &[])[..9]] {
        for _ in 0..50 {
            let mut raw = fixture.connect().await;
            raw.send(sent).await;
        }
    }
    until(|| fixture.server.connections().is_empty().then_some(())).await;
    assert_serves(&fixture).await;
}

/// A client at each point where it can stop speaking.
async fn held_open(fixture: &Fixture) -> Vec<Raw> {
    let mut clients = vec![fixture.connect().await, fixture.client().await];
    let mut in_an_option = fixture.client().await;
    in_an_option.send(&option_bytes(OptionCode(99), &[1; 100])[..50]).await;
    let mut idle = fixture.session(false).await;
    assert_eq!(idle.read(0, 1).await, [0]);
    let mut in_a_request = fixture.session(false).await;
    in_a_request.send(&request_bytes(request(Command::WRITE, 1, 0, 1 << 20), &[1; 1000])).await;
    let mut in_a_header = fixture.extended().await;
    in_a_header.send(&request(Command::READ, 1, 0, 1).encode_extended()[..31]).await;
    let mut deaf = fixture.session(false).await;
    deaf.send(&request_bytes(request(Command::READ, 1, 0, 32 << 20), &[])).await;
    until(|| (fixture.server.connections().len() == 7).then_some(())).await;
    clients.extend([in_an_option, idle, in_a_request, in_a_header, deaf]);
    clients
}

#[tokio::test(start_paused = true)]
async fn cve_2024_7409_connections_held_open_do_not_hold_up_a_stop() {
    let fixture = Fixture::device(Memory::new("memory", 64 * MIB)).await;
    let clients = held_open(&fixture).await;
    let connections = fixture.server.connections();
    let grace = Duration::from_secs(5);
    let started = tokio::time::Instant::now();
    within(fixture.server.shutdown(grace)).await;
    assert!(started.elapsed() <= grace + Duration::from_secs(1), "{:?}", started.elapsed());
    for connection in connections {
        within(connection.closed()).await;
    }
    assert!(fixture.server.connections().is_empty());
    assert_eq!(fixture.server.bytes_in_flight(), 0);
    drop(clients);
}

/// Says of every range that much more is in the same state, or nothing at all.
#[derive(Debug)]
struct Boasting(u64);

impl BlockDevice for Boasting {
    fn name(&self) -> &str {
        "boasting"
    }

    fn size(&self) -> u64 {
        1 << 40
    }

    fn limits(&self) -> Limits {
        Limits::default()
    }

    fn read(&self, _: u64, len: usize) -> Io<'_, Bytes> {
        Io::ok(vec![0; len].into())
    }

    fn write(&self, _: u64, _: Bytes, _: WriteFlags) -> Io<'_, ()> {
        Io::ok(())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: ZeroFlags) -> Io<'_, ()> {
        Io::ok(())
    }

    fn discard(&self, _: u64, _: u64) -> Io<'_, ()> {
        Io::ok(())
    }

    fn block_status(&self, _: u64, _: u64) -> Io<'_, BlockStatus> {
        let flags = StatusFlags { data: false, zero: true, allocated: true };
        Io::ok(BlockStatus { len: self.0, flags })
    }

    fn flush(&self, _: FlushLevel) -> Io<'_, ()> {
        Io::ok(())
    }
}

#[tokio::test]
async fn cve_2025_47711_a_state_longer_than_32_bits_is_cut_to_the_request() {
    for len in [u64::MAX, 1 << 32, u64::from(u32::MAX) + 2, 0] {
        let fixture = Fixture::device(std::sync::Arc::new(Boasting(len))).await;
        let mut raw = fixture.session(true).await;
        for asked in [1, u32::MAX - 1, u32::MAX] {
            raw.request(request(Command::BLOCK_STATUS, 1, 0, asked), &[]).await;
            let (chunk, payload) = raw.chunk().await;
            assert_eq!((chunk.kind, payload.len()), (ChunkType::BLOCK_STATUS, 12), "{len}");
            let told = u32::from_be_bytes(payload[4..8].try_into().expect("a length"));
            assert!((1..=asked).contains(&told), "{len} {asked} {told}");
        }
        // And the holes that a read leaves out.
        raw.request(request(Command::READ, 1, 5, 1 << 20), &[]).await;
        let (chunk, payload) = raw.chunk().await;
        if len > 0 {
            let hole = [&5_u64.to_be_bytes()[..], &(1_u32 << 20).to_be_bytes()].concat();
            assert_eq!((chunk.kind, payload), (ChunkType::OFFSET_HOLE, hole));
        } else {
            assert_eq!(payload.len(), 8 + (1 << 20), "{len}");
        }
    }
}

#[tokio::test]
async fn an_oversize_write_costs_its_own_connection_before_a_byte_of_it_is_kept() {
    let fixture = Fixture::memory().await;
    for len in [(32 << 20) + 1, u32::MAX] {
        let mut compact = fixture.session(false).await;
        compact.request(request(Command::WRITE, 1, 0, len), &[]).await;
        assert_eq!(compact.simple().await, (Errno::EINVAL, 1));
        assert!(compact.is_closed().await);
        let mut extended = fixture.extended().await;
        let mut header = request(Command::WRITE, 1, 0, len);
        header.flags = CommandFlags::PAYLOAD_LEN;
        extended.extended_request(header, &[]).await;
        assert_eq!(extended.extended_outcome(header).await, Errno::EINVAL);
        assert!(extended.is_closed().await);
    }
    until(|| fixture.server.connections().is_empty().then_some(())).await;
    assert_eq!(fixture.server.bytes_in_flight(), 0);
    assert_serves(&fixture).await;
}

/// CVE-2019-14850 and -14851, CVE-2013-7441: what a connection does before it has chosen an export,
/// and in the wrong order, reaches no disk and ends nothing but itself.
#[tokio::test]
async fn cve_2019_14851_requests_in_the_place_of_options_reach_no_disk() {
    let count = Count::new(Memory::new("memory", MIB));
    let fixture = Fixture::device(count.clone()).await;
    let early = request_bytes(request(Command::WRITE, 1, 0, 4), b"evil");
    let mut raw = fixture.client().await;
    raw.send(&early).await;
    assert!(raw.is_closed().await);
    for option in [OptionCode::INFO, OptionCode::LIST] {
        let data = if option == OptionCode::INFO { info_data("disk", &[]) } else { Vec::new() };
        let mut raw = fixture.client().await;
        assert_eq!(raw.outcome(option, &data).await, ReplyType::ACK);
        raw.send(&early).await;
        assert!(raw.is_closed().await);
    }
    let mut unknown = fixture.client().await;
    unknown.send(&option_bytes(OptionCode::EXPORT_NAME, b"no such export")).await;
    assert!(unknown.is_closed().await);
    for operation in [Operation::Read, Operation::Write, Operation::BlockStatus, Operation::Flush] {
        assert_eq!(count.of(operation).operations, 0, "{operation:?}");
    }
    assert_serves(&fixture).await;
}

/// CVE-2025-47712: requests near the end of 32 bits.
#[tokio::test]
async fn cve_2025_47712_requests_as_long_as_32_bits_allow_are_carried_out() {
    let count = Count::new(Memory::new("memory", 8192 * MIB));
    let fixture = Fixture::device(count.clone()).await;
    let mut raw = fixture.session(true).await;
    for (command, operation) in
        [(Command::WRITE_ZEROES, Operation::WriteZeroes), (Command::TRIM, Operation::Discard)]
    {
        for (offset, len) in [(0, u32::MAX), (1, u32::MAX), (MIB - 1, u32::MAX - 511)] {
            let before = count.of(operation).bytes;
            raw.request(request(command, 1, offset, len), &[]).await;
            assert_eq!(raw.simple().await, (Errno::OK, 1));
            assert_eq!(count.of(operation).bytes - before, u64::from(len));
        }
    }
}
