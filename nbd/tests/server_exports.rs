//! What an export can have besides its content: meta contexts, a size that clients change, and an
//! end while it is in use.

mod server_support;

use std::sync::Arc;

use brep_block::{BlockDevice, BlockStatus, FlushLevel, Io, Limits, Memory, WriteFlags, ZeroFlags};
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkType, Command, CommandFlags, Errno, OptionCode, ReplyType, RequestHeader,
    TransmissionFlags,
};
use brep_nbd::server::{ContextStatus, Export, MetaContext, ServerConfig, StaticExports};
use bytes::Bytes;
use server_support::{Fixture, Raw, info_data, meta_data, request, within};

const MIB: u64 = 1 << 20;

/// A dirty bitmap in its simplest form.
#[derive(Debug)]
struct Dirty(Vec<(u64, u64)>);

impl MetaContext for Dirty {
    fn status(&self, offset: u64, len: u64) -> Io<'_, ContextStatus> {
        let end = offset + len;
        let dirty = self.0.iter().any(|range| (range.0..range.1).contains(&offset));
        let bounds = self.0.iter().flat_map(|range| [range.0, range.1]);
        let next = bounds.filter(|bound| *bound > offset).min().unwrap_or(end);
        Io::ok(ContextStatus { len: next.min(end) - offset, flags: dirty.into() })
    }
}

/// A layer of which only some ranges are allocated.
#[derive(Debug)]
struct Layer(Arc<Memory>, Dirty);

impl BlockDevice for Layer {
    fn name(&self) -> &str {
        self.0.name()
    }

    fn size(&self) -> u64 {
        self.0.size()
    }

    fn limits(&self) -> Limits {
        self.0.limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.0.read(offset, len)
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.0.write(offset, data, flags)
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.0.write_zeroes(offset, len, flags)
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.0.discard(offset, len)
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        Io::future(async move {
            let ContextStatus { len, flags, .. } = self.1.status(offset, len).await?;
            let status = self.0.block_status(offset, len).await?;
            let flags = brep_block::StatusFlags { allocated: flags == 1, ..status.flags };
            Ok(BlockStatus { len: len.min(status.len), flags })
        })
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.0.flush(level)
    }
}

fn layer(size: u64, allocated: u64) -> Arc<dyn BlockDevice> {
    Arc::new(Layer(Memory::new("layer", size), Dirty(vec![(0, allocated)])))
}

/// An export with two bitmaps and two layers below its own.
fn export(name: &str) -> Export {
    let layers = vec![layer(4 * MIB, MIB), layer(4 * MIB, 2 * MIB), layer(3 * MIB, 3 * MIB)];
    Export::new(name, Memory::new(name, 4 * MIB))
        .dirty_bitmap("nightly", Arc::new(Dirty(vec![(MIB, MIB + 4096), (3 * MIB, 4 * MIB)])))
        .dirty_bitmap("weekly", Arc::new(Dirty(vec![(0, 4 * MIB)])))
        .allocation_depth(layers)
}

async fn serve(exports: Vec<Export>) -> (Fixture, Arc<StaticExports>) {
    let table = Arc::new(StaticExports::new());
    exports.into_iter().for_each(|export| assert!(table.add(export)));
    let fixture = Fixture::serve(Arc::clone(&table) as _, ServerConfig::default()).await;
    (fixture, table)
}

/// The contexts that an option is answered with, and their ids.
async fn contexts(raw: &mut Raw, option: OptionCode, queries: &[&str]) -> Vec<(u32, String)> {
    let mut replies = raw.option(option, &meta_data("disk", queries)).await;
    assert_eq!(replies.pop().map(|reply| reply.0), Some(ReplyType::ACK));
    let context = |(kind, data): (ReplyType, Vec<u8>)| {
        assert_eq!(kind, ReplyType::META_CONTEXT);
        let (id, name) = data.split_at(4);
        let id = u32::from_be_bytes(id.try_into().expect("an id"));
        (id, String::from_utf8(name.to_vec()).expect("a name"))
    };
    replies.into_iter().map(context).collect()
}

const ALL: [&str; 4] = [
    "base:allocation",
    "qemu:allocation-depth",
    "qemu:dirty-bitmap:nightly",
    "qemu:dirty-bitmap:weekly",
];

