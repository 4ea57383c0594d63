//! The handshake, seen by a client that knows the protocol, and by one that does not.

mod server_support;

use std::time::Duration;

use brep_block::Memory;
use brep_nbd::proto::wire::{InfoType, OptionCode, OptionHeader, ReplyType};
use server_support::{Fixture, SIZE, info_data, meta_data, option_bytes};

/// What becomes of a malformed option.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Expect {
    Dropped,
    /// Refused with this error; the connection goes on.
    Refused(ReplyType),
}

fn option_header(option: OptionCode, len: u32) -> Vec<u8> {
    OptionHeader { option, len }.encode().to_vec()
}

/// The rows of the table of malformed input that concern options.
fn malformed_options() -> Vec<(&'static str, Vec<u8>, Expect)> {
    use Expect::{Dropped, Refused};
    let option = option_bytes;
    let long = "x".repeat(4097);
    let mut wrong_magic = option(OptionCode::LIST, &[]);
    wrong_magic[7] ^= 1;
    let info = info_data("disk", &[]);
    let meta = meta_data("disk", &["base:allocation"]);
    let claims = |export: u32| [&export.to_be_bytes()[..], &[0; 6]].concat();
    vec![
        ("wrong option magic", wrong_magic, Dropped),
        ("an option longer than 32 MiB", option_header(OptionCode(99), (32 << 20) + 1), Dropped),
        (
            "an export name longer than 4096",
            option(OptionCode::EXPORT_NAME, long.as_bytes()),
            Dropped,
        ),
        ("an unknown export name", option(OptionCode::EXPORT_NAME, b"nobody"), Dropped),
        ("an export name that is not UTF-8", option(OptionCode::EXPORT_NAME, b"\xff"), Dropped),
        (
            "GO without a count",
            option(OptionCode::GO, &info[..info.len() - 1]),
            Refused(ReplyType::ERR_INVALID),
        ),
        ("GO without anything", option(OptionCode::GO, &[]), Refused(ReplyType::ERR_INVALID)),
        (
            "GO with a name longer than its data",
            option(OptionCode::GO, &claims(u32::MAX)),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "GO with trailing bytes",
            option(OptionCode::GO, &[&info[..], b"x"].concat()),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "GO with a name longer than 4096",
            option(OptionCode::GO, &info_data(&long, &[])),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "GO with a NUL in the name",
            option(OptionCode::GO, &info_data("a\0b", &[])),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "GO to an unknown export",
            option(OptionCode::GO, &info_data("nobody", &[])),
            Refused(ReplyType::ERR_UNKNOWN),
        ),
        (
            "INFO on an unknown export",
            option(OptionCode::INFO, &info_data("nobody", &[])),
            Refused(ReplyType::ERR_UNKNOWN),
        ),
        ("LIST with data", option(OptionCode::LIST, b"x"), Refused(ReplyType::ERR_INVALID)),
        (
            "STRUCTURED_REPLY with data",
            option(OptionCode::STRUCTURED_REPLY, b"x"),
            Refused(ReplyType::ERR_INVALID),
        ),
        ("STARTTLS", option(OptionCode::STARTTLS, &[]), Refused(ReplyType::ERR_UNSUP)),
        ("STARTTLS with data", option(OptionCode::STARTTLS, b"x"), Refused(ReplyType::ERR_INVALID)),
        ("PEEK_EXPORT", option(OptionCode::PEEK_EXPORT, &[]), Refused(ReplyType::ERR_UNSUP)),
        (
            "EXTENDED_HEADERS with data",
            option(OptionCode::EXTENDED_HEADERS, b"x"),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "an unknown option with data",
            option(OptionCode(0x4242), &[7; 100_000]),
            Refused(ReplyType::ERR_UNSUP),
        ),
        (
            "an unknown option of several MiB",
            option(OptionCode(0x4242), &vec![7; 5 << 20]),
            Refused(ReplyType::ERR_UNSUP),
        ),
        (
            "a private option nobody knows",
            option(OptionCode(0x6272_6501), b"x"),
            Refused(ReplyType::ERR_UNSUP),
        ),
        (
            "GO longer than any GO can be",
            option(OptionCode::GO, &vec![0; 200_000]),
            Refused(ReplyType::ERR_TOO_BIG),
        ),
        (
            "LIST with a MiB of data",
            option(OptionCode::LIST, &vec![0; 1 << 20]),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "SET_META_CONTEXT before STRUCTURED_REPLY",
            option(OptionCode::SET_META_CONTEXT, &meta),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "LIST_META_CONTEXT on an unknown export",
            option(OptionCode::LIST_META_CONTEXT, &meta_data("nobody", &[])),
            Refused(ReplyType::ERR_UNKNOWN),
        ),
        (
            "LIST_META_CONTEXT with fewer queries than counted",
            option(OptionCode::LIST_META_CONTEXT, &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "LIST_META_CONTEXT with a query longer than its data",
            option(OptionCode::LIST_META_CONTEXT, &meta[..meta.len() - 1]),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "LIST_META_CONTEXT with trailing bytes",
            option(OptionCode::LIST_META_CONTEXT, &[&meta[..], b"x"].concat()),
            Refused(ReplyType::ERR_INVALID),
        ),
        (
            "LIST_META_CONTEXT with a name longer than 4096",
            option(OptionCode::LIST_META_CONTEXT, &meta_data(&long, &[])),
            Refused(ReplyType::ERR_INVALID),
        ),
    ]
}

#[tokio::test]
async fn a_malformed_option_is_refused_or_ends_its_connection_only() {
    let fixture = Fixture::memory().await;
    for (name, bytes, expect) in malformed_options() {
        let mut raw = fixture.client().await;
        raw.send(&bytes).await;
        match expect {
            Expect::Dropped => assert!(raw.is_closed().await, "{name}"),
            Expect::Refused(kind) => {
                let (header, text) = raw.option_reply().await;
                assert_eq!(header.kind, kind, "{name}");
                assert!(!text.is_empty(), "{name}: no text");
                let outcome = raw.outcome(OptionCode::LIST, &[]).await;
                assert_eq!(outcome, ReplyType::ACK, "{name}: the connection is out of step");
            }
        }
    }
}

#[tokio::test]
async fn client_flags_that_were_not_offered_end_the_connection() {
    let fixture = Fixture::memory().await;
    for flags in [4_u32, 0x8000_0003] {
        let mut raw = fixture.connect().await;
        raw.greeting().await;
        raw.send(&flags.to_be_bytes()).await;
        assert!(raw.is_closed().await, "{flags:#x}");
    }
}

#[tokio::test]
async fn a_client_without_fixed_newstyle_may_only_name_an_export() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.connect().await;
    raw.greeting().await;
    raw.send(&[0; 4]).await;
    raw.send(&option_bytes(OptionCode::LIST, &[])).await;
    assert!(raw.is_closed().await);

    let mut raw = fixture.connect().await;
    raw.greeting().await;
    raw.send(&[0; 4]).await;
    raw.send(&option_bytes(OptionCode::EXPORT_NAME, b"disk")).await;
    let answer = raw.receive(8 + 2 + 124).await;
    assert_eq!(answer[..8], SIZE.to_be_bytes());
    assert!(answer[10..].iter().all(|byte| *byte == 0));
    assert_eq!(raw.read(0, 10).await, [0; 10]);
}

