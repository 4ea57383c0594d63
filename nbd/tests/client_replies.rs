//! The client's decoder of replies: what a server may send, what it must not, and both cut
//! anywhere.

mod client_support;

use brep_nbd::proto::client::{Answer, Completion, Extent, Refusal, ReplyError, Transmission};
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, Errno, ExtendedChunkHeader,
    TransmissionMode::{Extended, Simple, Structured},
};
use bytes::BufMut;
use client_support::replies::{CONTEXT, Exchange, bytes, error_payload, read, refusal, request};
use proptest::prelude::*;

#[test]
fn simple_replies_in_any_order() {
    let requests =
        [read(0, 4), request(Command::WRITE, 8, 4), read(100, 3), request(Command::FLUSH, 0, 0)];
    let results = Exchange::new(Simple, &requests)
        .simple(2, 0, b"xyz")
        .simple(1, 28, b"")
        .simple(3, 0, b"")
        .simple(0, 0, b"abcd")
        .results();
    assert_eq!(results[&0], bytes(b"abcd"));
    assert_eq!(results[&1], refusal(Errno::ENOSPC, ""));
    assert_eq!(results[&2], bytes(b"xyz"));
    assert_eq!(results[&3], Ok(Answer::Done));
}

#[test]
fn chunks_of_several_reads_may_be_interleaved_and_come_in_any_order() {
    for mode in [Structured, Extended] {
        let results = Exchange::new(mode, &[read(1000, 10), read(0, 6)])
            .data(0, false, 1004, b"efgh")
            .data(1, false, 0, b"uv")
            .hole(0, false, 1008, 2)
            .data(1, true, 2, b"wxyz")
            .data(0, false, 1000, b"abcd")
            .done(0)
            .results();
        assert_eq!(results[&0], bytes(b"abcdefgh\0\0"));
        assert_eq!(results[&1], bytes(b"uvwxyz"));
    }
}

#[test]
fn a_read_of_holes_only_is_zeroes() {
    let results = Exchange::new(Structured, &[read(8, 8)])
        .hole(0, false, 12, 4)
        .hole(0, true, 8, 4)
        .results();
    assert_eq!(results[&0], bytes(&[0; 8]));
}

#[test]
fn simple_replies_stay_possible_for_all_but_reads() {
    let results =
        Exchange::new(Structured, &[request(Command::WRITE, 0, 4), request(Command::TRIM, 0, 4)])
            .simple(0, 0, b"")
            .done(1)
            .results();
    assert_eq!((&results[&0], &results[&1]), (&Ok(Answer::Done), &Ok(Answer::Done)));
}

#[test]
fn errors_of_every_kind_end_their_request_and_no_other() {
    let requests = [read(0, 8); 7];
    let with_offset = [&error_payload(5, 3, b"bad")[..], &4u64.to_be_bytes()].concat();
    let unknown = [&error_payload(28, 2, b"hm")[..], b"more to say"].concat();
    for mode in [Structured, Extended] {
        let results = Exchange::new(mode, &requests)
            .error(0, true, 5, b"broken")
            .error(1, false, 12, b"")
            .chunk(2, ChunkType::ERROR_OFFSET, true, &with_offset)
            .chunk(3, ChunkType(0x8123), true, &unknown)
            .error(4, true, 4711, b"")
            .data(1, false, 0, b"half")
            .data(5, false, 0, b"half")
            .error(5, false, 5, b"first")
            .error(5, true, 1, b"second")
            .error(6, true, 5, &[b'x'; 65_535])
            .done(1)
            .results();
        assert_eq!(results[&0], refusal(Errno::EIO, "broken"));
        assert_eq!(results[&1], refusal(Errno::ENOMEM, ""));
        assert_eq!(results[&2], refusal(Errno::EIO, "bad"));
        assert_eq!(results[&3], refusal(Errno::ENOSPC, "hm"));
        assert_eq!(results[&4], refusal(Errno::EINVAL, ""));
        assert_eq!(results[&5], refusal(Errno::EIO, "first"));
        assert!(matches!(&results[&6], Err(refusal) if refusal.message.len() == 1024));
    }
}

/// What a reply says in the only context that there is.
fn extents(extents: &[(u64, u64)]) -> Result<Answer, Refusal> {
    let extents = extents.iter().map(|&(len, flags)| Extent { len, flags });
    Ok(Answer::Extents(vec![extents.collect()]))
}

