//! A connection whose other end is bytes.

use std::future::Future;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use brep_nbd::proto::server::{ExportInfo, Handshake, Step};
use brep_nbd::simulation::{self, Acceptor, Network, Pending, Pipe};
use brep_nbd::{Endpoint, Stream};
use bytes::BytesMut;
use tokio::io::ReadBuf;

/// Longer than every deadline of ours; time passes only while nobody has anything to do.
const FOR_EVER: Duration = Duration::from_secs(100_000);

/// In which pieces bytes arrive, and are taken.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Pace {
    /// All at once.
    Whole,
    /// A few at a time, with pauses: the pieces follow from this number.
    Pieces(u64),
}

impl Pace {
    /// How much of `len` bytes goes in this turn.
    fn next(&mut self, len: usize) -> usize {
        const LENGTHS: [usize; 8] = [1, 2, 3, 5, 16, 28, 100, 5000];
        match self {
            Pace::Whole => len,
            Pace::Pieces(state) => {
                // xorshift: any sequence will do, as long as it is always the same.
                *state ^= *state << 13;
                *state ^= *state >> 7;
                *state ^= *state << 17;
                LENGTHS[(*state % 8) as usize].min(len)
            }
        }
    }
}

/// The other end of the one connection of a run.
#[derive(Debug, Clone)]
pub(crate) struct Other(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// What the program under test has yet to read.
    input: BytesMut,
    /// There will be no more.
    ended: bool,
    /// What it has written, from the end of a handshake that was answered on.
    output: Vec<u8>,
    /// Answers what is written, until the transmission phase begins.
    handshake: Option<(Box<Handshake>, BytesMut)>,
    reading: Pace,
    writing: Pace,
    reader: Option<Waker>,
    /// The program has let go of the connection.
    closed: bool,
    watcher: Option<Waker>,
}

impl Other {
    /// Sends `input`, and nothing else.
    pub(crate) fn sends(input: &[u8], pace: Pace) -> Self {
        Self::new(input, None, pace)
    }

    /// Shakes hands as a server of ours does, then waits for [`send`](Self::send).
    pub(crate) fn shakes_hands(pace: Pace) -> Self {
        let mut handshake = Handshake::new();
        let greeting = handshake.take_output();
        Self::new(&greeting, Some(handshake), pace)
    }

    fn new(input: &[u8], handshake: Option<Handshake>, pace: Pace) -> Self {
        Other(Arc::new(Mutex::new(State {
            ended: handshake.is_none(),
            input: input.into(),
            output: Vec::new(),
            handshake: handshake.map(|handshake| (Box::new(handshake), BytesMut::new())),
            reading: pace,
            writing: pace,
            reader: None,
            closed: false,
            watcher: None,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().expect("one thread")
    }

    /// Sends this, then the end.
    pub(crate) fn send(&self, bytes: &[u8]) {
        let mut state = self.lock();
        state.input.extend_from_slice(bytes);
        state.ended = true;
        state.reader.take().into_iter().for_each(Waker::wake);
    }

    /// What was written to it.
    pub(crate) fn received(&self) -> Vec<u8> {
        self.lock().output.clone()
    }

    /// Resolves when the program has let go of the connection.
    ///
    /// # Panics
    /// It never does.
    pub(crate) async fn closed(&self) {
        let closed = std::future::poll_fn(|cx| {
            let mut state = self.lock();
            state.watcher = Some(cx.waker().clone());
            if state.closed { Poll::Ready(()) } else { Poll::Pending }
        });
        finite(closed).await;
    }
}

/// The result of what has to end.
///
/// # Panics
/// It does not.
pub(crate) async fn finite<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(FOR_EVER, work).await.expect("what hangs for ever")
}

/// Runs `work` in a world in which every connection leads to `other`, and time passes as soon as
/// there is nothing to do.
pub(crate) fn run<T>(other: &Other, work: impl Future<Output = T>) -> T {
    simulation::install(Some(Rc::new(Wire(other.clone()))));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime without I/O");
    let result = runtime.block_on(work);
    drop(runtime);
    simulation::install(None);
    result
}

/// The address that leads to the other end.
pub(crate) fn endpoint() -> Endpoint {
    Endpoint::Tcp { host: "fuzz".to_owned(), port: 0 }
}

impl State {
    fn hear(&mut self, data: &[u8]) {
        let Some((handshake, heard)) = &mut self.handshake else {
            return self.output.extend_from_slice(data);
        };
        heard.extend_from_slice(data);
        loop {
            let step = handshake.step(heard);
            self.input.extend_from_slice(&handshake.take_output());
            match step {
                Step::Open(_) => handshake.opened(Ok(export())),
                Step::Transmission(_) => {
                    self.output = heard.to_vec();
                    self.handshake = None;
                    break;
                }
                Step::Input(_) => break,
                other => unreachable!("a client of ours led to {other:?}"),
            }
        }
        self.reader.take().into_iter().for_each(Waker::wake);
    }
}

/// What the other end serves after a handshake.
fn export() -> ExportInfo {
    ExportInfo {
        canonical_name: "disk".to_owned(),
        description: String::new(),
        size: crate::server::DISK_LEN,
        read_only: false,
        resizable: false,
        multi_conn: true,
        block_size: 1,
        preferred_size: 4096,
        contexts: Vec::new(),
    }
}

#[derive(Debug)]
struct Wire(Other);

impl Network for Wire {
    fn connect(&self, _: &Endpoint) -> Pending<Stream> {
        let end = End(self.0.clone());
        Box::pin(async move { Ok(Stream::Simulated(Arc::new(end))) })
    }

    fn bind(&self, _: &Endpoint) -> io::Result<Arc<dyn Acceptor>> {
        Ok(Arc::new(Once(Mutex::new(Some(self.0.clone())))))
    }
}

/// Accepts one connection.
#[derive(Debug)]
struct Once(Mutex<Option<Other>>);

impl Acceptor for Once {
    fn accept(&self) -> Pending<Stream> {
        let other = self.0.lock().expect("one thread").take();
        Box::pin(async move {
            match other {
                Some(other) => Ok(Stream::Simulated(Arc::new(End(other)))),
                None => std::future::pending().await,
            }
        })
    }
}

/// The program's end.
#[derive(Debug)]
struct End(Other);

impl Drop for End {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        state.watcher.take().into_iter().for_each(Waker::wake);
    }
}

impl Pipe for End {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.0.lock();
        if state.input.is_empty() && !state.ended {
            state.reader = Some(cx.waker().clone());
            return Poll::Pending;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_writable(&self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn try_read(&self, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
        let mut state = self.0.lock();
        let most = buffer.remaining().min(state.input.len());
        let len = state.reading.next(most);
        buffer.put_slice(&state.input.split_to(len));
        Ok(())
    }

    fn try_write(&self, data: &[u8]) -> io::Result<usize> {
        let mut state = self.0.lock();
        let len = state.writing.next(data.len());
        state.hear(&data[..len]);
        Ok(len)
    }

    fn close(&self) {}

    fn abort(&self) {
        let mut state = self.0.lock();
        state.input.clear();
        state.ended = true;
        state.reader.take().into_iter().for_each(Waker::wake);
    }

    fn peer(&self) -> String {
        "fuzz".to_owned()
    }
}