#[tokio::test]
async fn lists_of_contexts_know_names_namespaces_and_bitmaps() {
    let (fixture, _) = serve(vec![export("disk")]).await;
    let mut raw = fixture.client().await;
    let long = format!("qemu:dirty-bitmap:{}", "x".repeat(4096));
    let table: [(&[&str], &[&str]); 9] = [
        (&[], &ALL),
        (&["base:", "qemu:"], &ALL),
        (&["qemu:"], &ALL[1..]),
        (&["qemu:dirty-bitmap:"], &ALL[2..]),
        (&["qemu:dirty-bitmap:weekly", "qemu:dirty-bitmap:weekly"], &ALL[3..]),
        (&["qemu:dirty-bitmap:week", "qemu:dirty-bitmap", "weekly", "nbdkit:", ""], &[]),
        (&[&long, "base:allocation"], &ALL[..1]),
        (&["base:allocation:", "base"], &[]),
        (&["qemu:allocation-depth", "qemu:dirty-bitmap:"], &ALL[1..]),
    ];
    for (queries, expected) in table {
        let listed = contexts(&mut raw, OptionCode::LIST_META_CONTEXT, queries).await;
        let expected: Vec<_> = expected.iter().map(|name| (0, (*name).to_owned())).collect();
        assert_eq!(listed, expected, "{queries:?}");
    }
}

#[tokio::test]
async fn selections_name_what_they_mean_and_get_an_id_for_each() {
    let (fixture, _) = serve(vec![export("disk")]).await;
    let mut raw = fixture.client().await;
    raw.structured().await;
    let set = OptionCode::SET_META_CONTEXT;
    assert_eq!(contexts(&mut raw, set, &[]).await, []);
    assert_eq!(contexts(&mut raw, set, &["base:", "qemu:", "qemu:dirty-bitmap:"]).await, []);
    let selected = contexts(&mut raw, set, &ALL).await;
    let names: Vec<_> = selected.iter().map(|(_, name)| name.as_str()).collect();
    assert_eq!(names, ALL);
    let mut ids: Vec<_> = selected.iter().map(|(id, _)| *id).collect();
    ids.dedup();
    assert_eq!(ids.len(), 4, "{selected:?}");
}

/// The extents that an extended block status tells, by context.
async fn status(
    raw: &mut Raw,
    header: RequestHeader,
    payload: &[u8],
) -> Vec<(u32, Vec<(u64, u64)>)> {
    raw.extended_request(header, payload).await;
    let mut contexts = Vec::new();
    loop {
        let (chunk, payload) = raw.extended_chunk().await;
        assert_eq!(chunk.kind, ChunkType::BLOCK_STATUS_EXT, "{payload:?}");
        let word = |bytes: &[u8]| u64::from_be_bytes(bytes.try_into().expect("eight bytes"));
        let extents = payload[8..].chunks(16).map(|e| (word(&e[..8]), word(&e[8..]))).collect();
        contexts.push((u32::from_be_bytes(payload[..4].try_into().expect("an id")), extents));
        if chunk.flags == ChunkFlags::DONE {
            return contexts;
        }
    }
}

/// A client in the transmission phase of "disk" with all contexts, and their ids.
async fn with_all(fixture: &Fixture) -> (Raw, Vec<u32>) {
    let mut raw = fixture.client().await;
    assert_eq!(raw.outcome(OptionCode::EXTENDED_HEADERS, &[]).await, ReplyType::ACK);
    let selected = contexts(&mut raw, OptionCode::SET_META_CONTEXT, &ALL).await;
    raw.go("disk").await;
    (raw, selected.into_iter().map(|(id, _)| id).collect())
}

