//! Connections in memory: delayed, cut, or silent in one direction.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};

use brep_nbd::simulation::{Acceptor, Network, Pending, Pipe};
use brep_nbd::{Endpoint, Stream};
use tokio::io::ReadBuf;
use tokio::time::{Duration, Instant, Sleep};

use crate::world::{Inner, Life, Side, World, name};

/// Bytes that are on their way at a time, at most.
const BUFFER_BYTES: usize = 256 << 10;

/// How long it takes at most until what was lost is sent again.
const RETRY_MS_MAX: u64 = 1000;

/// The port of the replica, and that of guests.
pub(crate) const REPLICA_PORT: u16 = 1;
pub(crate) const GUEST_PORT: u16 = 2;

/// Where a process listens.
pub(crate) fn listen_at(life: Life, port: u16) -> Endpoint {
    Endpoint::Tcp { host: life.to_string(), port }
}

/// Where a process, or a guest beside a machine, connects.
pub(crate) fn reach(side: Side, from: Option<Life>, port: u16) -> Endpoint {
    let from = from.map_or_else(|| "guest".to_owned(), |life| life.to_string());
    // As a URI could have it, too.
    Endpoint::Tcp { host: format!("{}~{from}", name(side)), port }
}

fn parse_life(text: &str) -> Option<Life> {
    let (side, number) = text.split_once('.')?;
    let side = ["a", "b"].iter().position(|name| *name == side)?;
    Some(Life { side, number: number.parse().ok()? })
}

/// The network of a world.
pub(crate) struct Net(pub(crate) Arc<World>);

impl Network for Net {
    fn connect(&self, endpoint: &Endpoint) -> Pending<Stream> {
        let world = Arc::clone(&self.0);
        let endpoint = endpoint.clone();
        Box::pin(async move {
            let Endpoint::Tcp { host, port } = &endpoint else {
                return Err(io::ErrorKind::AddrNotAvailable.into());
            };
            let Some((to, from)) = host.split_once('~') else {
                return Err(io::ErrorKind::AddrNotAvailable.into());
            };
            let to = usize::from(to == "b");
            let from = parse_life(from);
            connect(&world, from, to, *port).await
        })
    }

    fn bind(&self, endpoint: &Endpoint) -> io::Result<Arc<dyn Acceptor>> {
        let Endpoint::Tcp { host, port } = endpoint else {
            return Err(io::ErrorKind::AddrNotAvailable.into());
        };
        let life = parse_life(host).ok_or(io::ErrorKind::AddrNotAvailable)?;
        let mut world = self.0.lock();
        let waiting = Arc::new(Waiting::default());
        if world.is_alive(life) {
            if world.listeners.contains_key(&(life.side, *port)) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            world.listeners.insert((life.side, *port), (life, Arc::clone(&waiting)));
        }
        drop(world);
        Ok(Arc::new(Listener { world: Arc::clone(&self.0), life, port: *port, waiting }))
    }
}

async fn connect(
    world: &Arc<World>,
    from: Option<Life>,
    to: Side,
    port: u16,
) -> io::Result<Stream> {
    if from.is_some_and(|life| !world.operate(life, 1)) {
        return std::future::pending().await;
    }
    if from.is_some() {
        let (down, stalled) = {
            let world = world.lock();
            (world.link.down, world.link.stalled != [false; 2])
        };
        if stalled {
            return std::future::pending().await;
        }
        if down {
            tokio::time::sleep(Duration::from_millis(1)).await;
            return Err(io::ErrorKind::HostUnreachable.into());
        }
    }
    let listener = world.lock().listeners.get(&(to, port)).cloned();
    let Some((life, waiting)) = listener else {
        return Err(io::ErrorKind::ConnectionRefused.into());
    };
    let there = Direction::new(from, Some(life));
    let back = Direction::new(Some(life), from);
    world.lock().directions.extend([Arc::clone(&there), Arc::clone(&back)]);
    let end = |life, incoming: &Arc<Direction>, outgoing: &Arc<Direction>| End {
        world: Arc::clone(world),
        life,
        incoming: Arc::clone(incoming),
        outgoing: Arc::clone(outgoing),
    };
    waiting.push(Stream::Simulated(Arc::new(end(Some(life), &there, &back))));
    Ok(Stream::Simulated(Arc::new(end(from, &back, &there))))
}

/// Those who have connected and are not accepted yet.
#[derive(Debug, Default)]
pub(crate) struct Waiting(Mutex<(VecDeque<Stream>, Option<Waker>)>);

impl Waiting {
    fn push(&self, stream: Stream) {
        let mut waiting = self.0.lock().expect("one thread");
        waiting.0.push_back(stream);
        if let Some(waker) = waiting.1.take() {
            waker.wake();
        }
    }

