use std::sync::{Arc, Mutex, PoisonError};

use brep_quorum::RateLimit;
use serde_json::{Value, json};
use tokio::sync::broadcast::error::{RecvError, TryRecvError};
use tokio::sync::{Notify, broadcast};

use super::json::to_line;
use crate::errors::since_1970;

/// How many events a client may be behind before it loses the oldest.
const BACKLOG_EVENTS: usize = 256;

/// Events that are sent at most once a second, and the member of their data, if any, by which they
/// are told apart.
const LIMITED: &[(&str, Option<&str>)] =
    &[("QUORUM_REPORT_BAD", Some("node-name")), ("QUORUM_FAILURE", None)];

type Line = Arc<[u8]>;

/// Carries events to every client of the control socket. Cloning it gives another sender.
///
/// Events are numbered from 1 in the order in which they are sent. Sending never waits. A client
/// that reads too slowly loses its oldest events, and is told how many by an event `EVENTS_LOST`
/// of its own, without a number. `QUORUM_REPORT_BAD`, for each node, and `QUORUM_FAILURE` are
/// sent at most once a second: of those that come meanwhile, the last.
#[derive(Debug, Clone)]
pub struct EventBus {
    stream: Arc<Stream>,
    limited: RateLimit<String, Value>,
}

/// The events that are sent, in their order.
#[derive(Debug)]
struct Stream {
    lines: broadcast::Sender<Line>,
    /// Number of the last event. Held while one is sent, so that numbers ascend for everybody.
    sequence: Mutex<u64>,
    sent: Notify,
}

impl Stream {
    fn send(&self, mut event: Value) {
        let mut sequence = self.sequence.lock().unwrap_or_else(PoisonError::into_inner);
        *sequence += 1;
        if self.lines.receiver_count() > 0 {
            event["sequence"] = json!(*sequence);
            // The last listener may just have left: then nobody misses the event.
            drop(self.lines.send(to_line(&event).into()));
        }
        drop(sequence);
        self.sent.notify_one();
    }
}

impl EventBus {
    /// A bus without listeners.
    pub fn new() -> Self {
        let stream = Arc::new(Stream {
            lines: broadcast::Sender::new(BACKLOG_EVENTS),
            sequence: Mutex::new(0),
            sent: Notify::new(),
        });
        let sender = Arc::clone(&stream);
        EventBus { stream, limited: RateLimit::new(move |event| sender.send(event)) }
    }

    /// Sends an event to all clients that have negotiated. `name` is in capitals with
    /// underscores; `data` is an object, or null for an event without data.
    pub fn emit(&self, name: &str, data: Value) {
        let limit = LIMITED.iter().find(|(limited, _)| *limited == name);
        let kind = limit.map(|(name, member)| {
            let member = member.and_then(|m| data.get(m)).and_then(Value::as_str);
            format!("{name} {}", member.unwrap_or_default())
        });
        let event = event(name, data);
        match kind {
            Some(kind) => self.limited.send(kind, event),
            None => self.stream.send(event),
        }
    }

    /// Number of the last event that was sent; 0 before the first.
    pub fn sequence(&self) -> u64 {
        *self.stream.sequence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until an event has been sent since this was last waited for, by one waiter.
    pub(super) async fn sent(&self) {
        self.stream.sent.notified().await;
    }

    pub(super) fn subscribe(&self) -> Subscription {
        Subscription(self.stream.lines.subscribe())
    }

    /// The events that are sent from now on.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn listen(&self) -> Listener {
        Listener(self.subscribe())
    }
}

/// The events for one client.
#[derive(Debug)]
pub(super) struct Subscription(broadcast::Receiver<Line>);

impl Subscription {
    /// The next line for this client. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> Line {
        match self.0.recv().await {
            Ok(event) => event,
            Err(RecvError::Lagged(count)) => lost(count),
            Err(RecvError::Closed) => std::future::pending().await,
        }
    }

    /// What has been sent already, and not taken.
    pub(super) fn waiting(&mut self) -> Option<Line> {
        match self.0.try_recv() {
            Ok(event) => Some(event),
            Err(TryRecvError::Lagged(count)) => Some(lost(count)),
            Err(TryRecvError::Empty | TryRecvError::Closed) => None,
        }
    }
}