#[tokio::test]
async fn a_block_status_has_one_chunk_for_each_context_that_is_asked_for() {
    let (fixture, _) = serve(vec![export("disk")]).await;
    let (mut raw, ids) = with_all(&fixture).await;
    let whole = request(Command::BLOCK_STATUS, 1, 0, 4 * MIB as u32);
    let nightly = vec![(MIB, 0), (4096, 1), (2 * MIB - 4096, 0), (MIB, 1)];
    let expected = [
        (ids[0], vec![(4 * MIB, 3)]),
        (ids[1], vec![(MIB, 1), (MIB, 2), (2 * MIB, 3)]),
        (ids[2], nightly.clone()),
        (ids[3], vec![(4 * MIB, 1)]),
    ];
    assert_eq!(status(&mut raw, whole, &[]).await, expected);

    // One extent of each.
    let one = RequestHeader { flags: CommandFlags::REQ_ONE, ..whole };
    let first = expected.clone().map(|(id, extents)| (id, vec![extents[0]]));
    assert_eq!(status(&mut raw, one, &[]).await, first);

    // Some of them, in the order in which they were selected.
    let mut payload = (4 * MIB).to_be_bytes().to_vec();
    payload.extend([ids[3], ids[2]].iter().flat_map(|id| id.to_be_bytes()));
    let some = RequestHeader { flags: CommandFlags::PAYLOAD_LEN, len: 16, ..whole };
    assert_eq!(status(&mut raw, some, &payload).await, expected[2..]);
}

#[tokio::test]
async fn contexts_that_an_export_has_lost_meanwhile_count_as_not_selected() {
    let (fixture, table) = serve(vec![export("disk")]).await;
    let mut raw = fixture.client().await;
    raw.structured().await;
    assert_eq!(contexts(&mut raw, OptionCode::SET_META_CONTEXT, &ALL).await.len(), 4);
    // The connection only asked about it, and is closed with it in `replace`.
    let mut other = fixture.client().await;
    assert!(within(table.remove("disk")).await);
    assert!(raw.is_closed().await);
    other.structured().await;
    let unknown = meta_data("disk", &ALL);
    let outcome = other.outcome(OptionCode::SET_META_CONTEXT, &unknown).await;
    assert_eq!(outcome, ReplyType::ERR_UNKNOWN);
    assert!(table.add(Export::new("disk", Memory::new("disk", MIB))));
    other.go("disk").await;
    other.request(request(Command::BLOCK_STATUS, 1, 0, 4096), &[]).await;
    assert_eq!(other.chunk().await.0.kind, ChunkType::ERROR);
}

#[tokio::test]
async fn exports_come_and_go_while_clients_are_connected() {
    let (fixture, table) = serve(vec![Export::new("one", Memory::new("one", MIB))]).await;
    let mut one = fixture.client().await;
    one.go("one").await;
    let mut waiting = fixture.client().await;
    let go = info_data("two", &[]);
    assert_eq!(waiting.outcome(OptionCode::GO, &go).await, ReplyType::ERR_UNKNOWN);
    assert!(table.add(Export::new("two", Memory::new("two", MIB)).description("late")));
    assert_eq!(waiting.option(OptionCode::LIST, &[]).await.len(), 3);
    assert_eq!(waiting.outcome(OptionCode::GO, &go).await, ReplyType::ACK);
    assert_eq!(waiting.write(0, b"two").await, Errno::OK);
    assert_eq!(one.write(0, b"one").await, Errno::OK);
    assert!(within(table.remove("one")).await);
    assert!(one.is_closed().await);
    assert_eq!(waiting.read(0, 3).await, b"two");
}

async fn transmission_flags(fixture: &Fixture) -> TransmissionFlags {
    let mut raw = fixture.client().await;
    let replies = raw.option(OptionCode::INFO, &info_data("disk", &[])).await;
    let export = replies.iter().find(|(_, data)| data.len() == 12).expect("EXPORT info");
    TransmissionFlags(u16::from_be_bytes([export.1[10], export.1[11]]))
}

