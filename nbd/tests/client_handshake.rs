//! The client's handshake as a state machine: every server that exists, and every way in which
//! one can be wrong, whole and cut into single bytes.

mod client_support;

use brep_nbd::proto::client::{
    BlockSizes, Goal, Handshake, HandshakeError, HandshakeOptions, Progress,
};
use brep_nbd::proto::wire::{
    INIT_MAGIC, OLDSTYLE_MAGIC, OptionCode, OptionHeader, OptionReplyHeader, PRIVATE_OPTION_BASE,
    PRIVATE_REPLY, ReplyType, TransmissionFlags, TransmissionMode,
};
use bytes::{Bytes, BytesMut};
use client_support::handshake::{
    Script, asked, context, error, ids, listed, options, outcome, run,
};
use proptest::prelude::*;

const PRIVATE: OptionCode = OptionCode(PRIVATE_OPTION_BASE + 1);

fn qemu() -> Script {
    Script::modern()
        .structured()
        .info_export(1 << 30, 0x0ded)
        .info_sizes(512, 4096, 1 << 25)
        .reply(OptionCode::GO, ReplyType::INFO, b"\0\x01canon")
        .reply(OptionCode::GO, ReplyType::INFO, b"\0\x02a disk")
        .reply(OptionCode::GO, ReplyType::INFO, b"\x12\x34unknown")
        .ack(OptionCode::GO)
}

#[test]
fn a_modern_server_is_understood() {
    let script = qemu();
    let run = run(&options(Goal::Transmit), &script, usize::MAX);
    let outcome = run.outcome();
    let export = outcome.export.as_ref().expect("an export");
    assert_eq!((export.size, export.flags), (1 << 30, TransmissionFlags(0x0ded)));
    assert_eq!(export.block_sizes, BlockSizes { min: 512, preferred: 4096, max: 1 << 25 });
    assert_eq!(export.canonical_name.as_deref(), Some("canon"));
    assert_eq!(export.description.as_deref(), Some("a disk"));
    assert_eq!(outcome.mode, TransmissionMode::Structured);
    assert_eq!(ids(&outcome), [7]);
    let expected = [OptionCode::STRUCTURED_REPLY, OptionCode::SET_META_CONTEXT, OptionCode::GO];
    assert_eq!(asked(&run.sent), expected);
    assert_eq!(run.sent[..4], 3u32.to_be_bytes());
}

fn extended_options() -> HandshakeOptions {
    HandshakeOptions { mode_max: TransmissionMode::Extended, ..options(Goal::Transmit) }
}

/// Extended headers, the context, and up to the `GO`.
fn extended() -> Script {
    Script::modern()
        .ack(OptionCode::EXTENDED_HEADERS)
        .reply(OptionCode::SET_META_CONTEXT, ReplyType::META_CONTEXT, &context(7))
        .ack(OptionCode::SET_META_CONTEXT)
}

#[test]
fn extended_headers_make_structured_replies_needless() {
    let script = extended().info_export(1 << 30, 0x0ded).ack(OptionCode::GO);
    let run = run(&extended_options(), &script, usize::MAX);
    let outcome = run.outcome();
    assert_eq!((outcome.mode, ids(&outcome)), (TransmissionMode::Extended, vec![7]));
    let expected = [OptionCode::EXTENDED_HEADERS, OptionCode::SET_META_CONTEXT, OptionCode::GO];
    assert_eq!(asked(&run.sent), expected);
    for piece in 1..script.0.len() {
        assert_eq!(self::run(&extended_options(), &script, piece).outcome(), outcome, "{piece}");
    }
}

#[test]
fn without_extended_headers_structured_replies_are_asked_for_and_then_simple_ones() {
    let refused = |kind| Script::modern().reply(OptionCode::EXTENDED_HEADERS, kind, b"");
    for kind in [ReplyType::ERR_UNSUP, ReplyType::ERR_POLICY, ReplyType::ERR_INVALID] {
        let script = refused(kind).bytes(&qemu().0[18..]);
        let outcome = outcome(&extended_options(), &script);
        assert_eq!((outcome.mode, ids(&outcome)), (TransmissionMode::Structured, vec![7]));
    }
    let script = refused(ReplyType::ERR_UNSUP)
        .reply(OptionCode::STRUCTURED_REPLY, ReplyType::ERR_UNSUP, b"")
        .info_export(4096, 1)
        .ack(OptionCode::GO);
    assert_eq!(outcome(&extended_options(), &script).mode, TransmissionMode::Simple);
}