#[test]
fn extents_are_told() {
    let status = request(Command::BLOCK_STATUS, 0, 4096);
    let results = Exchange::new(Structured, &[status; 3])
        .status(0, true, CONTEXT, &[(4096, 3)])
        .status(1, false, CONTEXT, &[(512, 1), (512, 2), (9999, 0)])
        .done(1)
        .simple(2, 22, b"")
        .results();
    assert_eq!(results[&0], extents(&[(4096, 3)]));
    assert_eq!(results[&1], extents(&[(512, 1), (512, 2), (9999, 0)]));
    assert_eq!(results[&2], refusal(Errno::EINVAL, ""));
}

#[test]
fn extended_replies_tell_extents_of_any_length() {
    let long = 5 << 40;
    let status = request(Command::BLOCK_STATUS, 1 << 40, long);
    let trim = request(Command::TRIM, 7, long);
    let results = Exchange::new(Extended, &[status, status, trim])
        .long_status(0, true, CONTEXT, &[(long, 3)])
        .done(2)
        .long_status(1, true, CONTEXT, &[(1 << 33, 1 << 63), (512, 2), (u64::MAX, 0)])
        .results();
    assert_eq!(results[&0], extents(&[(long, 3)]));
    assert_eq!(results[&1], extents(&[(1 << 33, 1 << 63), (512, 2), (u64::MAX, 0)]));
    assert_eq!(results[&2], Ok(Answer::Done));
}

/// A transmission with these contexts, and what it says to the replies to one block status.
fn status_with(
    contexts: &[u32],
    chunks: &[(u32, bool, usize)],
) -> Result<Option<Completion>, ReplyError> {
    let mut transmission = Transmission::new(Structured, contexts.to_vec());
    let cookie = transmission.start(request(Command::BLOCK_STATUS, 0, 1 << 30), 0).cookie;
    for &(id, done, count) in chunks {
        let flags = ChunkFlags::NONE.with_if(done, ChunkFlags::DONE);
        let len = 4 + 8 * count as u32;
        let header = ChunkHeader { flags, kind: ChunkType::BLOCK_STATUS, cookie, len };
        let extents = [0, 0, 2, 0, 0, 0, 0, id as u8].repeat(count);
        let chunk = [&header.encode()[..], &id.to_be_bytes(), &extents].concat();
        assert_eq!(transmission.receive(&chunk)?, chunk.len());
    }
    Ok(transmission.pop())
}

#[test]
fn every_context_has_its_own_extents_in_the_callers_order() {
    let told = status_with(&[5, 3], &[(3, false, 2), (5, true, 1)]).unwrap().unwrap();
    let of = |id, count| vec![Extent { len: 512, flags: id }; count];
    assert_eq!(told.result, Ok(Answer::Extents(vec![of(5, 1), of(3, 2)])));
    for (chunks, error) in [
        (&[(3, true, 1)][..], ReplyError::NoExtent),
        (&[(3, false, 1), (3, true, 1)], ReplyError::RepeatedContext),
        (&[(3, false, 1), (4, true, 1)], ReplyError::Context(4)),
    ] {
        assert_eq!(status_with(&[5, 3], chunks), Err(error), "{chunks:?}");
    }
}

#[test]
fn a_server_cannot_make_its_client_keep_extents_without_bounds() {
    let told = status_with(&[5, 3], &[(5, false, 1 << 19), (3, true, 9)]).unwrap().unwrap();
    let Ok(Answer::Extents(extents)) = told.result else { panic!("{told:?}") };
    assert_eq!((extents[0].len(), extents[1].len()), (1 << 18, 1));
}

#[test]
fn only_writes_carry_the_flag_of_a_payload_and_only_in_extended_headers() {
    for mode in [Simple, Structured, Extended] {
        for command in [Command::WRITE, Command::READ, Command::WRITE_ZEROES] {
            let header = Transmission::new(mode, Vec::new()).start(request(command, 0, 8), 0);
            let expected = mode == Extended && command == Command::WRITE;
            assert_eq!(header.flags.contains(CommandFlags::PAYLOAD_LEN), expected, "{command}");
        }
    }
}