#[tokio::test]
async fn a_resize_counts_for_all_connections_at_once() {
    let device = Memory::new("memory", MIB);
    let (fixture, _) = serve(vec![Export::new("disk", device.clone()).resizable(true)]).await;
    assert!(transmission_flags(&fixture).await.contains(TransmissionFlags::SEND_RESIZE));
    let (mut first, mut second) = (fixture.session(false).await, fixture.session(false).await);
    assert_eq!(second.write(2 * MIB - 3, b"end").await, Errno::ENOSPC);
    let resize = async |raw: &mut Raw, size| {
        let flags = CommandFlags::FUA;
        raw.request(RequestHeader { flags, ..request(Command::RESIZE, 5, size, 0) }, &[]).await;
        raw.simple().await
    };
    assert_eq!(resize(&mut first, 2 * MIB).await, (Errno::OK, 5));
    assert_eq!(device.size(), 2 * MIB);
    assert_eq!(second.write(2 * MIB - 3, b"end").await, Errno::OK);
    assert_eq!(first.read(2 * MIB - 4, 4).await, b"\0end");

    assert_eq!(resize(&mut second, 4096).await, (Errno::OK, 5));
    // Whatever lies beyond the new end has no room there.
    for command in [Command::READ, Command::TRIM, Command::WRITE_ZEROES, Command::CACHE] {
        first.request(request(command, 6, 4096, 1), &[]).await;
        assert_eq!(first.simple().await, (Errno::ENOSPC, 6), "{command}");
    }
    assert_eq!(first.read(4000, 96).await, [0; 96]);
}

#[tokio::test]
async fn only_writable_exports_that_allow_it_are_resized() {
    let device = Memory::new("memory", MIB);
    let read_only = Export::new("disk", device.clone()).resizable(true).read_only(true);
    for (export, errno) in
        [(Export::new("disk", device.clone()), Errno::EINVAL), (read_only, Errno::EPERM)]
    {
        let (fixture, _) = serve(vec![export]).await;
        assert!(!transmission_flags(&fixture).await.contains(TransmissionFlags::SEND_RESIZE));
        let mut raw = fixture.session(false).await;
        raw.request(request(Command::RESIZE, 5, 4096, 0), &[]).await;
        assert_eq!(raw.simple().await, (errno, 5));
    }
    assert_eq!(device.size(), MIB);
    // A device that cannot change its size says so.
    let (fixture, _) = serve(vec![Export::new("disk", layer(MIB, 0)).resizable(true)]).await;
    let mut raw = fixture.session(false).await;
    raw.request(request(Command::RESIZE, 5, 4096, 0), &[]).await;
    assert_eq!(raw.simple().await, (Errno::EINVAL, 5));
}

async fn run(program: &str, arguments: &[&str]) -> Option<String> {
    let output = tokio::process::Command::new(program).args(arguments).output();
    let output = within(output).await.ok()?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    Some(text)
}

#[tokio::test]
async fn nbdinfo_and_qemu_img_see_dirty_bitmaps_and_depths() {
    let (fixture, _) = serve(vec![export("disk")]).await;
    let path = fixture.path.display();
    let uri = format!("nbd+unix:///disk?socket={path}");
    let map = |context: &str| format!("--map={context}");
    match run("nbdinfo", &[&map(ALL[2]), &uri]).await {
        None => {
            eprintln!("SKIP: nbdinfo_and_qemu_img_see_dirty_bitmaps_and_depths: nbdinfo not found")
        }
        Some(text) => {
            let words: Vec<_> = text.split_whitespace().collect();
            let expected = "0 1048576 0 clean 1048576 4096 1 dirty 1052672 2093056 0 clean \
                            3145728 1048576 1 dirty";
            assert_eq!(words.join(" "), expected);
            let depths = run("nbdinfo", &[&map(ALL[1]), &uri]).await.expect("nbdinfo");
            let words: Vec<_> = depths.split_whitespace().collect();
            let expected = "0 1048576 1 local 1048576 1048576 2 backing depth 2 2097152 2097152 \
                            3 backing depth 3";
            assert_eq!(words.join(" "), expected);
        }
    }
    // QEMU calls what is dirty a hole.
    let options = format!(
        "driver=nbd,export=disk,server.type=unix,server.path={path},x-dirty-bitmap={}",
        ALL[2]
    );
    let text = run("qemu-img", &["map", "--output=json", "--image-opts", &options]).await;
    let lengths = |text: String| {
        let parts = text.split("\"length\": ").skip(1).map(|part| {
            let (len, rest) = part.split_once(',').expect("a number");
            (len.parse::<u64>().expect("a number"), rest.contains("\"data\": false"))
        });
        parts.collect::<Vec<_>>()
    };
    let expected = [(MIB, false), (4096, true), (2 * MIB - 4096, false), (MIB, true)];
    assert_eq!(lengths(text.expect("qemu-img")), expected);
}
