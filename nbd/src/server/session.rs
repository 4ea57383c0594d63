//! The transmission phase of one connection: one task, one loop.
//!
//! Each round takes what the socket has, starts every complete request in the order of arrival,
//! gathers the replies of those that finished at once, and writes them together. An operation
//! that does not finish at once goes on in [`Running`], as a part of this task: those that end
//! together cost one wake-up. The task does not end before all of them have.

use std::future::{Future, poll_fn};
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, Waker, ready};

use bytes::BytesMut;
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::time::{Instant, Sleep};

use super::arriving::Arriving;
use super::budget::Budget;
use super::config::ServerConfig;
use super::connection::{Connection, Stop};
use super::contexts::Target;
use super::execute::{CACHE_LEN, EXTENTS_MAX, execute, shutting_down};
use super::holes::HoleSearch;
use super::running::{self, Completion, Operation, Running};
use crate::Stream;
use crate::proto::server::{
    Agreed, Content, Decoder, Extent, Failure, Output, ReplyEncoder, Request, RequestId, check,
};
use crate::proto::wire::{Command, CommandFlags, Errno, PAYLOAD_LEN_MAX, RequestHeader};

/// How much the socket is asked for at once; grows while the socket fills it.
const READ_LEN_MIN: usize = 16 << 10;
const READ_LEN_MAX: usize = 256 << 10;
/// While more than this waits to be sent, no further request is started: whatever a client does
/// not fetch need not be read from the disk yet.
const OUTPUT_LEN_MAX: usize = 1 << 20;
/// Segments handed to the socket in one call.
const SLICES_MAX: usize = 128;
/// What a request without payload counts for, in bytes.
const BASE_COST: u64 = 256;

/// Why requests are not being started.
#[derive(PartialEq, Eq)]
enum Waiting {
    /// The rest of a request has not come.
    Input,
    /// Limits: something has to end first.
    Room,
    /// There will be no further request.
    Over,
}

pub(super) struct Session<'a> {
    stream: Stream,
    connection: Arc<Connection>,
    target: Arc<Target>,
    config: &'a ServerConfig,
    budget: &'a Budget,
    agreed: Box<Agreed>,
    encoder: ReplyEncoder,
    decoder: Decoder,
    input: BytesMut,
    /// A large payload that is arriving, in memory of its own.
    payload: Option<Arriving>,
    read_len: usize,
    output: Output,
    /// Something that was written may wait in the stream.
    unflushed: bool,
    operation: Operation,
    holes: HoleSearch,
    /// Operations that did not finish at once.
    running: Running,
    /// What these count for, and the request whose payload is arriving.
    running_cost: u64,
    /// The next request has been let in; its cost is part of `running_cost`.
    admitted: Option<u64>,
    /// What the budget believes we hold.
    held: u64,
    /// Nothing more is read from the socket.
    input_over: bool,
    /// No further request is looked for: the client said so, or is not understood.
    requests_over: bool,
    /// Nothing can be sent any more.
    lost: bool,
    /// Runs while the client takes nothing.
    stall: Option<Pin<Box<Sleep>>>,
}

impl<'a> Session<'a> {
    pub(super) fn new(
        stream: Stream,
        connection: Arc<Connection>,
        target: Target,
        agreed: Box<Agreed>,
        input: BytesMut,
        config: &'a ServerConfig,
        budget: &'a Budget,
    ) -> Self {
        Session {
            stream,
            connection,
            target: Arc::new(target),
            config,
            budget,
            encoder: ReplyEncoder::new(&agreed),
            decoder: Decoder::new(agreed.mode),
            agreed,
            input,
            payload: None,
            read_len: READ_LEN_MIN,
            output: Output::new(),
            unflushed: false,
            operation: idle(),
            holes: HoleSearch::default(),
            running: Running::default(),
            running_cost: 0,
            admitted: None,
            held: 0,
            input_over: false,
            requests_over: false,
            lost: false,
            stall: None,
        }
    }

