//! The transmission phase: every command, every malformed request, replies in both modes.

mod server_support;

use std::sync::Arc;

use brep_block::{
    BlockDevice, Count, Fault, FlushLevel, Memory, Operation, Rule, WriteFlags, ZeroFlags,
};
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkType, Command, CommandFlags, Errno, OptionCode, ReplyType, RequestHeader,
};
use brep_nbd::server::{Export, ServerConfig, StaticExports};
use server_support::{Fixture, Raw, SIZE, info_data, meta_data, request, request_bytes};

const MIB: u32 = 1 << 20;

fn with(flags: CommandFlags, mut header: RequestHeader) -> RequestHeader {
    header.flags = flags;
    header
}

/// The rows of the table of malformed input that concern requests: answered with an error, and
/// the connection goes on.
fn refused_requests() -> Vec<(&'static str, RequestHeader, Errno)> {
    let end = SIZE - 10;
    let huge = u64::MAX - 5;
    vec![
        ("unknown command", request(Command(42), 1, 0, 0), Errno::EINVAL),
        ("RESIZE", request(Command::RESIZE, 1, 5, 0), Errno::EINVAL),
        (
            "unknown flag",
            with(CommandFlags(0x4000), request(Command::READ, 1, 0, 1)),
            Errno::EINVAL,
        ),
        (
            "unknown flag on a write, whose payload is consumed",
            with(CommandFlags(0x4000), request(Command::WRITE, 1, 0, 100)),
            Errno::EINVAL,
        ),
        (
            "PAYLOAD_LEN without extended headers",
            with(CommandFlags::PAYLOAD_LEN, request(Command::WRITE, 1, 0, 100)),
            Errno::EINVAL,
        ),
        (
            "NO_HOLE on a write",
            with(CommandFlags::NO_HOLE, request(Command::WRITE, 1, 0, 10)),
            Errno::EINVAL,
        ),
        (
            "FAST_ZERO on a trim",
            with(CommandFlags::FAST_ZERO, request(Command::TRIM, 1, 0, 10)),
            Errno::EINVAL,
        ),
        (
            "REQ_ONE on a read",
            with(CommandFlags::REQ_ONE, request(Command::READ, 1, 0, 10)),
            Errno::EINVAL,
        ),
        ("DF on a flush", with(CommandFlags::DF, request(Command::FLUSH, 1, 0, 0)), Errno::EINVAL),
        ("READ longer than 32 MiB", request(Command::READ, 1, 0, 32 * MIB + 1), Errno::EINVAL),
        ("CACHE longer than 32 MiB", request(Command::CACHE, 1, 0, 32 * MIB + 1), Errno::EINVAL),
        ("READ beyond the end", request(Command::READ, 1, end, 11), Errno::EINVAL),
        ("TRIM beyond the end", request(Command::TRIM, 1, end, 11), Errno::EINVAL),
        ("CACHE beyond the end", request(Command::CACHE, 1, end, 11), Errno::EINVAL),
        ("WRITE beyond the end", request(Command::WRITE, 1, end, 11), Errno::ENOSPC),
        ("WRITE_ZEROES beyond the end", request(Command::WRITE_ZEROES, 1, end, 11), Errno::ENOSPC),
        ("READ of an overflowing range", request(Command::READ, 1, huge, 10), Errno::EINVAL),
        ("TRIM of an overflowing range", request(Command::TRIM, 1, huge, 10), Errno::EINVAL),
        ("CACHE of an overflowing range", request(Command::CACHE, 1, huge, 10), Errno::EINVAL),
        (
            "BLOCK_STATUS of an overflowing range",
            request(Command::BLOCK_STATUS, 1, huge, 10),
            Errno::EINVAL,
        ),
        ("WRITE to an overflowing range", request(Command::WRITE, 1, huge, 10), Errno::ENOSPC),
        (
            "WRITE_ZEROES of an overflowing range",
            request(Command::WRITE_ZEROES, 1, huge, u32::MAX),
            Errno::ENOSPC,
        ),
        ("FLUSH with a range", request(Command::FLUSH, 1, 0, 10), Errno::EINVAL),
        ("FLUSH with an offset", request(Command::FLUSH, 1, 10, 0), Errno::EINVAL),
        ("BLOCK_STATUS beyond the end", request(Command::BLOCK_STATUS, 1, end, 11), Errno::EINVAL),
        ("BLOCK_STATUS of nothing", request(Command::BLOCK_STATUS, 1, 0, 0), Errno::EINVAL),
    ]
}

