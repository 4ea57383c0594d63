use std::collections::VecDeque;
use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::time::{Instant, Sleep};

use super::ClientError;
use super::queue::{Next, Queue};
use crate::Stream;
use crate::proto::client::Transmission;
use crate::proto::wire::{Command, CommandFlags, RequestHeader};

/// How much is received at a time, in bytes.
const INPUT_LEN: usize = 256 << 10;
/// From this length on, in bytes, the rest of a read goes straight to its buffer.
const DIRECT_LEN_MIN: usize = 64 << 10;
/// Most buffers in one vectored write.
const SLICES_MAX: usize = 128;

/// The one task of a connection: sends what is queued, receives what is answered, and watches
/// the clock. It ends when the connection does.
pub(super) struct Driver {
    queue: Arc<Queue>,
    stream: Stream,
    server: String,
    transmission: Transmission,
    in_flight_max: usize,
    in_flight_bytes: u64,
    in_flight_bytes_max: u64,
    request_timeout: Duration,

    output: VecDeque<Segment>,
    /// Something that was written may wait in the stream.
    unflushed: bool,
    input: BytesMut,
    wakers: Vec<Waker>,
    sleep: Pin<Box<Sleep>>,
    armed: bool,
    closing: bool,
    /// Nothing can be sent any more.
    send_failed: Option<io::Error>,
}

pub(super) struct DriverOptions {
    pub(super) server: String,
    pub(super) in_flight_max: usize,
    pub(super) in_flight_bytes_max: u64,
    pub(super) request_timeout: Duration,
}

/// Something to be sent; what has been sent of it is cut off.
enum Segment {
    /// A compact one stands at the end.
    Header {
        bytes: [u8; RequestHeader::EXTENDED_SIZE],
        sent: usize,
    },
    Payload(Bytes),
}

impl Segment {
    fn unsent(&self) -> &[u8] {
        match self {
            Segment::Header { bytes, sent } => &bytes[*sent..],
            Segment::Payload(bytes) => bytes,
        }
    }

    fn advance(&mut self, len: usize) {
        match self {
            Segment::Header { sent, .. } => *sent += len,
            Segment::Payload(bytes) => bytes.advance(len),
        }
    }
}

/// What a client takes its leave with.
pub(super) fn disconnect() -> RequestHeader {
    let (flags, command) = (CommandFlags::NONE, Command::DISC);
    RequestHeader { flags, command, cookie: 0, offset: 0, len: 0 }
}

impl Driver {
    pub(super) fn new(
        queue: Arc<Queue>,
        stream: Stream,
        input: BytesMut,
        transmission: Transmission,
        options: DriverOptions,
    ) -> Self {
        Driver {
            queue,
            stream,
            server: options.server,
            transmission,
            in_flight_max: options.in_flight_max.max(1),
            in_flight_bytes: 0,
            in_flight_bytes_max: options.in_flight_bytes_max,
            request_timeout: options.request_timeout,
            output: VecDeque::new(),
            unflushed: false,
            input,
            wakers: Vec::new(),
            sleep: Box::pin(tokio::time::sleep(options.request_timeout)),
            armed: false,
            closing: false,
            send_failed: None,
        }
    }

    /// `Ready` when the connection has ended.
    fn drive(&mut self, cx: &mut Context<'_>) -> Poll<ClientError> {
        // Replies that came together with the end of the handshake.
        let mut received = self.take_in();
        loop {
            if let Err(reason) = received {
                return Poll::Ready(match self.send_failed.take() {
                    Some(error) => self.lost(error),
                    None => reason,
                });
            }
            if let Some(reason) = self.fill_output(cx.waker()) {
                return Poll::Ready(reason);
            }
            if self.send_failed.is_none()
                && let Poll::Ready(Err(error)) = self.send(cx)
            {
                // What the server answered before it went lies here, up to its end.
                self.send_failed = Some(error);
            }
            if self.transmission.outstanding() == 0
                && let Some(error) = self.send_failed.take()
            {
                return Poll::Ready(self.lost(error));
            }
            if self.closing && self.output.is_empty() && !self.unflushed {
                self.stream.say_goodbye(&[]);
                return Poll::Ready(ClientError::Closed { server: self.server.clone() });
            }
            received = match self.receive(cx) {
                Poll::Ready(result) => result,
                Poll::Pending => break,
            };
        }
        self.check_deadline(cx)
    }

    fn lost(&self, source: io::Error) -> ClientError {
        ClientError::Lost { server: self.server.clone(), source: Arc::new(source) }
    }

    /// Makes queued calls into requests as far as the limits allow.
    fn fill_output(&mut self, waker: &Waker) -> Option<ClientError> {
        if self.send_failed.is_some() {
            return self.queue.register(waker);
        }
        while !self.closing {
            let outstanding = self.transmission.outstanding();
            if outstanding >= self.in_flight_max {
                // Replies wake us; but an end that somebody else decides on must do so, too.
                return self.queue.register(waker);
            }
            let room = self.in_flight_bytes_max.saturating_sub(self.in_flight_bytes);
            // A single request is let through, however long it is.
            let room = (self.in_flight_bytes > 0).then_some(room);
            match self.queue.next(room, outstanding == 0, waker) {
                Next::Send { key, request, payload, transfer } => {
                    self.in_flight_bytes += transfer;
                    let header = self.transmission.start(request, key);
                    self.push(header);
                    self.output.extend(payload.map(Segment::Payload));
                }
                Next::Wait => break,
                Next::Close => {
                    self.closing = true;
                    self.push(disconnect());
                }
                Next::End(reason) => return Some(reason),
            }
        }
        None
    }

