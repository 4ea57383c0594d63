//! Input that comes in pieces, cut at every byte: to the state machines, and over a socket.

mod server_support;

use brep_block::Memory;
use brep_nbd::proto::server::{
    Action, Agreed, Decoder, ExportDescription, ExportInfo, Handshake, OptionError,
    SelectedContext, Step, TlsPolicy, check,
};
use brep_nbd::proto::wire::{
    ClientFlags, Command, CommandFlags, EXTENDED_REQUEST_MAGIC, Errno, OptionCode, REQUEST_MAGIC,
    RequestHeader, TransmissionMode,
};
use bytes::{Bytes, BytesMut};
use proptest::prelude::*;
use server_support::{Fixture, info_data, meta_data, option_bytes, request, request_bytes, within};

/// A handshake with every option in it.
fn script() -> Vec<u8> {
    [
        vec![0, 0, 0, 3],
        option_bytes(OptionCode(99), &[1; 30]),
        option_bytes(OptionCode::STARTTLS, &[]),
        option_bytes(OptionCode::STRUCTURED_REPLY, &[]),
        option_bytes(OptionCode::EXTENDED_HEADERS, &[]),
        option_bytes(OptionCode::LIST, &[]),
        option_bytes(OptionCode(0x6272_6507), b"private"),
        option_bytes(OptionCode::INFO, &info_data("nobody", &[])),
        option_bytes(OptionCode::LIST_META_CONTEXT, &meta_data("disk", &[])),
        option_bytes(OptionCode::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"])),
        option_bytes(OptionCode::GO, &info_data("disk", &[0, 1, 2, 3])),
    ]
    .concat()
}

fn export() -> ExportInfo {
    ExportInfo {
        canonical_name: "disk".to_owned(),
        description: String::new(),
        size: 1 << 20,
        read_only: false,
        resizable: false,
        multi_conn: true,
        block_size: 1,
        preferred_size: 4096,
        contexts: Vec::new(),
    }
}

/// Feeds pieces to a handshake; returns all output, and the agreement or the end.
fn drive<'a>(pieces: impl IntoIterator<Item = &'a [u8]>) -> (Vec<u8>, Option<Box<Agreed>>, usize) {
    let mut handshake = Handshake::new();
    let mut input = BytesMut::new();
    let mut output = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        loop {
            let step = handshake.step(&mut input);
            output.extend(handshake.take_output());
            match step {
                Step::Input(missing) => {
                    assert!(missing > 0);
                    break;
                }
                Step::List => {
                    let (name, description) = ("disk".to_owned(), String::new());
                    handshake.listed(&[ExportDescription { name, description }]);
                }
                Step::Open(name) if name == "disk" => handshake.opened(Ok(export())),
                Step::Open(name) => handshake.opened(Err(OptionError::unknown_export(&name))),
                Step::Private { data, .. } => handshake.answered(Ok(data)),
                Step::Transmission(agreed) => return (output, Some(agreed), input.len()),
                _ => return (output, None, input.len()),
            }
        }
    }
    (output, None, input.len())
}

#[test]
fn a_handshake_cut_anywhere_gives_the_same_answers() {
    let script = script();
    let (output, agreed, rest) = drive([&script[..]]);
    let agreed = agreed.expect("an agreement");
    assert!(agreed.mode.is_extended() && agreed.contexts.len() == 1 && agreed.block_size_agreed);
    assert_eq!(rest, 0);
    for cut in 0..=script.len() {
        let (head, tail) = script.split_at(cut);
        assert_eq!(drive([head, tail]), (output.clone(), Some(agreed.clone()), 0), "cut at {cut}");
    }
    assert_eq!(drive(script.chunks(1)), (output, Some(agreed), 0), "byte by byte");
}

#[test]
fn a_handshake_with_tls_cut_anywhere_gives_the_same_answers() {
    let greeted = [
        &ClientFlags::FIXED_NEWSTYLE.0.to_be_bytes()[..],
        &option_bytes(OptionCode::STRUCTURED_REPLY, &[]),
        &option_bytes(OptionCode::STARTTLS, b"data"),
        &option_bytes(OptionCode::STARTTLS, &[]),
    ]
    .concat();
    let inside = &script()[4..];
    for policy in [TlsPolicy::Optional, TlsPolicy::Required] {
        let (mut outputs, cuts) = (Vec::new(), 0..=greeted.len() + inside.len());
        for cut in cuts {
            let mut handshake = Handshake::new().with_tls(policy);
            let (mut output, mut input) = (Vec::new(), BytesMut::new());
            for (part, start) in [(&greeted[..], 0), (inside, greeted.len())] {
                let (head, tail) = part.split_at(cut.saturating_sub(start).min(part.len()));
                for piece in [head, tail].into_iter().filter(|piece| !piece.is_empty()) {
                    input.extend_from_slice(piece);
                    answer(&mut handshake, &mut input, &mut output);
                }
                if start == 0 {
                    assert_eq!(handshake.step(&mut input), Step::StartTls, "cut at {cut}");
                    handshake.tls_started();
                }
            }
            let Step::Transmission(agreed) = handshake.step(&mut input) else { panic!("{cut}") };
            outputs.push((output, agreed));
        }
        assert!(outputs.windows(2).all(|pair| pair[0] == pair[1]), "{policy:?}");
    }
}