fn payload(header: &RequestHeader) -> Vec<u8> {
    match header.command {
        Command::WRITE => vec![0x55; header.len as usize],
        _ => Vec::new(),
    }
}

#[tokio::test]
async fn a_malformed_request_is_refused_and_the_connection_goes_on() {
    let fixture = Fixture::memory().await;
    let mut simple = fixture.session(false).await;
    let mut structured = fixture.session(true).await;
    for (name, header, errno) in refused_requests() {
        simple.request(header, &payload(&header)).await;
        assert_eq!(simple.simple().await, (errno, 1), "{name}");
        assert_eq!(simple.read(0, 3).await, [0; 3], "{name}: out of step, or written");

        structured.request(header, &payload(&header)).await;
        assert_error_chunk(&mut structured, errno, name).await;
    }
}

/// An error in structured mode is a chunk with a text.
async fn assert_error_chunk(raw: &mut Raw, errno: Errno, name: &str) {
    let (chunk, payload) = raw.chunk().await;
    assert_eq!((chunk.kind, chunk.flags), (ChunkType::ERROR, ChunkFlags::DONE), "{name}");
    assert_eq!(payload[..4], errno.0.to_be_bytes(), "{name}");
    let text_len = usize::from(u16::from_be_bytes([payload[4], payload[5]]));
    assert!(text_len > 0 && text_len == payload.len() - 6, "{name}: {payload:?}");
}

#[tokio::test]
async fn changes_to_a_read_only_export_are_not_permitted() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    raw.go("read-only").await;
    for command in [Command::WRITE, Command::TRIM, Command::WRITE_ZEROES] {
        // Beyond the end, too: that it is read-only comes first.
        for (offset, len) in [(0, 10), (SIZE, 10), (0, 0)] {
            let header = request(command, 9, offset, len);
            raw.request(header, &payload(&header)).await;
            assert_eq!(raw.simple().await, (Errno::EPERM, 9), "{command} {offset} {len}");
        }
    }
    raw.request(request(Command::FLUSH, 1, 0, 0), &[]).await;
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert_eq!(raw.read(0, 1).await, [0]);
}

#[tokio::test]
async fn a_wrong_request_magic_ends_the_connection_after_earlier_requests_are_done() {
    let device = Memory::new("memory", SIZE);
    let fixture = Fixture::device(device.clone()).await;
    let mut raw = fixture.session(false).await;
    let mut bytes = request_bytes(request(Command::WRITE, 5, 0, 4), b"done");
    let mut bad = request_bytes(request(Command::WRITE, 6, 4, 4), b"evil");
    bad[0] ^= 1;
    bytes.extend(bad);
    raw.send(&bytes).await;
    assert_eq!(raw.simple().await, (Errno::OK, 5));
    assert!(raw.is_closed().await);
    assert_eq!(device.read(0, 8).await.unwrap(), b"done\0\0\0\0"[..]);
}

#[tokio::test]
async fn a_write_longer_than_32_mib_ends_the_connection_without_its_payload() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.session(false).await;
    raw.request(request(Command::WRITE, 5, 0, 32 * MIB + 1), &[]).await;
    assert_eq!(raw.simple().await, (Errno::EINVAL, 5));
    assert!(raw.is_closed().await);
}

#[tokio::test]
async fn df_is_refused_without_structured_replies() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.session(false).await;
    raw.request(with(CommandFlags::DF, request(Command::READ, 1, 0, 1)), &[]).await;
    assert_eq!(raw.simple().await, (Errno::EINVAL, 1));
}

