//! Replies, as an input describes them: most of them nearly right.

use brep_nbd::proto::wire::{
    Command, EXTENDED_REPLY_MAGIC, RequestHeader, SIMPLE_REPLY_MAGIC, STRUCTURED_REPLY_MAGIC,
};

/// The requests in what a client has sent.
pub(crate) fn requests(mut sent: &[u8]) -> Vec<RequestHeader> {
    let mut requests = Vec::new();
    while let Some((header, rest)) = request(sent) {
        let payload = if header.command == Command::WRITE { header.len as usize } else { 0 };
        requests.push(header);
        sent = &rest[payload..];
    }
    assert!(sent.is_empty(), "what our client sends");
    requests
}

fn request(sent: &[u8]) -> Option<(RequestHeader, &[u8])> {
    if let Some((header, rest)) = sent.split_first_chunk()
        && let Ok(header) = RequestHeader::decode_extended(header)
    {
        return Some((header, rest));
    }
    let (header, rest) = sent.split_first_chunk()?;
    RequestHeader::decode(header).ok().map(|header| (header, rest))
}

/// What a server sends that follows the program in `data`, in answer to `requests`.
pub(crate) fn replies(data: &[u8], requests: &[RequestHeader]) -> Vec<u8> {
    let mut program = Program { data, sent: Vec::new() };
    while !program.data.is_empty() {
        let instruction = program.byte();
        let request = &requests[usize::from(program.byte()) % requests.len()];
        match instruction % 8 {
            0 => {
                let len = usize::from(program.byte());
                let raw = program.bytes(len);
                program.sent.extend_from_slice(raw);
            }
            1 | 2 => program.simple(request),
            3..6 => program.chunk(request, false),
            _ => program.chunk(request, true),
        }
    }
    program.sent
}

struct Program<'a> {
    data: &'a [u8],
    sent: Vec<u8>,
}

impl<'a> Program<'a> {
    fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.data.split_at(len.min(self.data.len()));
        self.data = rest;
        taken
    }

    fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or_default()
    }

    fn short(&mut self) -> u16 {
        u16::from(self.byte()) << 8 | u16::from(self.byte())
    }

    fn simple(&mut self, request: &RequestHeader) {
        let errno = u32::from(self.byte() / 2);
        self.sent.extend(SIMPLE_REPLY_MAGIC.to_be_bytes());
        self.sent.extend(errno.to_be_bytes());
        self.sent.extend(request.cookie.to_be_bytes());
        if errno == 0 && request.command == Command::READ {
            self.sent.resize(self.sent.len() + request.len as usize, 0x5a);
        }
    }

    fn chunk(&mut self, request: &RequestHeader, extended: bool) {
        // Data, hole, status, errors, nothing; and whatever else there may be.
        const KINDS: [u16; 8] = [1, 2, 5, 0x8001, 0x8002, 0, 6, 0x8003];
        let choice = self.byte();
        let kind = KINDS[usize::from(choice & 7)];
        let done = choice & 8 != 0;
        let payload = self.payload(kind, request);
        let len = match choice >> 4 {
            0 => u32::from(self.short()),
            _ => payload.len() as u32,
        };
        let magic = if extended { EXTENDED_REPLY_MAGIC } else { STRUCTURED_REPLY_MAGIC };
        self.sent.extend(magic.to_be_bytes());
        self.sent.extend(u16::from(done).to_be_bytes());
        self.sent.extend(kind.to_be_bytes());
        self.sent.extend(request.cookie.to_be_bytes());
        if extended {
            self.sent.extend(request.offset.to_be_bytes());
            self.sent.extend(0_u32.to_be_bytes());
        }
        self.sent.extend(len.to_be_bytes());
        self.sent.extend(payload);
    }

    fn payload(&mut self, kind: u16, request: &RequestHeader) -> Vec<u8> {
        match kind {
            1 => {
                let mut payload = self.offset(request);
                let len = payload.len() + usize::from(self.short());
                payload.resize(len, 0xa5);
                payload
            }
            2 => {
                let mut payload = self.offset(request);
                payload.extend(u32::from(self.short()).to_be_bytes());
                payload
            }
            5 => {
                let mut payload = u32::from(self.byte()).to_be_bytes().to_vec();
                for _ in 0..self.byte() % 4 {
                    payload.extend((u32::from(self.short()) << 4).to_be_bytes());
                    payload.extend(u32::from(self.byte()).to_be_bytes());
                }
                payload
            }
            6 => {
                let mut payload = u32::from(self.byte()).to_be_bytes().to_vec();
                let extents = self.byte() % 4;
                payload.extend(u32::from(extents).to_be_bytes());
                for _ in 0..extents {
                    payload.extend((u64::from(self.short()) << 4).to_be_bytes());
                    payload.extend(u64::from(self.byte()).to_be_bytes());
                }
                payload
            }
            0x8001 | 0x8002 => {
                let mut payload = u32::from(self.byte()).to_be_bytes().to_vec();
                let text = self.byte();
                let text = self.bytes(usize::from(text));
                payload.extend((text.len() as u16).to_be_bytes());
                payload.extend_from_slice(text);
                if kind == 0x8002 {
                    payload.extend(self.offset(request));
                }
                payload
            }
            _ => {
                let len = usize::from(self.byte());
                self.bytes(len).to_vec()
            }
        }
    }

    fn offset(&mut self, request: &RequestHeader) -> Vec<u8> {
        (request.offset + u64::from(self.short())).to_be_bytes().to_vec()
    }
}