/// Answers everything but `STARTTLS`.
fn answer(handshake: &mut Handshake, input: &mut BytesMut, output: &mut Vec<u8>) {
    loop {
        let step = handshake.step(input);
        output.extend(handshake.take_output());
        match step {
            Step::List => handshake.listed(&[]),
            Step::Open(_) => handshake.opened(Ok(export())),
            Step::Private { data, .. } => handshake.answered(Ok(data)),
            _ => return,
        }
    }
}

#[test]
fn a_handshake_takes_nothing_of_what_follows_it() {
    let mut bytes = script();
    bytes.extend([9; 100]);
    assert_eq!(drive([&bytes[..]]).2, 100);
}

fn requests() -> Vec<u8> {
    [
        request_bytes(request(Command::WRITE, 1, 10, 5), b"hello"),
        request_bytes(request(Command::READ, 2, 10, 5), &[]),
        request_bytes(request(Command::WRITE, 3, 0, 0), &[]),
        request_bytes(request(Command::FLUSH, 4, 0, 0), &[]),
        request_bytes(request(Command::WRITE, 5, 20, 300), &[7; 300]),
    ]
    .concat()
}

/// The same, and two more that only extended headers have.
fn extended_requests() -> Vec<u8> {
    let write = |cookie, offset, data: &[u8]| {
        let header = request(Command::WRITE, cookie, offset, data.len() as u32);
        let header = RequestHeader { flags: CommandFlags::PAYLOAD_LEN, ..header };
        [&header.encode_extended()[..], data].concat()
    };
    let status = RequestHeader {
        flags: CommandFlags::PAYLOAD_LEN,
        ..request(Command::BLOCK_STATUS, 6, 0, 12)
    };
    let trim = RequestHeader { len: 1 << 20, ..request(Command::TRIM, 7, 0, 0) };
    [
        write(1, 10, b"hello"),
        request(Command::READ, 2, 10, 5).encode_extended().to_vec(),
        write(3, 0, b""),
        status.encode_extended().to_vec(),
        [&(1_u64 << 20).to_be_bytes()[..], &1_u32.to_be_bytes()].concat(),
        trim.encode_extended().to_vec(),
        write(5, 20, &[7; 300]),
    ]
    .concat()
}

fn decode<'a>(mode: TransmissionMode, pieces: impl IntoIterator<Item = &'a [u8]>) -> Vec<Action> {
    let agreed = Agreed {
        export: export(),
        mode,
        contexts: vec![SelectedContext { id: 1, name: "base:allocation".to_owned() }],
        block_size_agreed: false,
    };
    let mut decoder = Decoder::new(mode);
    let mut input = BytesMut::new();
    let mut actions = Vec::new();
    for piece in pieces {
        input.extend_from_slice(piece);
        while decoder.header(&mut input).expect("a request").is_some() {
            let Some(request) = decoder.request(&mut input) else { break };
            actions.push(check(request, &agreed).expect("a good request"));
        }
    }
    assert!(decoder.is_between_requests(&input));
    actions
}

#[test]
fn requests_cut_anywhere_are_the_same_requests() {
    let scripts = [
        (TransmissionMode::Simple, requests(), 5),
        (TransmissionMode::Extended, extended_requests(), 6),
    ];
    for (mode, bytes, count) in scripts {
        let actions = decode(mode, [&bytes[..]]);
        assert_eq!(actions.len(), count);
        let write = Action::Write { offset: 10, data: Bytes::from_static(b"hello"), fua: false };
        assert_eq!(actions[0], write);
        for cut in 0..=bytes.len() {
            let (head, tail) = bytes.split_at(cut);
            assert_eq!(decode(mode, [head, tail]), actions, "{mode:?}, cut at {cut}");
        }
        assert_eq!(decode(mode, bytes.chunks(1)), actions, "{mode:?}, byte by byte");
    }
}

#[tokio::test]
async fn a_conversation_cut_anywhere_has_the_same_answers_over_a_socket() {
    let begin = [vec![0, 0, 0, 3], option_bytes(OptionCode(99), &[1; 5])].concat();
    let go = option_bytes(OptionCode::GO, &info_data("disk", &[]));
    let compact = [
        begin.clone(),
        go.clone(),
        request_bytes(request(Command::WRITE, 1, 10, 5), b"hello"),
        request_bytes(request(Command::READ, 2, 10, 5), &[]),
        request_bytes(request(Command::DISC, 3, 0, 0), &[]),
    ];
    let write = request(Command::WRITE, 1, 10, 5);
    let write = RequestHeader { flags: CommandFlags::PAYLOAD_LEN, ..write };
    let extended = [
        begin,
        option_bytes(OptionCode::EXTENDED_HEADERS, &[]),
        go,
        [&write.encode_extended()[..], b"hello"].concat(),
        request(Command::READ, 2, 10, 5).encode_extended().to_vec(),
        request(Command::DISC, 3, 0, 0).encode_extended().to_vec(),
    ];
    assert_same_answers(&compact.concat()).await;
    assert_same_answers(&extended.concat()).await;
}

