//! How requests are put on the wire: split to the server's limits, with the flags that it has, and made
//! up for where it cannot do something.

mod client_support;

use brep_block::{BlockDevice, ErrorKind, FlushLevel, WriteFlags, ZeroFlags};
use brep_nbd::proto::wire::{ChunkType, Command, CommandFlags, Errno};
use bytes::Bytes;
use client_support::pair::{Pair, kind, pair, soon, write};
use client_support::pattern;
use client_support::scripted::Export;
use futures_util::join;

#[tokio::test]
async fn long_requests_are_split_and_put_together() {
    let export = Export { block_sizes: Some([512, 4096, 4096]), ..Export::default() };
    let Pair { disk, mut server, .. } = pair(export, |_| {}).await;
    let content = pattern(10_240, 1);
    let read = disk.start_read(1024, 10_240);
    let write = write(&disk, 0, &content);
    let (read, written, ()) = join!(read, write, async {
        let mut requests = Vec::new();
        for _ in 0..3 {
            requests.push(soon(server.expect_request()).await.0);
        }
        let ranges: Vec<_> = requests.iter().map(|r| (r.offset, r.len)).collect();
        assert_eq!(ranges, [(1024, 4096), (5120, 4096), (9216, 2048)]);
        for header in requests.iter().rev() {
            let start = (header.offset - 1024) as usize;
            let data = &content[start..start + header.len as usize];
            server.simple(header.cookie, Errno::OK, data).await;
        }
        let mut written = Vec::new();
        for _ in 0..3 {
            let (header, payload) = soon(server.expect_request()).await;
            assert_eq!(header.offset, written.len() as u64);
            written.extend(payload);
            server.simple(header.cookie, Errno::OK, &[]).await;
        }
        assert_eq!(written, content);
    });
    assert_eq!(read.expect("read"), content);
    written.expect("written");
    assert_eq!(kind(disk.read(1, 512).await), ErrorKind::InvalidInput);
    assert_eq!(
        kind(disk.write_zeroes(512, 1, ZeroFlags::default()).await),
        ErrorKind::InvalidInput
    );
}

#[tokio::test]
async fn a_failed_part_fails_the_whole_and_the_rest_is_not_sent() {
    let export = Export { block_sizes: Some([512, 512, 512]), ..Export::default() };
    let Pair { disk, mut server, .. } = pair(export, |options| options.in_flight_max = 1).await;
    let long = write(&disk, 0, &[1; 2048]);
    let next = disk.start_discard(4096, 512);
    let (long, next, ()) = join!(long, next, async {
        let (header, _) = soon(server.expect_request()).await;
        server.simple(header.cookie, Errno::OK, &[]).await;
        let (header, _) = soon(server.expect_request()).await;
        server.simple(header.cookie, Errno::EIO, &[]).await;
        let (header, _) = soon(server.expect_request()).await;
        assert_eq!(header.command, Command::TRIM);
        server.simple(header.cookie, Errno::OK, &[]).await;
    });
    let error = long.expect_err("a part failed");
    assert_eq!((error.kind(), error.offset(), error.length()), (ErrorKind::Io, 512, 512));
    next.expect("trimmed");
}

#[tokio::test]
async fn what_the_server_cannot_do_is_made_up_for() {
    // Flushes, but neither FUA nor zeroes nor trims.
    let export = Export { flags: 0b101, size: 1 << 20, ..Export::default() };
    let Pair { disk, mut server, .. } = pair(export, |_| {}).await;
    let durable = disk.start_write(0, Bytes::from_static(b"data"), WriteFlags { fua: true });
    let (durable, ()) = join!(durable, async {
        let (header, _) = soon(server.expect_request()).await;
        assert_eq!((header.command, header.flags), (Command::WRITE, CommandFlags::NONE));
        server.simple(header.cookie, Errno::OK, &[]).await;
        let (header, _) = soon(server.expect_request()).await;
        assert_eq!((header.command, header.offset, header.len), (Command::FLUSH, 0, 0));
        server.simple(header.cookie, Errno::OK, &[]).await;
    });
    durable.expect("durable");
    let (zeroed, ()) = join!(disk.start_write_zeroes(512, 600_000, ZeroFlags::default()), async {
        let mut len = 0;
        while len < 600_000 {
            let (header, payload) = soon(server.expect_request()).await;
            assert_eq!((header.command, header.offset), (Command::WRITE, 512 + len));
            assert!(payload.iter().all(|byte| *byte == 0));
            len += header.len;
            server.simple(header.cookie, Errno::OK, &[]).await;
        }
        assert_eq!(len, 600_000);
    });
    zeroed.expect("zeroed");
    disk.discard(0, 4096).await.expect("nothing to do");
    disk.flush(FlushLevel::Process).await.expect("nothing to do");
    let fast = ZeroFlags { fast: true, ..ZeroFlags::default() };
    assert_eq!(kind(disk.write_zeroes(0, 512, fast).await), ErrorKind::Unsupported);
    let status = disk.block_status(0, 4096).await.expect("always known");
    assert!(status.len == 4096 && status.flags.data && !status.flags.zero);

    let Pair { disk, .. } = pair(Export { flags: 1, ..export }, |_| {}).await;
    disk.flush(FlushLevel::Durable).await.expect("nothing to flush");
}