#[tokio::test]
async fn export_name_is_answered_without_padding_if_both_sides_agree() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    raw.send(&option_bytes(OptionCode::EXPORT_NAME, b"disk")).await;
    let answer = raw.receive(10).await;
    assert_eq!(answer, [&SIZE.to_be_bytes()[..], &[0x0c, 0x6d]].concat());
    assert_eq!(raw.read(SIZE - 1, 1).await, [0]);
}

#[tokio::test]
async fn go_tells_size_flags_names_and_block_sizes() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    raw.structured().await;
    let wanted = [InfoType::NAME.0, InfoType::DESCRIPTION.0, InfoType::BLOCK_SIZE.0, 4711];
    let info = raw.option(OptionCode::INFO, &info_data("disk", &wanted)).await;
    let go = raw.option(OptionCode::GO, &info_data("disk", &wanted)).await;
    assert_eq!(info, go, "the same question has the same answer");
    let expected: Vec<(ReplyType, Vec<u8>)> = vec![
        (ReplyType::INFO, [&[0, 0][..], &SIZE.to_be_bytes(), &[0x0c, 0xed]].concat()),
        (ReplyType::INFO, vec![0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0]),
        (ReplyType::INFO, b"\0\x01disk".to_vec()),
        (ReplyType::INFO, b"\0\x02a disk".to_vec()),
        (ReplyType::ACK, vec![]),
    ];
    assert_eq!(go, expected);
}

#[tokio::test]
async fn a_read_only_export_says_so() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    let go = raw.option(OptionCode::GO, &info_data("read-only", &[])).await;
    assert_eq!(go[0].1[10..], [0x04, 0x0f]);
}

#[tokio::test]
async fn repeated_and_unknown_info_requests_do_no_harm() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    let replies = raw.option(OptionCode::GO, &info_data("disk", &[1, 1, 1, 9999])).await;
    let kinds: Vec<_> = replies.iter().map(|(kind, _)| *kind).collect();
    assert_eq!(kinds, [ReplyType::INFO, ReplyType::INFO, ReplyType::INFO, ReplyType::ACK]);
}

#[tokio::test]
async fn the_list_has_every_export_with_its_description() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    let list = raw.option(OptionCode::LIST, &[]).await;
    let expected = vec![
        (ReplyType::SERVER, b"\0\0\0\x04diska disk".to_vec()),
        (ReplyType::SERVER, b"\0\0\0\x09read-only".to_vec()),
        (ReplyType::ACK, vec![]),
    ];
    assert_eq!(list, expected);
}

#[tokio::test]
async fn abort_is_acknowledged_and_ends_the_connection_even_with_data() {
    let fixture = Fixture::memory().await;
    for len in [0, 10, 200_000] {
        let mut raw = fixture.client().await;
        assert_eq!(raw.outcome(OptionCode::ABORT, &vec![1; len]).await, ReplyType::ACK);
        assert!(raw.is_closed().await, "{len}");
    }
}