#[test]
fn every_violation_of_extended_replies_is_named() {
    use ReplyError as E;
    let status = request(Command::BLOCK_STATUS, 0, 4096);
    let extended = |request| Exchange::new(Extended, &[request]);
    let structured = |request| Exchange::new(Structured, &[request]);
    let len = |kind, len| E::ChunkLength { kind, len };
    let kind = ChunkType::BLOCK_STATUS_EXT;
    let of_other_mode = |mode, other| {
        let mut exchange = Exchange::new(mode, &[read(0, 8)]);
        exchange.mode = other;
        let sent = exchange.data(0, true, 0, &[0; 8]);
        Exchange { mode, ..sent }
    };
    let mut elsewhere = extended(read(8, 8));
    elsewhere.requests[0].offset = 0;
    let mut elsewhere = elsewhere.data(0, true, 8, &[0; 8]);
    elsewhere.requests[0].offset = 8;
    let mut endless = extended(read(0, 8));
    let header = ExtendedChunkHeader {
        flags: ChunkFlags::DONE,
        kind: ChunkType::OFFSET_DATA,
        cookie: endless.cookies[0],
        offset: 0,
        len: (1 << 32) + 16,
    };
    endless.replies.put_slice(&header.encode());
    let count = |count: u32| [&CONTEXT.to_be_bytes()[..], &count.to_be_bytes(), &[1; 32]].concat();
    let table = [
        (extended(read(0, 8)).simple(0, 0, &[0; 8]), E::Mode(0x6744_6698)),
        (extended(status).simple(0, 22, b""), E::Mode(0x6744_6698)),
        (of_other_mode(Extended, Structured), E::Mode(0x668e_33ef)),
        (of_other_mode(Structured, Extended), E::Mode(0x6e8a_278c)),
        (of_other_mode(Simple, Extended), E::Mode(0x6e8a_278c)),
        (elsewhere, E::Offset(0)),
        (endless, len(ChunkType::OFFSET_DATA, (1 << 32) + 16)),
        (
            structured(status).long_status(0, true, CONTEXT, &[(512, 0)]),
            E::Chunk { kind, command: Command::BLOCK_STATUS },
        ),
        (extended(status).chunk(0, kind, true, &count(1)), E::ExtentCount),
        (extended(status).chunk(0, kind, true, &count(3)), E::ExtentCount),
        (extended(status).chunk(0, kind, true, &count(u32::MAX)), E::ExtentCount),
        (extended(status).chunk(0, kind, true, &count(2)[..39]), len(kind, 39)),
        (extended(status).long_status(0, true, CONTEXT, &[]), len(kind, 8)),
        (extended(status).long_status(0, true, CONTEXT, &[(512, 0), (0, 0)]), E::EmptyExtent),
        (extended(status).long_status(0, true, 6, &[(512, 0)]), E::Context(6)),
        (extended(status).done(0), E::NoExtent),
        (extended(read(8, 8)).data(0, true, 7, &[0; 8]), E::OutsideRequest),
        (extended(read(8, 8)).hole(0, true, 12, 5), E::OutsideRequest),
        (extended(read(0, 8)).data(0, true, 0, &[0; 7]), E::Incomplete),
    ];
    for (exchange, expected) in table {
        assert_eq!(exchange.violation(), expected);
    }
}

