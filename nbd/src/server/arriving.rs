use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use brep_block::Buffer;
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, ReadBuf};

use crate::Stream;
use crate::proto::wire::RequestHeader;

/// A large payload that is being received into memory of its own, so that nothing of it has to be
/// moved. The header that follows it may come with it, which saves a call.
#[derive(Debug)]
pub(super) struct Arriving {
    buffer: Buffer,
    /// Of the payload.
    len: usize,
    filled: usize,
}

impl Arriving {
    /// A payload of `len` bytes that begins with all of `input`, which is shorter.
    pub(super) fn new(len: usize, input: &mut BytesMut) -> Self {
        let mut buffer = Buffer::new(len + RequestHeader::EXTENDED_SIZE);
        let filled = input.len().min(len);
        input.copy_to_slice(&mut buffer[..filled]);
        Arriving { buffer, len, filled }
    }

    /// As [`AsyncReadExt::read_buf`](tokio::io::AsyncReadExt::read_buf).
    pub(super) fn receive(
        &mut self,
        stream: &mut Stream,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<usize>> {
        let mut space = ReadBuf::new(&mut self.buffer[self.filled..]);
        ready!(Pin::new(stream).poll_read(cx, &mut space))?;
        let received = space.filled().len();
        self.filled += received;
        Poll::Ready(Ok(received))
    }

    pub(super) fn is_complete(&self) -> bool {
        self.filled >= self.len
    }

    /// The payload; what came after it goes to the end of `input`.
    pub(super) fn finish(self, input: &mut BytesMut) -> Bytes {
        input.extend_from_slice(&self.buffer[self.len..self.filled]);
        self.buffer.freeze().slice(..self.len)
    }
}