#[tokio::test]
async fn block_status_needs_a_context_of_the_same_export() {
    let fixture = Fixture::memory().await;
    let status = request(Command::BLOCK_STATUS, 1, 0, 4096);

    let mut none = fixture.client().await;
    none.structured().await;
    none.go("disk").await;
    none.request(status, &[]).await;
    assert_error_chunk(&mut none, Errno::EINVAL, "no context").await;

    let mut other = fixture.client().await;
    other.structured().await;
    other.select_allocation("read-only").await;
    other.go("disk").await;
    other.request(status, &[]).await;
    assert_error_chunk(&mut other, Errno::EINVAL, "context of another export").await;

    for (data, refusal) in [
        (meta_data("nobody", &["base:allocation"]), ReplyType::ERR_UNKNOWN),
        (vec![0; 200_000], ReplyType::ERR_TOO_BIG),
    ] {
        let mut failed = fixture.client().await;
        failed.structured().await;
        failed.select_allocation("disk").await;
        assert_eq!(failed.outcome(OptionCode::SET_META_CONTEXT, &data).await, refusal);
        failed.go("disk").await;
        failed.request(status, &[]).await;
        assert_error_chunk(&mut failed, Errno::EINVAL, "a selection that failed").await;
    }
}

#[tokio::test]
async fn requests_of_no_length_succeed() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.session(true).await;
    for offset in [0, SIZE] {
        for command in [Command::WRITE, Command::TRIM, Command::WRITE_ZEROES, Command::CACHE] {
            raw.request(request(command, 3, offset, 0), &[]).await;
            assert_eq!(raw.simple().await, (Errno::OK, 3), "{command}");
        }
        raw.request(request(Command::READ, 4, offset, 0), &[]).await;
        let (chunk, _) = raw.chunk().await;
        assert_eq!((chunk.kind, chunk.flags), (ChunkType::NONE, ChunkFlags::DONE));
    }
}

#[tokio::test]
async fn every_command_does_what_it_says_up_to_the_last_byte() {
    let device = Memory::new("memory", SIZE);
    let fixture = Fixture::device(device.clone()).await;
    let mut raw = fixture.session(false).await;
    assert_eq!(raw.write(SIZE - 5, b"abcde").await, Errno::OK);
    assert_eq!(raw.read(SIZE - 6, 6).await, b"\0abcde");
    raw.request(request(Command::WRITE_ZEROES, 1, SIZE - 5, 2), &[]).await;
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert_eq!(raw.read(SIZE - 5, 5).await, b"\0\0cde");
    for command in [Command::TRIM, Command::CACHE] {
        raw.request(request(command, 2, SIZE - 5, 5), &[]).await;
        assert_eq!(raw.simple().await, (Errno::OK, 2), "{command}");
    }
    raw.request(request(Command::FLUSH, 3, 0, 0), &[]).await;
    assert_eq!(raw.simple().await, (Errno::OK, 3));
    raw.request(request(Command::DISC, 4, 0, 0), &[]).await;
    assert!(raw.is_closed().await);
}

#[tokio::test]
async fn fua_reaches_writes_and_zeroes_and_flushes_after_a_trim() {
    let recorder = Arc::new(Recorder::new());
    let fixture = Fixture::device(recorder.clone()).await;
    let mut raw = fixture.session(false).await;
    let fua = CommandFlags::FUA;
    let zero_flags = fua.with(CommandFlags::NO_HOLE).with(CommandFlags::FAST_ZERO);
    let requests = [
        with(fua, request(Command::WRITE, 1, 0, 1)),
        request(Command::WRITE, 1, 0, 1),
        with(zero_flags, request(Command::WRITE_ZEROES, 1, 0, 1)),
        request(Command::WRITE_ZEROES, 1, 0, 1),
        with(fua, request(Command::TRIM, 1, 0, 1)),
        request(Command::TRIM, 1, 0, 1),
        with(fua, request(Command::FLUSH, 1, 0, 0)),
    ];
    for header in requests {
        raw.request(header, &payload(&header)).await;
        assert_eq!(raw.simple().await, (Errno::OK, 1), "{header:?}");
    }
    let expected = [
        "write fua=true",
        "write fua=false",
        "zeroes fua=true unmap=false fast=true",
        "zeroes fua=false unmap=true fast=false",
        "discard",
        "flush Durable",
        "discard",
        "flush Durable",
    ];
    assert_eq!(recorder.calls(), expected);
}