#[test]
fn after_extended_headers_an_export_is_not_asked_for_by_name() {
    let script = extended().reply(OptionCode::GO, ReplyType::ERR_UNSUP, b"");
    let error = error(&extended_options(), &script);
    assert_eq!(error, HandshakeError::Unsupported(OptionCode::GO));
}

#[test]
fn every_cut_of_the_stream_gives_the_same_outcome_and_leaves_what_follows() {
    let script = qemu().bytes(b"transmission");
    let options = options(Goal::Transmit);
    let whole = run(&options, &script, usize::MAX);
    assert_eq!(whole.rest[..], *b"transmission");
    for piece in 1..script.0.len() {
        let cut = run(&options, &script, piece);
        assert_eq!(cut.result, whole.result, "pieces of {piece}");
        assert_eq!(cut.sent, whole.sent, "pieces of {piece}");
        assert_eq!(cut.rest, whole.rest, "pieces of {piece}");
    }
    for end in 0..qemu().0.len() {
        let short = Script(BytesMut::from(&script.0[..end]));
        assert_eq!(
            run(&options, &short, usize::MAX).result,
            Ok(Progress::Input),
            "the first {end} bytes"
        );
    }
}

#[test]
fn a_server_without_structured_replies_is_not_asked_for_contexts() {
    let script = Script::modern()
        .reply(OptionCode::STRUCTURED_REPLY, ReplyType::ERR_UNSUP, b"no")
        .info_export(4096, 0x8d)
        .ack(OptionCode::GO);
    let run = run(&options(Goal::Transmit), &script, usize::MAX);
    let outcome = run.outcome();
    assert_eq!(asked(&run.sent), [OptionCode::STRUCTURED_REPLY, OptionCode::GO]);
    assert_eq!(outcome.mode, TransmissionMode::Simple);
    // DF means nothing without them.
    assert_eq!(outcome.export.expect("an export").flags, TransmissionFlags(0x0d));
}

#[test]
fn a_server_that_refuses_the_context_is_used_without_it() {
    let script = Script::modern()
        .ack(OptionCode::STRUCTURED_REPLY)
        .reply(OptionCode::SET_META_CONTEXT, ReplyType::META_CONTEXT, &context(1))
        .reply(OptionCode::SET_META_CONTEXT, ReplyType::ERR_TOO_BIG, b"")
        .info_export(4096, 1)
        .ack(OptionCode::GO);
    assert_eq!(outcome(&options(Goal::Transmit), &script).selected, []);
}

#[test]
fn without_go_the_export_is_looked_up_and_asked_for_by_name() {
    let plain = HandshakeOptions { mode_max: TransmissionMode::Simple, ..options(Goal::Transmit) };
    let no_go =
        |flags: u16| Script::greeting(flags).reply(OptionCode::GO, ReplyType::ERR_UNSUP, b"what?");
    let reply =
        |padding: usize| [&(1u64 << 20).to_be_bytes()[..], &[0, 5], &vec![0; padding]].concat();
    let list = |script: Script| {
        script
            .reply(OptionCode::LIST, ReplyType::SERVER, &listed("other", "x"))
            .reply(OptionCode::LIST, ReplyType::SERVER, &listed("vda", ""))
            .ack(OptionCode::LIST)
    };
    for (script, rest) in [
        (list(no_go(3)).bytes(&reply(0)).bytes(b"!"), "!"),
        (list(no_go(1)).bytes(&reply(124)).bytes(b"!"), "!"),
        (no_go(3).reply(OptionCode::LIST, ReplyType::ERR_POLICY, b"").bytes(&reply(0)), ""),
    ] {
        let run = run(&plain, &script, 1);
        let outcome = run.outcome();
        assert_eq!(outcome.export.expect("an export").size, 1 << 20);
        assert_eq!(run.rest, rest);
        let expected = [OptionCode::GO, OptionCode::LIST, OptionCode::EXPORT_NAME];
        assert_eq!(asked(&run.sent), expected);
    }
    let absent = no_go(3)
        .reply(OptionCode::LIST, ReplyType::SERVER, &listed("vdb", ""))
        .ack(OptionCode::LIST);
    assert_eq!(error(&plain, &absent), HandshakeError::NotListed("vda".into()));
}

