use std::task::Waker;

use brep_block::{Error, Operation};
use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use crate::proto::client::{Answer, Extent, Request};
use crate::proto::wire::{Command, CommandFlags};

/// Length of the zeroes that stand in for `WRITE_ZEROES` where a server does not have it, in
/// bytes.
const ZEROES_LEN: u64 = 256 << 10;

/// One call of the device, and how far it has come. It becomes one request, or several if it is
/// longer than the server takes at a time.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) operation: Operation,
    command: Command,
    flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) len: u64,
    payload: Payload,
    piece_len_max: u64,
    pub(super) submitted: Instant,

    /// How much of the range has been made into requests, in bytes.
    sent: u64,
    begun: bool,
    outstanding: u32,
    error: Option<Error>,
    data: Vec<(u64, Bytes)>,
    extents: Vec<Vec<Extent>>,

    pub(super) waker: Option<Waker>,
    /// Nobody waits for the result any more.
    pub(super) abandoned: bool,
}

#[derive(Debug)]
pub(super) enum Payload {
    None,
    Data(Bytes),
    Zeroes,
}

/// What a call asks for.
#[derive(Debug)]
pub(super) struct CallSpec {
    pub(super) operation: Operation,
    pub(super) command: Command,
    pub(super) flags: CommandFlags,
    pub(super) offset: u64,
    pub(super) len: u64,
    pub(super) payload: Payload,
    /// Longest request that this may become, in bytes: a multiple of the minimum block.
    pub(super) piece_len_max: u64,
}

impl Call {
    pub(super) fn new(spec: CallSpec) -> Self {
        let piece_len_max = match spec.payload {
            Payload::Zeroes => spec.piece_len_max.min(ZEROES_LEN),
            _ => spec.piece_len_max,
        };
        Call {
            operation: spec.operation,
            command: spec.command,
            flags: spec.flags,
            offset: spec.offset,
            len: spec.len,
            payload: spec.payload,
            piece_len_max,
            submitted: Instant::now(),
            sent: 0,
            begun: false,
            outstanding: 0,
            error: None,
            data: Vec::new(),
            extents: Vec::new(),
            waker: None,
            abandoned: false,
        }
    }

    /// Payload that has not been made into requests yet, in bytes.
    pub(super) fn unsent_payload(&self) -> u64 {
        match self.payload {
            Payload::Data(_) => self.len - self.sent,
            Payload::None | Payload::Zeroes => 0,
        }
    }

    /// Bytes of data that the next request moves in one direction or the other.
    pub(super) fn next_transfer(&self) -> u64 {
        match self.command {
            Command::READ | Command::WRITE => self.next_len(),
            _ => 0,
        }
    }

    fn next_len(&self) -> u64 {
        (self.len - self.sent).min(self.piece_len_max)
    }

    pub(super) fn all_sent(&self) -> bool {
        self.begun && self.sent == self.len
    }

    pub(super) fn is_finished(&self) -> bool {
        self.all_sent() && self.outstanding == 0
    }

    /// Makes the next request, with its payload. Must not be called once all is sent.
    pub(super) fn next_request(&mut self) -> (Request, Option<Bytes>) {
        let len = self.next_len();
        let request = Request {
            command: self.command,
            flags: self.flags,
            offset: self.offset + self.sent,
            len,
        };
        let payload = match &mut self.payload {
            Payload::None => None,
            Payload::Data(data) => Some(data.split_to(len as usize)),
            Payload::Zeroes => Some(brep_block::zeroes(len as usize)),
        };
        self.begun = true;
        self.sent += len;
        self.outstanding += 1;
        (request, payload)
    }

    /// One of its requests has succeeded.
    pub(super) fn answered(&mut self, request: &Request, answer: Answer) {
        self.outstanding -= 1;
        match answer {
            Answer::Done => {}
            Answer::Data(data) => self.data.push((request.offset, data)),
            Answer::Extents(extents) => self.extents = extents,
        }
    }

    /// One of its requests has failed: the rest of it is not even tried.
    pub(super) fn refused(&mut self, error: Error) {
        self.outstanding -= 1;
        self.sent = self.len;
        self.error.get_or_insert(error);
    }

    /// There will be no more replies.
    pub(super) fn abort(&mut self, error: Error) {
        self.begun = true;
        self.sent = self.len;
        self.outstanding = 0;
        self.payload = Payload::None;
        self.error.get_or_insert(error);
    }

    pub(super) fn error(&self) -> Option<&Error> {
        self.error.as_ref()
    }

    /// The result of a finished call.
    pub(super) fn finish<T: FromCall>(mut self) -> Result<T, Error> {
        match self.error.take() {
            Some(error) => Err(error),
            None => Ok(T::from_call(self)),
        }
    }
}

/// What callers get out of a call that has succeeded.
pub(super) trait FromCall {
    fn from_call(call: Call) -> Self;
}

impl FromCall for () {
    fn from_call(_: Call) {}
}

impl FromCall for Bytes {
    fn from_call(mut call: Call) -> Bytes {
        match call.data.as_mut_slice() {
            [(_, data)] => std::mem::take(data),
            parts => {
                parts.sort_unstable_by_key(|(offset, _)| *offset);
                let mut all = BytesMut::with_capacity(call.len as usize);
                parts.iter().for_each(|(_, data)| all.extend_from_slice(data));
                all.freeze()
            }
        }
    }
}

/// The extents in each context.
impl FromCall for Vec<Vec<Extent>> {
    fn from_call(call: Call) -> Self {
        call.extents
    }
}