#[tokio::test]
async fn device_errors_arrive_as_the_protocol_lists_them() {
    let fault = Fault::new(Memory::new("memory", SIZE));
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.session(false).await;
    let errors = [
        (5, Errno::EIO),
        (28, Errno::ENOSPC),
        (122, Errno::ENOSPC),
        (30, Errno::EPERM),
        (12, Errno::ENOMEM),
        (108, Errno::ESHUTDOWN),
        (75, Errno::EIO),
        (4, Errno::EIO),
    ];
    for (os, sent) in errors {
        fault.fail(Rule::new(Operation::Write).errno(os));
        assert_eq!(raw.write(0, b"x").await, sent, "errno {os}");
    }
    fault.fail(Rule::new(Operation::Read));
    raw.request(request(Command::READ, 1, 0, 100), &[]).await;
    assert_eq!(raw.simple().await, (Errno::EIO, 1));
    fault.fail(Rule::new(Operation::Flush));
    raw.request(request(Command::FLUSH, 2, 0, 0), &[]).await;
    assert_eq!(raw.simple().await, (Errno::EIO, 2));
    assert_eq!(raw.read(0, 1).await, [0]);
    assert_eq!(fixture.connection().await.counters().errors, errors.len() as u64 + 2);
}

#[tokio::test]
async fn unsupported_is_said_of_fast_zeroes_only() {
    let fault = Fault::new(Memory::new("memory", SIZE));
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.session(false).await;
    let zeroes = request(Command::WRITE_ZEROES, 1, 0, 4096);
    fault.fail(Rule::new(Operation::WriteZeroes).errno(95));
    raw.request(with(CommandFlags::FAST_ZERO, zeroes), &[]).await;
    assert_eq!(raw.simple().await, (Errno::ENOTSUP, 1));
    fault.fail(Rule::new(Operation::Write).errno(95));
    assert_eq!(raw.write(0, b"x").await, Errno::EINVAL);
}

#[tokio::test]
async fn structured_reads_leave_out_holes_and_cover_the_request() {
    let device = Memory::new("memory", 4 << 20);
    device.write(1 << 20, vec![7; 1 << 20].into(), WriteFlags::default()).await.unwrap();
    let fixture = Fixture::device(device).await;
    let mut raw = fixture.session(true).await;
    raw.request(request(Command::READ, 8, 1000, 3 << 20), &[]).await;
    let (mut position, mut data, mut done) = (1000_u64, 0, false);
    while !done {
        let (chunk, payload) = raw.chunk().await;
        let offset = u64::from_be_bytes(payload[..8].try_into().unwrap());
        assert_eq!((chunk.cookie, offset), (8, position));
        position += match chunk.kind {
            ChunkType::OFFSET_HOLE => {
                u64::from(u32::from_be_bytes(payload[8..].try_into().unwrap()))
            }
            ChunkType::OFFSET_DATA => {
                data += payload.len() - 8;
                payload.len() as u64 - 8
            }
            kind => panic!("{kind}"),
        };
        done = chunk.flags == ChunkFlags::DONE;
    }
    assert_eq!((position, data), (1000 + (3 << 20), 1 << 20));
}

#[tokio::test]
async fn a_read_that_must_not_be_fragmented_comes_in_one_chunk() {
    let device = Memory::new("memory", 4 << 20);
    device.write(1 << 20, vec![7; 4096].into(), WriteFlags::default()).await.unwrap();
    let fixture = Fixture::device(device).await;
    let mut raw = fixture.session(true).await;
    raw.request(with(CommandFlags::DF, request(Command::READ, 8, 0, 2 << 20)), &[]).await;
    let (chunk, payload) = raw.chunk().await;
    assert_eq!((chunk.kind, chunk.flags), (ChunkType::OFFSET_DATA, ChunkFlags::DONE));
    assert_eq!(payload.len(), 8 + (2 << 20));
}