#[test]
fn a_server_without_fixed_newstyle_is_asked_by_name_and_for_nothing_else() {
    let script = Script::greeting(0).bytes(&4096u64.to_be_bytes()).bytes(&[0, 1]).bytes(&[0; 124]);
    let run = run(&options(Goal::Transmit), &script, 7);
    assert_eq!(run.outcome().export.expect("one").size, 4096);
    assert_eq!(run.sent[..4], [0; 4]);
    assert_eq!(asked(&run.sent), [OptionCode::EXPORT_NAME]);
    let list = error(&options(Goal::List), &script);
    assert_eq!(list, HandshakeError::NotFixedNewstyle(OptionCode::LIST));
    let private = HandshakeOptions {
        private_options: vec![(PRIVATE, Bytes::new())],
        ..options(Goal::Transmit)
    };
    assert_eq!(error(&private, &script), HandshakeError::NotFixedNewstyle(PRIVATE));
}

#[test]
fn private_options_come_first_and_their_replies_are_kept() {
    let other = OptionCode(PRIVATE_OPTION_BASE + 2);
    let options = HandshakeOptions {
        private_options: vec![(PRIVATE, Bytes::from_static(b"token")), (other, Bytes::new())],
        mode_max: TransmissionMode::Simple,
        ..options(Goal::Transmit)
    };
    let script = Script::modern()
        .ack(PRIVATE)
        .reply(other, PRIVATE_REPLY, b"slot 3")
        .ack(other)
        .info_export(512, 1)
        .ack(OptionCode::GO);
    let run = run(&options, &script, 3);
    let outcome = run.outcome();
    assert_eq!(outcome.private_replies, [&b""[..], b"slot 3"]);
    assert_eq!(asked(&run.sent), [PRIVATE, other, OptionCode::GO]);
    assert!(run.sent.windows(5).any(|window| window == b"token"));
}

#[test]
fn a_private_option_alone_hands_the_connection_over() {
    let options = HandshakeOptions {
        private_options: vec![(PRIVATE, Bytes::from_static(b"hello"))],
        ..options(Goal::Private)
    };
    let script =
        Script::modern().reply(PRIVATE, PRIVATE_REPLY, b"welcome").ack(PRIVATE).bytes(b"link");
    let done = run(&options, &script, usize::MAX);
    assert_eq!(done.outcome().private_replies, [&b"welcome"[..]]);
    assert_eq!((asked(&done.sent), &done.rest[..]), (vec![PRIVATE], &b"link"[..]));
    let twice =
        Script::modern().reply(PRIVATE, PRIVATE_REPLY, b"1").reply(PRIVATE, PRIVATE_REPLY, b"2");
    assert_eq!(error(&options, &twice), HandshakeError::TooManyReplies(PRIVATE));
    let unknown = Script::modern().reply(PRIVATE, ReplyType::ERR_UNSUP, b"");
    assert_eq!(error(&options, &unknown), HandshakeError::Unsupported(PRIVATE));
    let policy = Script::modern().reply(PRIVATE, ReplyType::ERR_POLICY, b"stale\ntoken");
    let refused = error(&options, &policy);
    assert!(refused.to_string().contains("stale token"), "{refused}");
}

#[test]
fn listing_and_describing_end_with_an_abort() {
    let list = Script::modern()
        .reply(OptionCode::LIST, ReplyType::SERVER, &listed("", "default"))
        .reply(OptionCode::LIST, ReplyType::SERVER, &listed("vda", ""))
        .ack(OptionCode::LIST);
    let done = run(&options(Goal::List), &list, usize::MAX);
    let exports = done.outcome().exports;
    let found: Vec<_> = exports.iter().map(|e| (e.name.as_str(), e.description.as_str())).collect();
    assert_eq!(found, [("", "default"), ("vda", "")]);
    assert_eq!(asked(&done.sent), [OptionCode::LIST, OptionCode::ABORT]);

    let export_info = [&[0, 0][..], &512u64.to_be_bytes(), &[0, 3]].concat();
    let bitmap = [&[0; 4][..], b"qemu:dirty-bitmap:b"].concat();
    let describe = Script::modern()
        .ack(OptionCode::STRUCTURED_REPLY)
        .reply(OptionCode::LIST_META_CONTEXT, ReplyType::META_CONTEXT, &context(0))
        .reply(OptionCode::LIST_META_CONTEXT, ReplyType::META_CONTEXT, &bitmap)
        .ack(OptionCode::LIST_META_CONTEXT)
        .reply(OptionCode::INFO, ReplyType::INFO, &export_info)
        .ack(OptionCode::INFO);
    let done = run(&options(Goal::Describe), &describe, usize::MAX);
    assert_eq!(done.outcome().export.expect("one").size, 512);
    assert_eq!(done.outcome().contexts, ["base:allocation", "qemu:dirty-bitmap:b"]);
    assert_eq!(asked(&done.sent).last(), Some(&OptionCode::ABORT));
}