fn lost(count: u64) -> Line {
    to_line(&event("EVENTS_LOST", json!({ "count": count }))).into()
}

/// Takes events in a test.
#[cfg(any(test, feature = "simulation"))]
pub(crate) struct Listener(Subscription);

#[cfg(any(test, feature = "simulation"))]
impl Listener {
    /// An event that was sent and not taken.
    pub(crate) fn next(&mut self) -> Option<Value> {
        serde_json::from_slice(&self.0.waiting()?).ok()
    }
}

impl Default for EventBus {
    fn default() -> Self {
        Self::new()
    }
}

/// An event with the time of this call.
fn event(name: &str, data: Value) -> Value {
    let (seconds, microseconds) = match since_1970() {
        Some(now) => (i64::try_from(now.as_secs()).unwrap_or(-1), i64::from(now.subsec_micros())),
        None => (-1, -1),
    };
    let timestamp = json!({ "seconds": seconds, "microseconds": microseconds });
    let mut event = json!({ "event": name, "timestamp": timestamp });
    if !data.is_null() {
        event["data"] = data;
    }
    event
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn quorum_events_come_once_a_second_and_the_last_wins() {
        let bus = EventBus::new();
        let mut listener = bus.listen();
        for sector in 0..3 {
            for node in ["a", "b"] {
                let data = json!({ "node-name": node, "sector-num": sector });
                bus.emit("QUORUM_REPORT_BAD", data);
            }
            bus.emit("QUORUM_FAILURE", json!({ "sector-num": sector }));
            bus.emit("STOP", Value::Null);
        }
        let mut taken = || {
            let of = |event: Value| {
                let text = |member: &str| event["data"][member].as_str().unwrap_or("-").to_owned();
                let name = event["event"].as_str().unwrap().to_owned();
                (name, text("node-name"), event["data"]["sector-num"].as_u64())
            };
            std::iter::from_fn(|| listener.next()).map(of).collect::<Vec<_>>()
        };
        let bad = |node: &str, sector| ("QUORUM_REPORT_BAD".to_owned(), node.to_owned(), sector);
        let failure = |sector| ("QUORUM_FAILURE".to_owned(), "-".to_owned(), sector);
        let stop = ("STOP".to_owned(), "-".to_owned(), None);
        let first = [bad("a", Some(0)), bad("b", Some(0)), failure(Some(0))];
        let at_once: Vec<_> = first.into_iter().chain(std::iter::repeat_n(stop, 3)).collect();
        assert_eq!(taken(), at_once);
        tokio::time::sleep(Duration::from_millis(1001)).await;
        let mut later = taken();
        later.sort();
        assert_eq!(later, [failure(Some(2)), bad("a", Some(2)), bad("b", Some(2))]);
        tokio::time::sleep(Duration::from_millis(1001)).await;
        bus.emit("QUORUM_FAILURE", json!({ "sector-num": 9 }));
        assert_eq!(taken(), [failure(Some(9))]);
    }

    #[tokio::test(start_paused = true)]
    async fn events_are_numbered_in_the_order_in_which_they_are_sent() {
        let bus = EventBus::new();
        bus.emit("STOP", Value::Null);
        assert_eq!(bus.sequence(), 1, "an event that nobody hears has a number too");
        let mut listener = bus.listen();
        // Two of the three are put off; the second never comes.
        for sector in 0..3 {
            bus.emit("QUORUM_FAILURE", json!({ "sector-num": sector }));
        }
        bus.emit("STOP", Value::Null);
        tokio::time::sleep(Duration::from_millis(1001)).await;
        let heard: Vec<_> = std::iter::from_fn(|| listener.next()).collect();
        let numbers: Vec<_> = heard.iter().map(|event| event["sequence"].as_u64()).collect();
        assert_eq!(numbers, [Some(2), Some(3), Some(4)]);
        assert_eq!(heard[2]["data"]["sector-num"], 2);
        assert_eq!(bus.sequence(), 4);
    }
}