#[tokio::test]
async fn small_reads_do_not_ask_for_holes() {
    let count = Count::new(Memory::new("memory", SIZE));
    let fixture = Fixture::device(count.clone()).await;
    let mut raw = fixture.session(true).await;
    raw.request(request(Command::READ, 8, 0, 65_535), &[]).await;
    let (chunk, payload) = raw.chunk().await;
    assert_eq!((chunk.kind, payload.len()), (ChunkType::OFFSET_DATA, 8 + 65_535));
    assert_eq!(count.of(Operation::BlockStatus).operations, 0);
}

#[tokio::test]
async fn a_read_whose_holes_cannot_be_asked_for_is_data() {
    let fault = Fault::new(Memory::new("memory", SIZE));
    fault.fail(Rule::new(Operation::BlockStatus).forever());
    let fixture = Fixture::device(fault).await;
    let mut raw = fixture.session(true).await;
    raw.request(request(Command::READ, 8, 0, 100_000), &[]).await;
    let (chunk, payload) = raw.chunk().await;
    assert_eq!((chunk.kind, payload.len()), (ChunkType::OFFSET_DATA, 8 + 100_000));
}

#[tokio::test]
async fn block_status_reports_extents_and_obeys_req_one() {
    let device = Memory::new("memory", 4 << 20);
    device.write(1 << 20, vec![7; 1 << 20].into(), WriteFlags::default()).await.unwrap();
    let fixture = Fixture::device(device).await;
    let mut raw = fixture.session(true).await;
    let status = request(Command::BLOCK_STATUS, 8, 0, 4 << 20);
    raw.request(status, &[]).await;
    let (chunk, payload) = raw.chunk().await;
    assert_eq!((chunk.kind, chunk.flags), (ChunkType::BLOCK_STATUS, ChunkFlags::DONE));
    let extent = |len: u32, flags: u32| [len.to_be_bytes(), flags.to_be_bytes()].concat();
    let all = [extent(MIB, 3), extent(MIB, 0), extent(2 * MIB, 3)].concat();
    assert_eq!(payload, [&1_u32.to_be_bytes()[..], &all].concat());

    raw.request(with(CommandFlags::REQ_ONE, status), &[]).await;
    assert_eq!(raw.chunk().await.1, [&1_u32.to_be_bytes()[..], &extent(MIB, 3)].concat());
    raw.request(with(CommandFlags::REQ_ONE, request(Command::BLOCK_STATUS, 9, 10, 5)), &[]).await;
    assert_eq!(raw.chunk().await.1, [&1_u32.to_be_bytes()[..], &extent(5, 3)].concat());
}

#[tokio::test]
async fn requests_larger_than_the_device_takes_are_cut() {
    let mut recorder = Recorder::new();
    recorder.limits.transfer_max = 100_000;
    let recorder = Arc::new(recorder);
    let fixture = Fixture::device(recorder.clone()).await;
    let mut raw = fixture.session(false).await;
    let data: Vec<u8> = (0..250_000_u32).map(|i| (i % 251) as u8).collect();
    assert_eq!(raw.write(100, &data).await, Errno::OK);
    assert_eq!(recorder.calls().len(), 3);
    assert_eq!(raw.read(100, 250_000).await, data);
}

#[tokio::test]
async fn unaligned_requests_are_refused_where_alignment_was_agreed() {
    let mut recorder = Recorder::new();
    recorder.limits.block_size = 4096;
    let fixture = Fixture::device(Arc::new(recorder)).await;

    let mut raw = fixture.client().await;
    for option in [OptionCode::INFO, OptionCode::GO] {
        let outcome = raw.outcome(option, &info_data("disk", &[])).await;
        assert_eq!(outcome, ReplyType::ERR_BLOCK_SIZE_REQD);
    }
    assert_eq!(raw.outcome(OptionCode::GO, &info_data("disk", &[3])).await, ReplyType::ACK);
    let requests = [
        request(Command::READ, 1, 1, 4096),
        request(Command::READ, 1, 0, 100),
        request(Command::WRITE, 1, 4096, 512),
        request(Command::TRIM, 1, 512, 4096),
        request(Command::WRITE_ZEROES, 1, 512, 4096),
    ];
    for header in requests {
        raw.request(header, &payload(&header)).await;
        assert_eq!(raw.simple().await, (Errno::EINVAL, 1), "{header:?}");
    }
    let last = SIZE / 4096 * 4096;
    assert_eq!(raw.read(last, (SIZE - last) as u32).await.len(), (SIZE - last) as usize);
}