    fn push(&mut self, header: RequestHeader) {
        let segment = if self.transmission.mode().is_extended() {
            Segment::Header { bytes: header.encode_extended(), sent: 0 }
        } else {
            let mut bytes = [0; RequestHeader::EXTENDED_SIZE];
            let sent = bytes.len() - RequestHeader::SIZE;
            bytes[sent..].copy_from_slice(&header.encode());
            Segment::Header { bytes, sent }
        };
        self.output.push_back(segment);
    }

    /// Sends until all is sent, or the socket takes no more.
    fn send(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let mut count = 0;
            for (slice, segment) in slices.iter_mut().zip(&self.output) {
                *slice = IoSlice::new(segment.unsent());
                count += 1;
            }
            let slices = slices.get(..count).unwrap_or_default();
            self.unflushed = true;
            let sent = match Pin::new(&mut self.stream).poll_write_vectored(cx, slices) {
                Poll::Ready(Ok(0)) => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                Poll::Ready(Ok(sent)) => sent,
                Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                Poll::Pending => return Poll::Pending,
            };
            self.sent(sent);
        }
        if self.unflushed {
            std::task::ready!(Pin::new(&mut self.stream).poll_flush(cx))?;
            self.unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn sent(&mut self, mut len: usize) {
        while let Some(segment) = self.output.front_mut() {
            let rest = segment.unsent().len();
            if len < rest {
                segment.advance(len);
                return;
            }
            len -= rest;
            self.output.pop_front();
        }
    }

    /// Receives once, and hands out what is complete.
    fn receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), ClientError>> {
        let direct = match self.transmission.direct_read() {
            Some(direct) if direct.missing >= DIRECT_LEN_MIN && self.input.is_empty() => {
                let mut buffer = direct.buffer.limit(direct.missing);
                pin!(self.stream.read_buf(&mut buffer)).poll(cx).map_ok(Some)
            }
            _ => Poll::Ready(Ok(None)),
        };
        let result = match std::task::ready!(direct) {
            Ok(Some(len)) => self.took_directly(len),
            Ok(None) => {
                self.input.reserve(INPUT_LEN);
                match std::task::ready!(pin!(self.stream.read_buf(&mut self.input)).poll(cx)) {
                    Ok(0) => Err(self.closed_by_server()),
                    Ok(_) => self.take_in(),
                    Err(error) => Err(self.lost(error)),
                }
            }
            Err(error) => Err(self.lost(error)),
        };
        Poll::Ready(result)
    }

    fn closed_by_server(&self) -> ClientError {
        ClientError::ClosedByServer { server: self.server.clone() }
    }

    fn took_directly(&mut self, len: usize) -> Result<(), ClientError> {
        if len == 0 {
            return Err(self.closed_by_server());
        }
        let result = self.transmission.received_directly(len);
        self.hand_out();
        result.map_err(|source| ClientError::Violation { server: self.server.clone(), source })
    }

    fn take_in(&mut self) -> Result<(), ClientError> {
        let result = self.transmission.receive(&self.input);
        // What came whole before a violation is still told.
        self.hand_out();
        let used = result
            .map_err(|source| ClientError::Violation { server: self.server.clone(), source })?;
        self.input.advance(used);
        Ok(())
    }

    fn hand_out(&mut self) {
        while let Some(completion) = self.transmission.pop() {
            let request = &completion.request;
            if matches!(request.command, Command::READ | Command::WRITE) {
                self.in_flight_bytes = self.in_flight_bytes.saturating_sub(request.len);
            }
            self.queue.complete(completion, &mut self.wakers);
        }
        self.wakers.drain(..).for_each(Waker::wake);
    }

    /// The timer is set for the oldest call that there was when it was set; when it fires, it is
    /// set for the oldest that there is. So a call costs nothing here.
    fn check_deadline(&mut self, cx: &mut Context<'_>) -> Poll<ClientError> {
        loop {
            if !self.armed {
                let Some(oldest) = self.queue.oldest() else { return Poll::Pending };
                let deadline = oldest + self.request_timeout;
                if deadline <= Instant::now() {
                    return Poll::Ready(ClientError::RequestTimedOut {
                        server: self.server.clone(),
                        timeout: self.request_timeout,
                    });
                }
                self.sleep.as_mut().reset(deadline);
                self.armed = true;
            }
            std::task::ready!(self.sleep.as_mut().poll(cx));
            self.armed = false;
        }
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let reason = std::task::ready!(self.drive(cx));
        self.queue.fail(&reason);
        Poll::Ready(())
    }
}

impl Drop for Driver {
    /// Without a driver nothing would ever be answered.
    fn drop(&mut self) {
        self.queue.fail(&ClientError::RuntimeEnded { server: self.server.clone() });
    }
}