/// Among them overruns of every kind: a chunk may not reach beyond its request.
#[test]
fn every_violation_is_named() {
    use ReplyError as E;
    let write = request(Command::WRITE, 0, 8);
    let status = request(Command::BLOCK_STATUS, 0, 4096);
    let structured = |request| Exchange::new(Structured, &[request]);
    let plain = |request| Exchange::new(Simple, &[request]);
    let mut wrong_magic = structured(read(0, 8));
    wrong_magic.replies.put_u64(0x6744_6699_0000_0000);
    let mut wrong_cookie = structured(write).simple(0, 0, b"");
    wrong_cookie.replies[8] ^= 1;
    let twice = structured(write).simple(0, 0, b"").simple(0, 0, b"");
    let cookie = twice.cookies[0];
    let flipped = cookie ^ 1 << 56;
    let len = |kind, len| E::ChunkLength { kind, len };
    let offset_error = |offset: u64| {
        structured(read(8, 8)).chunk(
            0,
            ChunkType::ERROR_OFFSET,
            true,
            &[&error_payload(5, 0, b"")[..], &offset.to_be_bytes()].concat(),
        )
    };
    let table = [
        (wrong_magic, E::Magic(0x6744_6699)),
        (wrong_cookie, E::Cookie(flipped)),
        (twice, E::Cookie(cookie)),
        (structured(read(0, 8)).simple(0, 0, &[0; 8]), E::Simple(Command::READ)),
        (structured(read(0, 8)).simple(0, 5, &[]), E::Simple(Command::READ)),
        (structured(write).error(0, false, 5, b"").simple(0, 0, b""), E::Simple(Command::WRITE)),
        (plain(read(0, 8)).data(0, true, 0, &[0; 8]), E::Mode(0x668e_33ef)),
        (
            structured(write).data(0, true, 0, &[0; 8]),
            E::Chunk { kind: ChunkType::OFFSET_DATA, command: Command::WRITE },
        ),
        (
            structured(read(0, 8)).status(0, true, CONTEXT, &[(1, 0)]),
            E::Chunk { kind: ChunkType::BLOCK_STATUS, command: Command::READ },
        ),
        (
            structured(read(0, 8)).chunk(0, ChunkType(99), true, &[]),
            E::Chunk { kind: ChunkType(99), command: Command::READ },
        ),
        (structured(read(0, 8)).data(0, true, 0, b""), len(ChunkType::OFFSET_DATA, 8)),
        (
            structured(read(0, 8)).chunk(0, ChunkType::OFFSET_HOLE, true, &[0; 13]),
            len(ChunkType::OFFSET_HOLE, 13),
        ),
        (structured(write).chunk(0, ChunkType::NONE, true, b"x"), len(ChunkType::NONE, 1)),
        (structured(write).chunk(0, ChunkType::NONE, false, b""), E::EmptyNotDone),
        (structured(read(0, 8)).data(0, true, 0, &[0; 9]), E::OutsideRequest),
        (structured(read(8, 8)).data(0, true, 7, &[0; 8]), E::OutsideRequest),
        (structured(read(8, 8)).data(0, true, u64::MAX, &[0; 8]), E::OutsideRequest),
        (structured(read(8, 8)).hole(0, true, 12, 5), E::OutsideRequest),
        (structured(read(8, 8)).hole(0, true, 8, u32::MAX), E::OutsideRequest),
        (structured(read(8, 8)).hole(0, true, 8, 0), E::EmptyHole),
        (structured(read(0, 8)).data(0, false, 0, &[0; 4]).data(0, true, 3, &[0; 4]), E::Overlap),
        (structured(read(0, 8)).data(0, false, 4, &[0; 4]).hole(0, true, 2, 4), E::Overlap),
        (structured(read(0, 8)).data(0, true, 0, &[0; 7]), E::Incomplete),
        (structured(read(0, 8)).data(0, false, 1, &[0; 7]).done(0), E::Incomplete),
        (structured(read(0, 8)).done(0), E::Incomplete),
        (structured(status).status(0, true, CONTEXT, &[]), len(ChunkType::BLOCK_STATUS, 4)),
        (
            structured(status).chunk(0, ChunkType::BLOCK_STATUS, true, &[0; 13]),
            len(ChunkType::BLOCK_STATUS, 13),
        ),
        (structured(status).status(0, true, CONTEXT, &[(0, 0)]), E::EmptyExtent),
        (structured(status).status(0, true, CONTEXT, &[(512, 0), (0, 0)]), E::EmptyExtent),
        (structured(status).status(0, true, CONTEXT + 1, &[(512, 0)]), E::Context(CONTEXT + 1)),
        (
            structured(status).status(0, false, CONTEXT, &[(512, 0)]).status(
                0,
                true,
                CONTEXT,
                &[(512, 0)],
            ),
            E::RepeatedContext,
        ),
        (structured(status).done(0), E::NoExtent),
        (structured(status).simple(0, 0, b""), E::NoExtent),
        (structured(write).error(0, true, 0, b""), E::ErrorWithoutError),
        (structured(write).chunk(0, ChunkType::ERROR, true, &[0; 5]), len(ChunkType::ERROR, 5)),
        (
            structured(write).chunk(0, ChunkType::ERROR, true, &error_payload(5, 3, b"ab")),
            E::ErrorText,
        ),
        (
            structured(write).chunk(0, ChunkType::ERROR, true, &error_payload(5, 1, b"ab")),
            E::ErrorText,
        ),
        (
            structured(read(0, 8)).chunk(0, ChunkType(0x8fff), true, &error_payload(5, 9, b"ab")),
            E::ErrorText,
        ),
        (offset_error(7), E::ErrorOffset),
        (offset_error(16), E::ErrorOffset),
    ];
    for (exchange, expected) in table {
        assert_eq!(exchange.violation(), expected);
    }
}