#[tokio::test]
async fn a_device_that_returns_too_few_bytes_does_not_put_the_connection_out_of_step() {
    let mut recorder = Recorder::new();
    recorder.short_reads = true;
    let fixture = Fixture::device(Arc::new(recorder)).await;
    let mut raw = fixture.session(false).await;
    raw.request(request(Command::READ, 1, 0, 100), &[]).await;
    assert_eq!(raw.simple().await, (Errno::EIO, 1));
    assert_eq!(raw.write(0, b"x").await, Errno::OK);
}

#[tokio::test]
async fn a_large_write_arrives_unharmed_in_pieces_of_any_size() {
    let device = Memory::new("memory", 64 << 20);
    let exports = StaticExports::new();
    exports.add(Export::new("disk", device.clone()));
    let fixture = Fixture::serve(Arc::new(exports), ServerConfig::default()).await;
    let mut raw = fixture.session(false).await;
    let mut data = (0..251).collect::<Vec<u8>>().repeat((32 << 20) / 251 + 1);
    data.truncate(32 << 20);
    let header = request(Command::WRITE, 1, 5, 32 << 20);
    let bytes =
        [request_bytes(request(Command::WRITE, 0, 0, 3), b"abc"), request_bytes(header, &data)];
    let bytes = bytes.concat();
    for piece in bytes.chunks(777_777) {
        raw.send(piece).await;
    }
    assert_eq!(raw.simple().await, (Errno::OK, 0));
    assert_eq!(raw.simple().await, (Errno::OK, 1));
    assert_eq!(device.read(0, 3).await.unwrap(), b"abc"[..]);
    assert!(device.read(5, 32 << 20).await.unwrap() == data);
}

/// Memory that writes down how it is called, and can be made to misbehave.
#[derive(Debug)]
struct Recorder {
    inner: Arc<Memory>,
    limits: brep_block::Limits,
    short_reads: bool,
    calls: std::sync::Mutex<Vec<String>>,
}

impl Recorder {
    fn new() -> Self {
        let inner = Memory::new("memory", SIZE);
        let limits = inner.limits();
        Recorder { inner, limits, short_reads: false, calls: std::sync::Mutex::default() }
    }

    fn note(&self, call: String) {
        self.calls.lock().unwrap().push(call);
    }

    fn calls(&self) -> Vec<String> {
        self.calls.lock().unwrap().clone()
    }
}

impl BlockDevice for Recorder {
    fn name(&self) -> &str {
        "recorder"
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> brep_block::Limits {
        self.limits
    }

    fn read(&self, offset: u64, len: usize) -> brep_block::Io<'_, bytes::Bytes> {
        self.inner.read(offset, if self.short_reads { len / 2 } else { len })
    }

    fn write(&self, offset: u64, data: bytes::Bytes, flags: WriteFlags) -> brep_block::Io<'_, ()> {
        self.note(format!("write fua={}", flags.fua));
        self.inner.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> brep_block::Io<'_, ()> {
        let ZeroFlags { fua, may_unmap, fast } = flags;
        self.note(format!("zeroes fua={fua} unmap={may_unmap} fast={fast}"));
        self.inner.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> brep_block::Io<'_, ()> {
        self.note("discard".to_owned());
        self.inner.discard(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> brep_block::Io<'_, brep_block::BlockStatus> {
        self.inner.block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> brep_block::Io<'_, ()> {
        self.note(format!("flush {level:?}"));
        self.inner.flush(level)
    }
}