#[test]
fn contexts_of_the_callers_choice_are_selected() {
    let contexts = ["qemu:dirty-bitmap:b", "base:allocation", "qemu:dirty-bitmap:c"];
    let wanted = HandshakeOptions {
        contexts: contexts.map(String::from).to_vec(),
        ..options(Goal::Transmit)
    };
    let replies = |replies: &[(u32, &str)]| {
        let mut script = Script::modern().ack(OptionCode::STRUCTURED_REPLY);
        for (id, name) in replies {
            let select = [&id.to_be_bytes()[..], name.as_bytes()].concat();
            script = script.reply(OptionCode::SET_META_CONTEXT, ReplyType::META_CONTEXT, &select);
        }
        script.ack(OptionCode::SET_META_CONTEXT).info_export(512, 1).ack(OptionCode::GO)
    };
    // In the server's order, and only those that it has.
    let selected = outcome(&wanted, &replies(&[(9, contexts[1]), (0, contexts[0])])).selected;
    let selected: Vec<_> = selected.iter().map(|c| (c.id, c.name.as_str())).collect();
    assert_eq!(selected, [(9, contexts[1]), (0, contexts[0])]);
    for violation in [
        &[(9, "qemu:dirty-bitmap:d")][..],
        &[(9, contexts[0]), (9, contexts[1])],
        &[(9, contexts[0]), (8, contexts[0])],
    ] {
        let error = error(&wanted, &replies(violation));
        assert!(matches!(error, HandshakeError::Malformed(_)), "{violation:?}: {error}");
    }
    let none = HandshakeOptions { contexts: Vec::new(), ..wanted };
    let script = Script::modern().ack(OptionCode::STRUCTURED_REPLY).info_export(512, 1);
    assert_eq!(outcome(&none, &script.ack(OptionCode::GO)).selected, [], "nothing is asked for");
}