#[tokio::test]
async fn structured_replies_can_be_agreed_on_once() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    raw.structured().await;
    let again = raw.outcome(OptionCode::STRUCTURED_REPLY, &[]).await;
    assert_eq!(again, ReplyType::ERR_INVALID);
    raw.go("disk").await;
}

#[tokio::test]
async fn meta_contexts_are_listed_by_wildcard_and_selected_by_name() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    raw.structured().await;
    let listed = (ReplyType::META_CONTEXT, b"\0\0\0\0base:allocation".to_vec());
    let ack = (ReplyType::ACK, vec![]);
    let long = format!("base:{}", "x".repeat(5000));
    let lists: [(&[&str], bool); 6] = [
        (&[], true),
        (&["base:"], true),
        (&["base:allocation", "base:allocation"], true),
        (&["other:", "base:alloc", &long], false),
        (&[&long, "base:allocation"], true),
        (&["qemu:dirty-bitmap:"], false),
    ];
    for (queries, found) in lists {
        let replies = raw.option(OptionCode::LIST_META_CONTEXT, &meta_data("disk", queries)).await;
        let expected = if found { vec![listed.clone(), ack.clone()] } else { vec![ack.clone()] };
        assert_eq!(replies, expected, "{queries:?}");
    }
    let selections: [(&[&str], usize); 4] =
        [(&[], 0), (&["base:"], 0), (&["base:allocation", "base:allocation"], 1), (&["x:y"], 0)];
    for (queries, count) in selections {
        let replies = raw.option(OptionCode::SET_META_CONTEXT, &meta_data("disk", queries)).await;
        assert_eq!(replies.len(), count + 1, "{queries:?}");
    }
}

#[tokio::test]
async fn the_empty_name_opens_the_only_export() {
    let fixture = Fixture::device(Memory::new("memory", SIZE)).await;
    let mut raw = fixture.client().await;
    let replies = raw.option(OptionCode::GO, &info_data("", &[InfoType::NAME.0])).await;
    assert_eq!(replies[2].1, b"\0\x01disk");
}

#[tokio::test]
async fn the_empty_name_opens_nothing_where_there_are_several() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    let outcome = raw.outcome(OptionCode::GO, &info_data("", &[])).await;
    assert_eq!(outcome, ReplyType::ERR_UNKNOWN);
}

#[tokio::test]
async fn a_flood_of_options_is_cut_off() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.client().await;
    for _ in 0..1024 {
        assert_eq!(raw.outcome(OptionCode(77), b"x").await, ReplyType::ERR_UNSUP);
    }
    raw.send(&option_bytes(OptionCode(77), b"x")).await;
    assert!(raw.is_closed().await);
}

#[tokio::test]
async fn garbage_ends_its_connection_and_no_other() {
    let fixture = Fixture::memory().await;
    let mut good = fixture.session(false).await;
    let mut state = 1_u64;
    for _ in 0..200 {
        let mut raw = fixture.connect().await;
        let mut bytes = vec![0, 0, 0, 3];
        bytes.extend((0..500).map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (state >> 56) as u8
        }));
        raw.send(&bytes).await;
        raw.greeting().await;
        assert!(raw.is_closed().await);
    }
    assert_eq!(good.read(0, 4).await, [0; 4]);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_never_speaks_is_disconnected_after_ten_seconds() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.connect().await;
    raw.greeting().await;
    let start = tokio::time::Instant::now();
    assert!(raw.is_closed().await);
    let waited = start.elapsed();
    assert!(waited >= Duration::from_secs(9) && waited < Duration::from_secs(12), "{waited:?}");
}

#[tokio::test(start_paused = true)]
async fn a_client_that_speaks_slowly_cannot_stretch_the_deadline() {
    let fixture = Fixture::memory().await;
    let mut raw = fixture.connect().await;
    raw.greeting().await;
    let start = tokio::time::Instant::now();
    for byte in option_header(OptionCode(99), 1000).into_iter().chain([0; 1000]) {
        tokio::time::sleep(Duration::from_secs(1)).await;
        use tokio::io::AsyncWriteExt;
        if raw.stream.write_all(&[byte]).await.is_err() {
            break;
        }
    }
    assert!(start.elapsed() < Duration::from_secs(13));
}

#[tokio::test]
async fn a_connection_that_ends_at_any_point_of_the_handshake_leaves_nothing_behind() {
    let fixture = Fixture::memory().await;
    let script: Vec<u8> = [
        vec![0, 0, 0, 3],
        option_bytes(OptionCode::STRUCTURED_REPLY, &[]),
        option_bytes(OptionCode::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"])),
        option_bytes(OptionCode::GO, &info_data("disk", &[3])),
    ]
    .concat();
    for len in 0..script.len() {
        let mut raw = fixture.connect().await;
        raw.send(&script[..len]).await;
        drop(raw);
    }
    server_support::until(|| fixture.server.connections().is_empty().then_some(())).await;
    assert_eq!(fixture.server.bytes_in_flight(), 0);
}
