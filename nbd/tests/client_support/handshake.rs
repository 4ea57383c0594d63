//! A client's handshake, run against what a server sends.

use brep_nbd::proto::client::{
    Goal, Handshake, HandshakeError, HandshakeOptions, Outcome, Progress,
};
use brep_nbd::proto::wire::{
    BASE_ALLOCATION, INIT_MAGIC, OPTION_MAGIC, OptionCode, OptionHeader, OptionReplyHeader,
    ReplyType, TransmissionMode,
};
use bytes::{BufMut, Bytes, BytesMut};

/// What a server sends.
#[derive(Clone, Default)]
pub(crate) struct Script(pub(crate) BytesMut);

impl Script {
    pub(crate) fn greeting(flags: u16) -> Self {
        let mut bytes = BytesMut::new();
        bytes.put_u64(INIT_MAGIC);
        bytes.put_u64(OPTION_MAGIC);
        bytes.put_u16(flags);
        Script(bytes)
    }

    pub(crate) fn modern() -> Self {
        Self::greeting(3)
    }

    pub(crate) fn reply(mut self, option: OptionCode, kind: ReplyType, data: &[u8]) -> Self {
        let len = data.len() as u32;
        self.0.put_slice(&OptionReplyHeader { option, kind, len }.encode());
        self.0.put_slice(data);
        self
    }

    pub(crate) fn ack(self, option: OptionCode) -> Self {
        self.reply(option, ReplyType::ACK, &[])
    }

    pub(crate) fn info_export(self, size: u64, flags: u16) -> Self {
        let mut data = vec![0, 0];
        data.put_u64(size);
        data.put_u16(flags);
        self.reply(OptionCode::GO, ReplyType::INFO, &data)
    }

    pub(crate) fn info_sizes(self, min: u32, preferred: u32, max: u32) -> Self {
        let mut data = vec![0, 3];
        [min, preferred, max].iter().for_each(|size| data.put_u32(*size));
        self.reply(OptionCode::GO, ReplyType::INFO, &data)
    }

    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.put_slice(bytes);
        self
    }

    /// What QEMU sends up to its `GO`.
    pub(crate) fn structured(self) -> Self {
        self.ack(OptionCode::STRUCTURED_REPLY)
            .reply(OptionCode::SET_META_CONTEXT, ReplyType::META_CONTEXT, &context(7))
            .ack(OptionCode::SET_META_CONTEXT)
    }
}

pub(crate) fn ids(outcome: &Outcome) -> Vec<u32> {
    outcome.selected.iter().map(|context| context.id).collect()
}

pub(crate) fn context(id: u32) -> Vec<u8> {
    [&id.to_be_bytes()[..], b"base:allocation"].concat()
}

pub(crate) fn listed(name: &str, description: &str) -> Vec<u8> {
    [&(name.len() as u32).to_be_bytes()[..], name.as_bytes(), description.as_bytes()].concat()
}

pub(crate) fn options(goal: Goal) -> HandshakeOptions {
    HandshakeOptions {
        goal,
        export: "vda".into(),
        private_options: Vec::new(),
        mode_max: TransmissionMode::Structured,
        contexts: vec![BASE_ALLOCATION.into()],
        tls: false,
    }
}

pub(crate) struct Run {
    pub(crate) result: Result<Progress, HandshakeError>,
    pub(crate) sent: Vec<u8>,
    pub(crate) rest: BytesMut,
    pub(crate) abort: Bytes,
}

impl Run {
    pub(crate) fn outcome(&self) -> Outcome {
        match &self.result {
            Ok(Progress::Done(outcome)) => outcome.clone(),
            other => panic!("not the end of the handshake: {other:?}"),
        }
    }
}

/// Runs a handshake against a script that comes in pieces of `piece` bytes.
pub(crate) fn run(options: &HandshakeOptions, script: &Script, piece: usize) -> Run {
    let mut handshake = Handshake::new(options.clone());
    let mut input = BytesMut::new();
    let mut sent = Vec::new();
    let mut result = Ok(Progress::Input);
    for piece in script.0.chunks(piece) {
        input.extend_from_slice(piece);
        if matches!(result, Ok(Progress::Input)) {
            result = handshake.advance(&mut input);
            sent.extend_from_slice(&handshake.take_output());
        }
    }
    Run { result, sent, rest: input, abort: handshake.abort() }
}

pub(crate) fn outcome(options: &HandshakeOptions, script: &Script) -> Outcome {
    run(options, script, usize::MAX).outcome()
}

pub(crate) fn error(options: &HandshakeOptions, script: &Script) -> HandshakeError {
    let whole = run(options, script, usize::MAX).result.expect_err("an error");
    let bytewise = run(options, script, 1).result.expect_err("an error, byte by byte");
    assert_eq!(whole, bytewise);
    whole
}

/// The options that were sent, with the lengths of their data.
pub(crate) fn asked(mut sent: &[u8]) -> Vec<OptionCode> {
    let mut asked = Vec::new();
    sent = &sent[4..];
    while let Some(head) = sent.first_chunk() {
        let header = OptionHeader::decode(head).expect("an option");
        asked.push(header.option);
        sent = &sent[OptionHeader::SIZE + header.len as usize..];
    }
    assert!(sent.is_empty());
    asked
}
