//! Requests of a client, and what a server answers.

use std::collections::HashMap;

use brep_nbd::proto::client::{Answer, Completion, Refusal, ReplyError, Request, Transmission};
use brep_nbd::proto::wire::{
    ChunkFlags, ChunkHeader, ChunkType, Command, CommandFlags, Errno, ExtendedChunkHeader,
    SimpleReply,
    TransmissionMode::{self, Extended},
};
use bytes::{BufMut, Bytes};

pub(crate) const CONTEXT: u32 = 5;

pub(crate) fn request(command: Command, offset: u64, len: u64) -> Request {
    Request { command, flags: CommandFlags::NONE, offset, len }
}

pub(crate) fn read(offset: u64, len: u64) -> Request {
    request(Command::READ, offset, len)
}

/// A client that has sent some requests, and what its server answers.
pub(crate) struct Exchange {
    pub(crate) mode: TransmissionMode,
    pub(crate) requests: Vec<Request>,
    /// The cookie of each request; the same in every run.
    pub(crate) cookies: Vec<u64>,
    pub(crate) replies: Vec<u8>,
}

impl Exchange {
    pub(crate) fn new(mode: TransmissionMode, requests: &[Request]) -> Self {
        let mut exchange = Exchange {
            mode,
            requests: requests.to_vec(),
            cookies: Vec::new(),
            replies: Vec::new(),
        };
        exchange.cookies = exchange.start().1;
        exchange
    }

    pub(crate) fn start(&self) -> (Transmission, Vec<u64>) {
        let mut transmission = Transmission::new(self.mode, vec![CONTEXT]);
        let cookies = self.requests.iter().zip(0..).map(|(request, tag)| {
            let header = transmission.start(*request, tag);
            assert_eq!((header.offset, header.len), (request.offset, request.len));
            header.cookie
        });
        let cookies = cookies.collect();
        (transmission, cookies)
    }

    pub(crate) fn simple(mut self, index: usize, errno: u32, data: &[u8]) -> Self {
        let reply = SimpleReply { error: Errno(errno), cookie: self.cookies[index] };
        self.replies.put_slice(&reply.encode());
        self.replies.put_slice(data);
        self
    }

    pub(crate) fn chunk(
        mut self,
        index: usize,
        kind: ChunkType,
        done: bool,
        payload: &[u8],
    ) -> Self {
        let flags = ChunkFlags::NONE.with_if(done, ChunkFlags::DONE);
        let (cookie, offset) = (self.cookies[index], self.requests[index].offset);
        if self.mode == Extended {
            let len = payload.len() as u64;
            let header = ExtendedChunkHeader { flags, kind, cookie, offset, len };
            self.replies.put_slice(&header.encode());
        } else {
            let header = ChunkHeader { flags, kind, cookie, len: payload.len() as u32 };
            self.replies.put_slice(&header.encode());
        }
        self.replies.put_slice(payload);
        self
    }

    pub(crate) fn data(self, index: usize, done: bool, offset: u64, data: &[u8]) -> Self {
        let payload = [&offset.to_be_bytes()[..], data].concat();
        self.chunk(index, ChunkType::OFFSET_DATA, done, &payload)
    }

    pub(crate) fn hole(self, index: usize, done: bool, offset: u64, len: u32) -> Self {
        let payload = [&offset.to_be_bytes()[..], &len.to_be_bytes()].concat();
        self.chunk(index, ChunkType::OFFSET_HOLE, done, &payload)
    }

    pub(crate) fn done(self, index: usize) -> Self {
        self.chunk(index, ChunkType::NONE, true, &[])
    }

    pub(crate) fn error(self, index: usize, done: bool, errno: u32, text: &[u8]) -> Self {
        let payload = error_payload(errno, text.len() as u16, text);
        self.chunk(index, ChunkType::ERROR, done, &payload)
    }

    pub(crate) fn status(self, index: usize, done: bool, id: u32, extents: &[(u32, u32)]) -> Self {
        let mut payload = id.to_be_bytes().to_vec();
        extents.iter().for_each(|(len, flags)| {
            payload.put_u32(*len);
            payload.put_u32(*flags);
        });
        self.chunk(index, ChunkType::BLOCK_STATUS, done, &payload)
    }

    pub(crate) fn long_status(
        self,
        index: usize,
        done: bool,
        id: u32,
        extents: &[(u64, u64)],
    ) -> Self {
        let mut payload = id.to_be_bytes().to_vec();
        payload.put_u32(extents.len() as u32);
        extents.iter().for_each(|(len, flags)| {
            payload.put_u64(*len);
            payload.put_u64(*flags);
        });
        self.chunk(index, ChunkType::BLOCK_STATUS_EXT, done, &payload)
    }

    /// Decodes it all, in pieces of `piece` bytes; `direct`: read data without a copy where that
    /// is possible.
    pub(crate) fn run(&self, piece: usize, direct: bool) -> (Vec<Completion>, Option<ReplyError>) {
        let (mut transmission, _) = self.start();
        let mut completions = Vec::new();
        let mut buffer: Vec<u8> = Vec::new();
        let mut error = None;
        let mut rest = &self.replies[..];
        while !rest.is_empty() && error.is_none() {
            let place = if direct && buffer.is_empty() { transmission.direct_read() } else { None };
            let result = if let Some(place) = place {
                let len = place.missing.min(piece).min(rest.len());
                place.buffer.put_slice(&rest[..len]);
                rest = &rest[len..];
                transmission.received_directly(len)
            } else {
                let (head, tail) = rest.split_at(piece.min(rest.len()));
                buffer.extend_from_slice(head);
                rest = tail;
                transmission.receive(&buffer).map(|used| {
                    buffer.drain(..used);
                })
            };
            error = result.err();
            completions.extend(std::iter::from_fn(|| transmission.pop()));
        }
        (completions, error)
    }

    /// The results by request; the same however the stream is cut.
    pub(crate) fn results(&self) -> HashMap<u64, Result<Answer, Refusal>> {
        let (completions, error) = self.run(usize::MAX, false);
        assert_eq!(error, None);
        for (piece, direct) in [(1, false), (1, true), (7, false), (7, true), (64, true)] {
            assert_eq!(self.run(piece, direct), (self.run(usize::MAX, false).0, None), "{piece}");
        }
        let count = completions.len();
        let results: HashMap<_, _> = completions.into_iter().map(|c| (c.tag, c.result)).collect();
        assert_eq!(results.len(), count, "a request was completed twice");
        results
    }

    pub(crate) fn violation(&self) -> ReplyError {
        let error = self.run(usize::MAX, false).1.expect("a violation");
        assert_eq!(self.run(1, true).1, Some(error));
        error
    }
}

pub(crate) fn error_payload(errno: u32, text_len: u16, rest: &[u8]) -> Vec<u8> {
    [&errno.to_be_bytes()[..], &text_len.to_be_bytes(), rest].concat()
}

pub(crate) fn refusal(errno: Errno, message: &str) -> Result<Answer, Refusal> {
    Err(Refusal { errno, message: message.into() })
}

pub(crate) fn bytes(data: &[u8]) -> Result<Answer, Refusal> {
    Ok(Answer::Data(Bytes::copy_from_slice(data)))
}