    fn poll(&self, cx: &mut Context<'_>) -> Poll<Stream> {
        let mut waiting = self.0.lock().expect("one thread");
        match waiting.0.pop_front() {
            Some(stream) => Poll::Ready(stream),
            None => {
                waiting.1 = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }
}

#[derive(Debug)]
struct Listener {
    world: Arc<World>,
    life: Life,
    port: u16,
    waiting: Arc<Waiting>,
}

impl Acceptor for Listener {
    fn accept(&self) -> Pending<Stream> {
        let waiting = Arc::clone(&self.waiting);
        Box::pin(async move { Ok(std::future::poll_fn(|cx| waiting.poll(cx)).await) })
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        let place = (self.life.side, self.port);
        let mut world = self.world.lock();
        let ours = world.listeners.get(&place).is_some_and(|(owner, _)| *owner == self.life);
        let removed = if ours { world.listeners.remove(&place) } else { None };
        drop(world);
        drop(removed);
    }
}

/// What flows one way.
#[derive(Debug)]
pub(crate) struct Direction {
    pub(crate) from: Option<Life>,
    pub(crate) to: Option<Life>,
    flow: Mutex<Flow>,
}

#[derive(Debug, Default)]
struct Flow {
    segments: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// The sender has ended: what was sent arrives, then the end.
    ended: bool,
    /// Nothing arrives any more, and both ends know.
    reset: bool,
    /// The receiver has gone.
    abandoned: bool,
    reader: Vec<Waker>,
    writer: Vec<Waker>,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Direction {
    fn new(from: Option<Life>, to: Option<Life>) -> Arc<Self> {
        Arc::new(Direction { from, to, flow: Mutex::default() })
    }

    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().expect("one thread")
    }

    /// A machine's process is no more. What it had sent still arrives.
    pub(crate) fn close(&self, side: Side) {
        let is_there = |life: Option<Life>| life.is_some_and(|life| life.side == side);
        let mut flow = self.flow();
        flow.ended |= is_there(self.from);
        flow.abandoned |= is_there(self.to);
    }

    /// What was sent arrives then, or later.
    fn hold_up(&self, until: Instant) {
        for (arrival, _) in &mut self.flow().segments {
            *arrival = until.max(*arrival);
        }
    }

    pub(crate) fn reset(&self) {
        let mut flow = self.flow();
        flow.reset = true;
        flow.segments.clear();
        flow.bytes = 0;
    }

    pub(crate) fn is_closed(&self) -> bool {
        let flow = self.flow();
        flow.reset || flow.ended && flow.abandoned
    }

    /// Whether it crosses the link between the machines.
    pub(crate) fn crosses(&self) -> bool {
        self.from.is_some() && self.to.is_some()
    }

    pub(crate) fn take_wakers(&self) -> Vec<Waker> {
        let mut flow = self.flow();
        let mut wakers = std::mem::take(&mut flow.reader);
        wakers.append(&mut flow.writer);
        wakers
    }

    fn wake(&self) {
        self.take_wakers().into_iter().for_each(Waker::wake);
    }
}

/// One end of a connection.
#[derive(Debug)]
struct End {
    world: Arc<World>,
    /// Whose it is; none: a guest's.
    life: Option<Life>,
    incoming: Arc<Direction>,
    outgoing: Arc<Direction>,
}

impl End {
    fn is_dead(&self) -> bool {
        self.life.is_some_and(|life| !self.world.is_alive(life))
    }

    /// Whether what comes in is held up.
    fn is_stalled(&self) -> bool {
        match (self.incoming.crosses(), self.incoming.from) {
            (true, Some(life)) => self.world.lock().link.stalled[life.side],
            _ => false,
        }
    }

    fn arrival(&self) -> Instant {
        let now = Instant::now();
        if !self.outgoing.crosses() {
            return now;
        }
        let mut world = self.world.lock();
        match world.link.delay_ms_max {
            0 => now,
            max => now + Duration::from_millis(world.rng.range(0, max)),
        }
    }
}

impl Pipe for End {
    fn poll_readable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_dead() {
            return Poll::Pending;
        }
        let stalled = self.is_stalled();
        let mut flow = self.incoming.flow();
        if flow.reset {
            return Poll::Ready(Ok(()));
        }
        if stalled {
            flow.reader.push(cx.waker().clone());
            return Poll::Pending;
        }
        match flow.segments.front() {
            None if flow.ended => Poll::Ready(Ok(())),
            None => {
                flow.reader.push(cx.waker().clone());
                Poll::Pending
            }
            Some((arrival, _)) if *arrival <= Instant::now() => Poll::Ready(Ok(())),
            Some((arrival, _)) => {
                let arrival = *arrival;
                let mut timer = Box::pin(tokio::time::sleep_until(arrival));
                let arrived = timer.as_mut().poll(cx).is_ready();
                flow.timer = Some(timer);
                flow.reader.push(cx.waker().clone());
                if arrived { Poll::Ready(Ok(())) } else { Poll::Pending }
            }
        }
    }

    fn poll_writable(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.is_dead() {
            return Poll::Pending;
        }
        let mut flow = self.outgoing.flow();
        if flow.reset || flow.abandoned || flow.ended || flow.bytes < BUFFER_BYTES {
            return Poll::Ready(Ok(()));
        }
        flow.writer.push(cx.waker().clone());
        Poll::Pending
    }

    fn try_read(&self, buffer: &mut ReadBuf<'_>) -> io::Result<()> {
        if self.life.is_some_and(|life| !self.world.operate(life, 2)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let stalled = self.is_stalled();
        let mut flow = self.incoming.flow();
        if flow.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if stalled {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let now = Instant::now();
        let wanted = buffer.remaining();
        while buffer.remaining() > 0 {
            let Some((arrival, data)) = flow.segments.front_mut() else { break };
            if *arrival > now {
                break;
            }
            let some = data.len().min(buffer.remaining());
            buffer.put_slice(&data[..some]);
            if some == data.len() {
                flow.segments.pop_front();
            } else {
                data.drain(..some);
            }
            flow.bytes -= some;
        }
        let wakers = std::mem::take(&mut flow.writer);
        let at_end = flow.segments.is_empty() && flow.ended;
        drop(flow);
        wakers.into_iter().for_each(Waker::wake);
        if wanted > 0 && buffer.remaining() == wanted && !at_end {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        Ok(())
    }

    fn try_write(&self, data: &[u8]) -> io::Result<usize> {
        if self.life.is_some_and(|life| !self.world.operate(life, 3)) {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.world.mix_bytes(data);
        let arrival = self.arrival();
        let mut flow = self.outgoing.flow();
        if flow.reset {
            return Err(io::ErrorKind::ConnectionReset.into());
        }
        if flow.abandoned || flow.ended {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let room = BUFFER_BYTES.saturating_sub(flow.bytes).min(data.len());
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let last = flow.segments.back().map_or(arrival, |(last, _)| *last);
        flow.segments.push_back((arrival.max(last), data[..room].to_vec()));
        flow.bytes += room;
        let wakers = std::mem::take(&mut flow.reader);
        drop(flow);
        wakers.into_iter().for_each(Waker::wake);
        Ok(room)
    }

    fn close(&self) {
        if !self.is_dead() {
            self.outgoing.flow().ended = true;
            self.outgoing.wake();
        }
    }

    fn abort(&self) {
        if self.is_dead() {
            return;
        }
        self.outgoing.flow().ended = true;
        {
            let mut incoming = self.incoming.flow();
            incoming.ended = true;
            incoming.abandoned = true;
            incoming.segments.clear();
            incoming.bytes = 0;
        }
        self.outgoing.wake();
        self.incoming.wake();
    }

    fn peer(&self) -> String {
        match self.incoming.from {
            Some(life) => format!("simulated {life}"),
            None => "simulated guest".to_owned(),
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.abort();
    }
}

impl World {
    /// Cuts every connection between the machines; those who sit there notice at once.
    pub(crate) fn cut_link(&self) {
        let crossing: Vec<_> = {
            let mut world = self.lock();
            let (crossing, rest) =
                std::mem::take(&mut world.directions).into_iter().partition(|d| d.crosses());
            world.directions = rest;
            crossing
        };
        for direction in &crossing {
            Direction::reset(direction);
            direction.wake();
        }
    }

    /// What a side sends arrives again: at once over new connections, and over those that were there
    /// when they try again.
    pub(crate) fn end_stall(&self, side: Side) {
        self.set_link(|link| link.stalled[side] = false);
        let mut world = self.lock();
        let Inner { rng, directions, .. } = &mut *world;
        let crossing = directions.iter().filter(|direction| {
            direction.crosses() && direction.from.is_some_and(|life| life.side == side)
        });
        for direction in crossing {
            let late = Duration::from_millis(rng.range(0, RETRY_MS_MAX));
            direction.hold_up(Instant::now() + late);
        }
    }

    /// Changes what is wrong with the link.
    pub(crate) fn set_link(&self, change: impl FnOnce(&mut crate::world::LinkFaults)) {
        change(&mut self.lock().link);
        let directions = self.lock().directions.clone();
        directions.iter().for_each(|direction| direction.wake());
    }
}