#[test]
fn every_violation_is_named() {
    use HandshakeError as E;
    let go = OptionCode::GO;
    let structured = OptionCode::STRUCTURED_REPLY;
    let at_go = || Script::modern().structured();
    let long = OptionReplyHeader { option: structured, kind: ReplyType::ACK, len: 1 << 21 };
    let sizes = |min, preferred, max| {
        (
            at_go().info_export(1 << 20, 1).info_sizes(min, preferred, max).ack(go),
            E::BlockSizes(BlockSizes { min, preferred, max }),
        )
    };
    let table = [
        (Script::default().bytes(b"SSH-2.0-OpenSSH"), E::NotNbd(u64::from_be_bytes(*b"SSH-2.0-"))),
        (
            Script::default().bytes(&INIT_MAGIC.to_be_bytes()).bytes(&[1; 8]),
            E::NotNbd(0x0101_0101_0101_0101),
        ),
        (
            Script::default().bytes(&INIT_MAGIC.to_be_bytes()).bytes(&OLDSTYLE_MAGIC.to_be_bytes()),
            E::Oldstyle,
        ),
        (Script::modern().bytes(&[9; 20]), E::BadMagic(0x0909_0909_0909_0909)),
        // CVE-2023-5215: to an offset with a sign these are negative.
        (at_go().info_export(1 << 63, 1).ack(go), E::SizeTooLarge(1 << 63)),
        (at_go().info_export(u64::MAX, 1).ack(go), E::SizeTooLarge(u64::MAX)),
        (Script::modern().ack(go), E::WrongOption { expected: structured, got: go }),
        (
            Script::modern().bytes(&long.encode()),
            E::ReplyTooLong { option: structured, len: 1 << 21 },
        ),
        (Script::modern().reply(structured, ReplyType::ACK, b"x"), E::Malformed("ACK")),
        (
            Script::modern().reply(structured, ReplyType::INFO, b"\0\0"),
            E::UnexpectedReply { option: structured, reply: ReplyType::INFO },
        ),
        (
            Script::modern().reply(structured, ReplyType::ERR_TLS_REQD, b""),
            E::TlsRequired(structured),
        ),
        (
            Script::modern().ack(structured).reply(
                OptionCode::SET_META_CONTEXT,
                ReplyType::META_CONTEXT,
                b"\0\0\0\x01base:other",
            ),
            E::Malformed("META_CONTEXT reply"),
        ),
        (
            Script::modern().ack(structured).reply(
                OptionCode::SET_META_CONTEXT,
                ReplyType::META_CONTEXT,
                b"\0\0",
            ),
            E::Malformed("META_CONTEXT reply"),
        ),
        (at_go().reply(go, ReplyType::ACK, b"data"), E::Malformed("ACK")),
        (at_go().ack(go), E::NoExportInfo),
        (at_go().info_export(512, 0x1c).ack(go), E::NoFlags(0x1c)),
        (at_go().reply(go, ReplyType::INFO, b"\0"), E::Malformed("INFO reply")),
        (at_go().reply(go, ReplyType::INFO, &[0; 11]), E::Malformed("EXPORT info")),
        (at_go().reply(go, ReplyType::INFO, &[0; 13]), E::Malformed("EXPORT info")),
        (at_go().reply(go, ReplyType::INFO, b"\0\x03\0\0\0\x01"), E::Malformed("BLOCK_SIZE info")),
        (at_go().reply(go, ReplyType::INFO, b"\0\x01a\0b"), E::Malformed("NAME info")),
        (at_go().reply(go, ReplyType::INFO, b"\0\x01\xff"), E::Malformed("NAME info")),
        sizes(0, 4096, 1 << 20),
        sizes(3, 4096, 1 << 20),
        sizes(1 << 17, 1 << 17, 1 << 20),
        sizes(512, 256, 1 << 20),
        sizes(512, 4097, 1 << 20),
        sizes(512, 4096, 511),
        (
            at_go().info_export(1000, 1).info_sizes(512, 4096, 1 << 20).ack(go),
            E::SizeNotMultiple { size: 1000, min: 512 },
        ),
        (
            at_go().reply(go, ReplyType::ERR_UNKNOWN, b"no vda"),
            E::Refused { option: go, reply: ReplyType::ERR_UNKNOWN, message: "no vda".into() },
        ),
    ];
    for (script, expected) in table {
        assert_eq!(error(&options(Goal::Transmit), &script), expected);
    }
    let mut too_long = options(Goal::Transmit);
    too_long.export = "x".repeat(4097);
    assert_eq!(error(&too_long, &Script::modern()), E::ExportNameTooLong(4097));
    let long_list = (0..10_001).fold(Script::modern(), |script, _| {
        script.reply(OptionCode::LIST, ReplyType::SERVER, &listed("x", ""))
    });
    let endless = run(&options(Goal::List), &long_list, usize::MAX).result;
    assert_eq!(endless, Err(E::TooManyReplies(OptionCode::LIST)));
    let name_beyond = Script::modern().reply(OptionCode::LIST, ReplyType::SERVER, b"\0\0\0\x05vda");
    assert_eq!(error(&options(Goal::List), &name_beyond), E::Malformed("SERVER reply"));
}

#[test]
fn a_failed_handshake_ends_with_an_abort_where_the_server_understands_it() {
    let options = options(Goal::Transmit);
    let abort = OptionHeader { option: OptionCode::ABORT, len: 0 }.encode();
    let refused = Script::modern().structured().reply(OptionCode::GO, ReplyType::ERR_POLICY, b"");
    assert_eq!(run(&options, &refused, usize::MAX).abort, abort[..]);
    assert!(run(&options, &Script::greeting(0), usize::MAX).abort.is_empty());
    assert!(run(&options, &Script::default().bytes(&[0; 18]), usize::MAX).abort.is_empty());
}