#[test]
fn a_chunk_that_announces_more_than_any_error_needs_is_refused_before_it_comes() {
    let mut exchange = Exchange::new(Structured, &[read(0, 8)]);
    let header = ChunkHeader {
        flags: ChunkFlags::DONE,
        kind: ChunkType::ERROR,
        cookie: exchange.cookies[0],
        len: u32::MAX,
    };
    exchange.replies.put_slice(&header.encode());
    let expected = ReplyError::ChunkLength { kind: ChunkType::ERROR, len: u32::MAX.into() };
    assert_eq!(exchange.violation(), expected);
}

#[test]
fn a_read_in_too_many_pieces_is_refused() {
    let mut exchange = Exchange::new(Structured, &[read(0, 20_000)]);
    for index in 0..5000u64 {
        exchange = exchange.data(0, false, 2 + 2 * index, b"x");
    }
    assert_eq!(exchange.run(usize::MAX, false).1, Some(ReplyError::TooManyChunks));
}

#[test]
fn what_came_whole_before_a_violation_is_still_told() {
    let mut exchange =
        Exchange::new(Structured, &[request(Command::WRITE, 0, 8); 2]).simple(0, 0, b"");
    exchange.replies.put_u32(0);
    let (completions, error) = exchange.run(usize::MAX, false);
    assert_eq!(error, Some(ReplyError::Magic(0)));
    assert_eq!(completions.len(), 1);
}

proptest! {
    #[test]
    fn a_read_cut_anywhere_and_sent_in_any_order_is_put_together(
        cuts in proptest::collection::btree_set(1u32..200, 0..12),
        order in any::<u64>(),
        hole in 0usize..14,
        piece in 1usize..300,
        direct in any::<bool>(),
        mode in prop_oneof![Just(Structured), Just(Extended)],
    ) {
        let mut content: Vec<u8> = (0..200u32).map(|i| (i * 7 + 1) as u8).collect();
        let bounds: Vec<u32> = [0].into_iter().chain(cuts).chain([200]).collect();
        let mut parts: Vec<(usize, u32, u32)> =
            bounds.windows(2).enumerate().map(|(i, pair)| (i, pair[0], pair[1])).collect();
        parts.sort_by_key(|part| (part.0 as u64 + 1).wrapping_mul(order | 1));
        let mut exchange = Exchange::new(mode, &[read(5000, 200)]);
        for (index, start, end) in parts {
            let offset = 5000 + u64::from(start);
            let range = start as usize..end as usize;
            exchange = if index == hole {
                content[range].fill(0);
                exchange.hole(0, false, offset, end - start)
            } else {
                exchange.data(0, false, offset, &content[range])
            };
        }
        let (completions, error) = exchange.done(0).run(piece, direct);
        prop_assert_eq!(error, None);
        prop_assert_eq!(&completions[0].result, &bytes(&content));
    }

    #[test]
    fn no_bytes_make_the_decoder_panic(
        kind in prop_oneof![0u16..7, 0x8000u16..0x8004, any::<u16>()],
        index in 0usize..3,
        done in any::<bool>(),
        payload in proptest::collection::vec(any::<u8>(), 0..64),
        tail in proptest::collection::vec(any::<u8>(), 0..64),
        mode in prop_oneof![Just(Structured), Just(Extended)],
    ) {
        let requests =
            [read(0, 64), request(Command::WRITE, 0, 64), request(Command::BLOCK_STATUS, 0, 64)];
        let mut exchange =
            Exchange::new(mode, &requests).chunk(index, ChunkType(kind), done, &payload);
        exchange.replies.extend_from_slice(&tail);
        let whole = exchange.run(usize::MAX, false);
        prop_assert_eq!(&whole, &exchange.run(1, false));
        prop_assert_eq!(&whole, &exchange.run(3, true));
    }
}