    /// Serves the client until it leaves or the connection is stopped. Every operation has then
    /// completed, unless the time was over.
    pub(super) async fn run(mut self) {
        poll_fn(|cx| self.poll(cx)).await;
        if !self.lost {
            self.stream.say_goodbye(&[]);
        }
    }

    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        self.connection.register(cx.waker());
        loop {
            let stop = self.connection.stop_level();
            self.collect_completions(cx);
            if stop == Stop::Abort {
                self.refuse_running();
            }
            let waiting = self.start_requests(stop);
            self.settle();
            self.send(cx);
            let next_cost = self.next_cost();
            if waiting == Waiting::Room && self.has_room(next_cost) {
                continue;
            }
            if waiting == Waiting::Input && !self.input_over && self.receive(cx) {
                continue;
            }
            // What was started since has no waker of ours yet.
            if self.collect_completions(cx) {
                continue;
            }
            if self.is_over(stop, &waiting) {
                return Poll::Ready(());
            }
            return Poll::Pending;
        }
    }

    fn is_over(&self, stop: Stop, waiting: &Waiting) -> bool {
        if !self.running.is_empty() {
            return false;
        }
        let nothing_comes = self.input_over && *waiting != Waiting::Room;
        match stop {
            _ if self.lost => true,
            Stop::Close | Stop::Abort => true,
            Stop::ShutDown => self.all_is_sent() && *waiting != Waiting::Room,
            Stop::No => self.all_is_sent() && nothing_comes,
        }
    }

    fn all_is_sent(&self) -> bool {
        self.output.is_empty() && !self.unflushed
    }

    /// Whether something has ended.
    fn collect_completions(&mut self, cx: &mut Context<'_>) -> bool {
        let mut any = false;
        while let Some(Completion { id, cost, result }) = self.running.poll_next(cx) {
            self.running_cost -= cost;
            self.reply(id, result);
            any = true;
        }
        any
    }

    /// Answers what is not done when the time is over: nobody knows what has become of it. It goes
    /// on without a client, and the connection has not ended before it has.
    fn refuse_running(&mut self) {
        if self.running.is_empty() {
            return;
        }
        let mut running = std::mem::take(&mut self.running);
        for (id, cost) in running.each() {
            self.running_cost -= cost;
            self.reply(id, Err(shutting_down()));
        }
        let held = self.connection.hold();
        tokio::spawn(async move {
            let _held = held;
            running.end().await;
        });
    }

    fn start_requests(&mut self, stop: Stop) -> Waiting {
        loop {
            if self.requests_over || self.lost || stop == Stop::Close {
                return self.end_requests();
            }
            let header = match self.decoder.header(&mut self.input) {
                Ok(Some(header)) => header,
                Ok(None) => return Waiting::Input,
                Err(error) => return self.violation(&error.to_string()),
            };
            if header.command == Command::DISC {
                self.connection.note_disconnect();
                return self.end_requests();
            }
            if self.decoder.payload_len(&header) > PAYLOAD_LEN_MAX.into() {
                let failure = Failure::new(Errno::EINVAL, "longer than 32 MiB");
                self.reply(RequestId::from(&header), Err(failure));
                return self.violation("a payload longer than 32 MiB");
            }
            if self.admitted.is_none() {
                let cost = self.cost(&header);
                if !self.has_room(cost) {
                    return Waiting::Room;
                }
                self.running_cost += cost;
                self.admitted = Some(cost);
            }
            let Some(request) = self.next_request(&header) else { return Waiting::Input };
            let cost = self.admitted.take().unwrap_or_default();
            self.start(request, cost, stop);
        }
    }

    /// The request of this header, as soon as its payload has arrived.
    fn next_request(&mut self, header: &RequestHeader) -> Option<Request> {
        if self.payload.is_none() && self.decoder.missing(&self.input) > READ_LEN_MAX {
            let len = usize::try_from(self.decoder.payload_len(header)).ok()?;
            self.payload = Some(Arriving::new(len, &mut self.input));
        }
        match self.payload.take_if(|payload| payload.is_complete()) {
            Some(payload) => self.decoder.request_with(payload.finish(&mut self.input)),
            None if self.payload.is_some() => None,
            None => self.decoder.request(&mut self.input),
        }
    }

    fn violation(&mut self, what: &str) -> Waiting {
        tracing::info!(peer = self.connection.peer(), "closing an NBD connection: {what}");
        self.end_requests()
    }

    fn end_requests(&mut self) -> Waiting {
        self.requests_over = true;
        self.input_over = true;
        Waiting::Over
    }

    fn start(&mut self, request: Request, cost: u64, stop: Stop) {
        count(&self.connection.requests, 1);
        let id = RequestId::from(&request.header);
        if self.agreed.export.resizable {
            self.agreed.export.size = self.target.device.size();
        }
        let action =
            if stop == Stop::No { check(request, &self.agreed) } else { Err(shutting_down()) };
        let action = match action {
            Ok(action) => action,
            Err(failure) => {
                self.running_cost -= cost;
                return self.reply(id, Err(failure));
            }
        };
        let ask_for_holes =
            self.agreed.mode.is_structured() && self.holes.are_worth_asking_for(&action);
        self.operation.set(execute(Arc::clone(&self.target), action, ask_for_holes));
        // The device is called here, in the order of arrival. The waker of this first poll is of
        // no use: what goes on is polled again.
        match running::poll(&mut self.operation, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(result) => {
                self.running_cost -= cost;
                self.reply(id, result);
            }
            Poll::Pending => {
                let operation = std::mem::replace(&mut self.operation, idle());
                self.running.push(id, cost, operation);
            }
        }
    }

    fn reply(&mut self, id: RequestId, result: Result<Content, Failure>) {
        match &result {
            Err(_) => count(&self.connection.errors, 1),
            Ok(Content::Chunks(chunks)) => self.holes.found(chunks),
            Ok(_) => {}
        }
        self.encoder.encode(id, result, &mut self.output);
    }

    fn next_cost(&mut self) -> u64 {
        match self.decoder.header(&mut self.input) {
            Ok(Some(header)) => self.cost(&header),
            _ => 0,
        }
    }

    /// What a request counts for while it is being worked on.
    fn cost(&self, header: &RequestHeader) -> u64 {
        let transfer = match header.command {
            Command::READ => header.len,
            Command::CACHE => header.len.min(CACHE_LEN),
            Command::BLOCK_STATUS => self.status_cost(header),
            _ => self.decoder.payload_len(header),
        };
        // What is longer is refused.
        BASE_COST + transfer.min(PAYLOAD_LEN_MAX.into())
    }

    /// The contexts that a payload would select are not known yet: all of them count.
    fn status_cost(&self, header: &RequestHeader) -> u64 {
        let one = header.flags.contains(CommandFlags::REQ_ONE);
        let extents_max = if one { 1 } else { EXTENTS_MAX as u64 };
        let contexts = self.target.contexts.len() as u64;
        self.decoder.payload_len(header) + contexts * extents_max * size_of::<Extent>() as u64
    }

    /// Whether a request may be started now. Once it is not, something of our own is going on
    /// whose end wakes us up.
    fn has_room(&self, cost: u64) -> bool {
        if self.running.is_empty() && self.output.is_empty() {
            return true;
        }
        let held = self.running_cost + self.output.len() as u64 + cost;
        self.running.len() < self.config.requests_in_flight_max
            && self.output.len() < OUTPUT_LEN_MAX
            && held <= self.config.connection_bytes_max
            && held <= self.budget.free()
    }

    fn settle(&mut self) {
        let now = self.running_cost + self.output.len() as u64;
        if now != self.held {
            self.budget.settle(self.held, now);
            self.held = now;
        }
    }

    fn send(&mut self, cx: &mut Context<'_>) {
        while !self.lost && !self.all_is_sent() {
            match self.send_some(cx) {
                Poll::Ready(Ok(())) => self.stall = None,
                Poll::Ready(Err(error)) => self.lose(&error),
                Poll::Pending => {
                    self.check_stall(cx);
                    break;
                }
            }
        }
        if self.lost {
            self.output = Output::new();
        }
        self.settle();
    }

    /// Writes what fits into one call; after the last of it, flushes.
    fn send_some(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut stream = Pin::new(&mut self.stream);
        if self.output.is_empty() {
            ready!(stream.poll_flush(cx))?;
            self.unflushed = false;
            return Poll::Ready(Ok(()));
        }
        let mut slices = [IoSlice::new(&[]); SLICES_MAX];
        let filled = self.output.slices(&mut slices);
        self.unflushed = true;
        let written = ready!(stream.as_mut().poll_write_vectored(cx, &slices[..filled]))?;
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.output.advance(written);
        count(&self.connection.bytes_sent, written as u64);
        Poll::Ready(Ok(()))
    }

    fn check_stall(&mut self, cx: &mut Context<'_>) {
        let Some(timeout) = self.config.write_timeout else { return };
        let stall = self
            .stall
            .get_or_insert_with(|| Box::pin(tokio::time::sleep_until(Instant::now() + timeout)));
        if stall.as_mut().poll(cx).is_ready() {
            self.lose(&io::ErrorKind::TimedOut.into());
        }
    }

    /// Reads what there is; whether there was something (the end counts).
    fn receive(&mut self, cx: &mut Context<'_>) -> bool {
        let read = match &mut self.payload {
            Some(payload) => payload.receive(&mut self.stream, cx),
            None => {
                let missing = self.decoder.missing(&self.input);
                let spare = self.input.capacity() - self.input.len();
                if spare < missing.max(self.read_len / 4) {
                    self.input.reserve(missing.max(self.read_len));
                }
                pin!(self.stream.read_buf(&mut self.input)).poll(cx)
            }
        };
        match read {
            Poll::Pending => return false,
            Poll::Ready(Ok(0)) => self.input_over = true,
            Poll::Ready(Ok(received)) => {
                count(&self.connection.bytes_received, received as u64);
                if received >= self.read_len {
                    self.read_len = (self.read_len * 2).min(READ_LEN_MAX);
                }
            }
            Poll::Ready(Err(error)) => self.lose(&error),
        }
        true
    }

    fn lose(&mut self, error: &io::Error) {
        tracing::debug!(peer = self.connection.peer(), %error, "an NBD connection was lost");
        self.lost = true;
        self.input_over = true;
        // Operations may still run for long; the client need not wait for them.
        let _ = self.stream.shutdown_now();
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        self.budget.settle(self.held, 0);
    }
}

/// Counters are written by one task only.
fn count(counter: &AtomicU64, amount: u64) {
    counter.fetch_add(amount, Ordering::Relaxed);
}

fn idle() -> Operation {
    Operation::new(std::future::pending())
}