#[test]
fn a_servers_text_is_cut_and_freed_of_control_characters() {
    let text = [&b"\x1b[31m"[..], &[b'x'; 5000]].concat();
    let script = Script::modern().structured().reply(OptionCode::GO, ReplyType::ERR_POLICY, &text);
    let message = error(&options(Goal::Transmit), &script).to_string();
    assert!(message.len() < 1200 && !message.contains('\x1b'), "{message}");
}

proptest! {
    #[test]
    fn no_bytes_make_the_handshake_panic(
        tail in proptest::collection::vec(any::<u8>(), 0..200),
        goal in prop_oneof![Just(Goal::Transmit), Just(Goal::List), Just(Goal::Describe)],
        flags in 0u16..4,
        mode_max in prop_oneof![Just(TransmissionMode::Structured), Just(TransmissionMode::Extended)],
        kind in prop_oneof![any::<u32>(), 1u32..5],
        len in 0u32..40,
    ) {
        let option = match goal {
            Goal::List => OptionCode::LIST,
            _ if mode_max.is_extended() => OptionCode::EXTENDED_HEADERS,
            _ => OptionCode::STRUCTURED_REPLY,
        };
        let options = |goal| HandshakeOptions { mode_max, ..options(goal) };
        let header = OptionReplyHeader { option, kind: ReplyType(kind), len };
        let script = Script::greeting(flags).bytes(&header.encode()).bytes(&tail);
        let whole = run(&options(goal), &script, usize::MAX);
        let bytewise = run(&options(goal), &script, 1);
        prop_assert_eq!(whole.result, bytewise.result);
    }
}

#[test]
fn tls_comes_before_everything_else_and_nothing_without_it() {
    let wanted = HandshakeOptions {
        tls: true,
        private_options: vec![(PRIVATE, Bytes::from_static(b"secret"))],
        ..options(Goal::Transmit)
    };
    let acked = Script::modern().ack(OptionCode::STARTTLS);
    for piece in [1, usize::MAX] {
        let run = run(&wanted, &acked, piece);
        assert_eq!(run.result, Ok(Progress::StartTls));
        assert_eq!(asked(&run.sent), [OptionCode::STARTTLS]);
    }
    let refused = Script::modern().reply(OptionCode::STARTTLS, ReplyType::ERR_POLICY, b"no\n");
    let error = error(&wanted, &refused);
    assert!(matches!(error, HandshakeError::TlsRefused { .. }) && !error.is_violation());
    assert_eq!(asked(&run(&wanted, &refused, 1).sent), [OptionCode::STARTTLS]);
    // Such a server has no TLS at all, and is told nothing.
    let old = run(&wanted, &Script::greeting(0), usize::MAX);
    assert_eq!(old.result, Err(HandshakeError::NotFixedNewstyle(OptionCode::STARTTLS)));
    assert_eq!(asked(&old.sent), []);
}

#[test]
fn what_comes_in_the_clear_after_tls_was_agreed_on_is_a_violation() {
    let wanted = HandshakeOptions { tls: true, ..options(Goal::Transmit) };
    let acked = Script::modern().ack(OptionCode::STARTTLS);
    for injected in [&b"x"[..], &Script::default().structured().0] {
        let run = run(&wanted, &acked.clone().bytes(injected), usize::MAX);
        assert_eq!(run.result, Err(HandshakeError::ClearText));
        assert_eq!(asked(&run.sent), [OptionCode::STARTTLS]);
    }
}

#[test]
fn inside_tls_the_handshake_begins_anew() {
    let wanted = HandshakeOptions { tls: true, ..options(Goal::Transmit) };
    let mut handshake = Handshake::new(wanted);
    let mut input = Script::modern().ack(OptionCode::STARTTLS).0;
    assert_eq!(handshake.advance(&mut input), Ok(Progress::StartTls));
    handshake.take_output();
    handshake.tls_started();
    input = Script::default().structured().info_export(4096, 1).ack(OptionCode::GO).0;
    let Ok(Progress::Done(outcome)) = handshake.advance(&mut input) else { panic!("not done") };
    assert_eq!(outcome.export.expect("an export").size, 4096);
    let sent = [&[0; 4][..], &handshake.take_output()].concat();
    let expected = [OptionCode::STRUCTURED_REPLY, OptionCode::SET_META_CONTEXT, OptionCode::GO];
    assert_eq!(asked(&sent), expected);
}