async fn assert_same_answers(bytes: &[u8]) {
    let fixture = Fixture::device(Memory::new("memory", 1 << 20)).await;
    let mut expected: Option<Vec<u8>> = None;
    for cut in 0..bytes.len() {
        let mut raw = fixture.connect().await;
        raw.send(&bytes[..cut]).await;
        // The server has to see the first piece alone.
        tokio::task::yield_now().await;
        raw.send(&bytes[cut..]).await;
        let mut answers = Vec::new();
        within(tokio::io::AsyncReadExt::read_to_end(&mut raw.stream, &mut answers)).await.unwrap();
        let expected = expected.get_or_insert_with(|| answers.clone());
        assert!(answers.ends_with(b"hello"));
        assert_eq!(*expected, answers, "cut at {cut}");
    }
}

proptest! {
    #[test]
    fn no_input_makes_a_handshake_panic_or_keep_much(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
        valid in 0_usize..300,
    ) {
        // Mostly valid, so that the end of the script is reached, too.
        let script = script();
        let mut input = script[..valid.min(script.len())].to_vec();
        input.append(&mut bytes);
        let (output, _, rest) = drive(input.chunks(7));
        prop_assert!(output.len() < 4096 && rest <= input.len());
    }

    #[test]
    fn a_changed_byte_in_a_handshake_never_panics(position in 0_usize..300, value in any::<u8>()) {
        let mut script = script();
        let index = position % script.len();
        script[index] = value;
        drive([&script[..]]);
    }

    #[test]
    fn no_input_makes_the_decoder_panic(
        bytes in proptest::collection::vec(any::<u8>(), 0..200),
        extended in any::<bool>(),
    ) {
        // With the right magic number in front: otherwise nothing is looked at.
        let (mode, magic) = match extended {
            true => (TransmissionMode::Extended, EXTENDED_REQUEST_MAGIC),
            false => (TransmissionMode::Simple, REQUEST_MAGIC),
        };
        let mut decoder = Decoder::new(mode);
        let mut input = BytesMut::from(&magic.to_be_bytes()[..]);
        input.extend_from_slice(&bytes);
        while let Ok(Some(_)) = decoder.header(&mut input) {
            if decoder.request(&mut input).is_none() {
                break;
            }
            prop_assert!(decoder.missing(&input) > 0 || !input.is_empty());
        }
        prop_assert!(input.len() <= bytes.len() + 4);
    }
}

#[tokio::test]
async fn large_payloads_are_taken_whole_and_nothing_of_their_neighbours_with_them() {
    let fixture = Fixture::device(Memory::new("memory", 16 << 20)).await;
    let lens = [5, 300 << 10, (1 << 20) + 3, 28, 700 << 10, 600 << 10, 4096];
    for extended in [false, true] {
        let mut script = Vec::new();
        let mut expected = Vec::new();
        for (len, cookie) in lens.into_iter().zip(1_u8..) {
            let header = request(Command::WRITE, cookie.into(), expected.len() as u64, len as u32);
            let payload: Vec<u8> = (0..len).map(|at| (at / 7) as u8 ^ cookie).collect();
            match extended {
                true => {
                    let header = RequestHeader { flags: CommandFlags::PAYLOAD_LEN, ..header };
                    script.extend(header.encode_extended());
                    script.extend(&payload);
                }
                false => script.extend(request_bytes(header, &payload)),
            }
            expected.extend(payload);
        }
        // Between the first header and its payload, in the midst of large ones, at their ends.
        for cut in [0, 30, 61, 200 << 10, (300 << 10) + 60, (300 << 10) + 70, 1 << 20] {
            let mut raw = match extended {
                true => fixture.extended().await,
                false => fixture.session(false).await,
            };
            raw.send(&script[..cut]).await;
            // The server has to see the first piece alone.
            tokio::task::yield_now().await;
            raw.send(&script[cut..]).await;
            for _ in lens {
                match extended {
                    true => drop(raw.extended_chunk().await),
                    false => assert_eq!(raw.simple().await.0, Errno::OK),
                }
            }
            let mut reader = fixture.session(false).await;
            let found = reader.read(0, expected.len() as u32).await;
            assert!(found == expected, "extended: {extended}, cut at {cut}");
            assert_eq!(reader.write(0, &vec![0; expected.len()]).await, Errno::OK);
        }
    }
}
