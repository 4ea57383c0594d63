//! What servers have done to other clients, and do not do to this one. The numbers are those of the
//! public list of vulnerabilities.

mod client_support;

use brep_nbd::proto::client::{Goal, HandshakeError, ReplyError};
use brep_nbd::proto::wire::{
    ChunkType, Command, OptionCode,
    TransmissionMode::{Extended, Structured},
};
use client_support::handshake::{Script, error, options, outcome};
use client_support::replies::{CONTEXT, Exchange, read, request};

/// CVE-2023-5215: a size that would be negative as an offset with a sign.
#[test]
fn cve_2023_5215_a_size_that_would_be_negative_is_refused() {
    let of = |size| Script::modern().structured().info_export(size, 1).ack(OptionCode::GO);
    for size in [1 << 63, (1 << 63) + 512, u64::MAX] {
        let refused = error(&options(Goal::Transmit), &of(size));
        assert_eq!(refused, HandshakeError::SizeTooLarge(size));
    }
    let largest = (1 << 63) - 1;
    let export = outcome(&options(Goal::Transmit), &of(largest)).export.expect("an export");
    assert_eq!(export.size, largest);
}

/// CVE-2023-5871: a block status that is none ended the process.
#[test]
fn cve_2023_5871_a_malformed_block_status_ends_the_connection_only() {
    let status = request(Command::BLOCK_STATUS, 0, 4096);
    for len in (0..64).filter(|len| len % 8 != 4 || *len < 12) {
        let kind = ChunkType::BLOCK_STATUS;
        let payload = [&CONTEXT.to_be_bytes()[..], &[1; 60]].concat();
        let exchange = Exchange::new(Structured, &[status]).chunk(0, kind, true, &payload[..len]);
        assert_eq!(
            exchange.violation(),
            ReplyError::ChunkLength { kind, len: len as u64 },
            "{len}"
        );
    }
    for extents in [&[(0, 0)][..], &[(4096, 0), (0, 0)]] {
        let exchange = Exchange::new(Structured, &[status]).status(0, true, CONTEXT, extents);
        assert_eq!(exchange.violation(), ReplyError::EmptyExtent);
    }
}

/// libnbd before 1.0.3 wrote what a structured reply brought beyond the end of the buffer.
#[test]
fn a_chunk_that_overruns_its_read_is_refused_and_none_of_it_kept() {
    for mode in [Structured, Extended] {
        let of = |offset, len| Exchange::new(mode, &[read(offset, len)]);
        for exchange in [
            of(8, 8).data(0, true, 8, &[1; 9]),
            of(8, 8).data(0, true, 15, &[1; 2]),
            of(8, 8).data(0, true, 7, &[1; 8]),
            of(8, 8).data(0, true, u64::MAX - 3, &[1; 8]),
            of(8, 8).hole(0, true, 8, 9),
            of(8, 8).hole(0, true, 15, u32::MAX),
            of(8, 8).hole(0, true, u64::MAX, 1),
        ] {
            assert_eq!(exchange.violation(), ReplyError::OutsideRequest);
            // Whether it comes in one piece or not, and into the buffer of its read or another one.
            for (piece, direct) in [(usize::MAX, false), (1, false), (usize::MAX, true), (3, true)]
            {
                assert_eq!(exchange.run(piece, direct).0, [], "something was handed over");
            }
        }
    }
}