#[tokio::test]
async fn flags_are_sent_where_the_server_has_them() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
    let zero = |fua, may_unmap, fast| {
        drop(disk.start_write_zeroes(0, 512, ZeroFlags { fua, may_unmap, fast }));
    };
    drop(disk.start_write(0, Bytes::from_static(b"data"), WriteFlags { fua: true }));
    zero(false, true, false);
    zero(true, false, false);
    zero(false, true, true);
    let no_hole = CommandFlags::NO_HOLE.with(CommandFlags::FUA);
    for expected in [CommandFlags::FUA, CommandFlags::NONE, no_hole, CommandFlags::FAST_ZERO] {
        assert_eq!(soon(server.expect_request()).await.0.flags, expected);
    }
}

#[tokio::test]
async fn a_failed_flush_is_sticky_even_if_nobody_waited_for_it() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
    drop(disk.start_flush(FlushLevel::Durable));
    let (header, _) = soon(server.expect_request()).await;
    server.simple(header.cookie, Errno::EIO, &[]).await;
    let (read, ()) = join!(disk.start_read(0, 1), async {
        let (header, _) = soon(server.expect_request()).await;
        server.simple(header.cookie, Errno::OK, b"x").await;
    });
    read.expect("read");
    assert!(disk.flush_has_failed());
    assert_eq!(kind(disk.flush(FlushLevel::Durable).await), ErrorKind::Sticky);
}

#[tokio::test]
async fn extents_are_cut_to_the_request_and_to_whole_blocks() {
    let export =
        Export { block_sizes: Some([4096, 4096, 1 << 20]), structured: true, ..Export::default() };
    let Pair { disk, mut server, .. } = pair(export, |_| {}).await;
    // What the server says, and what it means: length, data, zero.
    let table = [
        ((1 << 20, 0u32), (16_384, true, false)),
        ((8192, 3), (8192, false, true)),
        ((5000, 1), (4096, false, false)),
        ((100, 3), (4096, true, false)),
    ];
    for ((len, flags), expected) in table {
        let (status, ()) = join!(disk.start_block_status(4096, 16_384), async {
            let (header, _) = soon(server.expect_request()).await;
            assert_eq!(header.flags, CommandFlags::REQ_ONE);
            let payload: Vec<u8> =
                [1, len, flags].iter().flat_map(|word: &u32| word.to_be_bytes()).collect();
            server.chunk(header.cookie, ChunkType::BLOCK_STATUS, true, &payload).await;
        });
        let status = status.expect("a status");
        assert_eq!((status.len, status.flags.data, status.flags.zero), expected);
    }
}

#[tokio::test]
async fn a_big_read_in_many_pieces_arrives_whole() {
    let export = Export { structured: true, ..Export::default() };
    let Pair { disk, mut server, .. } = pair(export, |_| {}).await;
    let content = pattern(4 << 20, 9);
    let (read, ()) = join!(disk.start_read(0, 4 << 20), async {
        let (header, _) = soon(server.expect_request()).await;
        // One chunk beyond the direct threshold, small ones, and one out of order.
        let bounds = [0, 3 << 20, (3 << 20) + 10, (3 << 20) + 20, 4 << 20];
        for index in [0, 1, 3, 2] {
            let range = bounds[index]..bounds[index + 1];
            let chunk = [&(range.start as u64).to_be_bytes()[..], &content[range]].concat();
            server.chunk(header.cookie, ChunkType::OFFSET_DATA, false, &chunk).await;
        }
        server.chunk(header.cookie, ChunkType::NONE, true, &[]).await;
    });
    assert!(read.expect("read") == content, "the data differ");
}
