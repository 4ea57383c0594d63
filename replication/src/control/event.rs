use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use brep_quorum::RateLimit;
use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::json::to_line;

/// How many events a client may be behind before it loses the oldest.
const BACKLOG_EVENTS: usize = 256;

/// Events that are sent at most once a second, and the member of their data, if any, by which they
/// are told apart.
const LIMITED: &[(&str, Option<&str>)] =
    &[("QUORUM_REPORT_BAD", Some("node-name")), ("QUORUM_FAILURE", None)];

type Line = Arc<[u8]>;

/// Carries events to every client of the control socket. Cloning it gives another sender.
///
/// Sending never waits. A client that reads too slowly loses its oldest events, and is told how
/// many by an event `EVENTS_LOST`. `QUORUM_REPORT_BAD`, for each node, and `QUORUM_FAILURE` are
/// sent at most once a second: of those that come meanwhile, the last.
#[derive(Debug, Clone)]
pub struct EventBus {
    lines: broadcast::Sender<Line>,
    limited: RateLimit<String, Line>,
}

impl EventBus {
    /// A bus without listeners.
    pub fn new() -> Self {
        let lines = broadcast::Sender::new(BACKLOG_EVENTS);
        let sender = lines.clone();
        // The last listener may just have left: then nobody misses the event.
        let limited = RateLimit::new(move |line| drop(sender.send(line)));
        EventBus { lines, limited }
    }

    /// Sends an event to all clients that have negotiated. `name` is in capitals with
    /// underscores; `data` is an object, or null for an event without data.
    pub fn emit(&self, name: &str, data: Value) {
        if self.lines.receiver_count() == 0 {
            return;
        }
        let limit = LIMITED.iter().find(|(limited, _)| *limited == name);
        let kind = limit.map(|(name, member)| {
            let member = member.and_then(|m| data.get(m)).and_then(Value::as_str);
            format!("{name} {}", member.unwrap_or_default())
        });
        let line = event_line(name, data).into();
        match kind {
            Some(kind) => self.limited.send(kind, line),
            None => drop(self.lines.send(line)),
        }
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Line> {
        self.lines.subscribe()
    }

    /// The events that are sent from now on.
    #[cfg(any(test, feature = "simulation"))]
    pub(crate) fn listen(&self) -> Listener {
        Listener(self.subscribe())
    }
}

/// Takes events in a test.
#[cfg(any(test, feature = "simulation"))]
pub(crate) struct Listener(broadcast::Receiver<Line>);

#[cfg(any(test, feature = "simulation"))]
impl Listener {
    /// An event that was sent and not taken.
    pub(crate) fn next(&mut self) -> Option<Value> {
        let line = self.0.try_recv().ok()?;
        serde_json::from_slice(&line).ok()
    }
}

impl Default for EventBus {
    fn default() -> Self {
        Self::new()
    }
}

/// An event as it is sent, with the time of this call.
pub(super) fn event_line(name: &str, data: Value) -> Vec<u8> {
    let (seconds, microseconds) = match SystemTime::now().duration_since(UNIX_EPOCH) {
        Ok(now) => (i64::try_from(now.as_secs()).unwrap_or(-1), i64::from(now.subsec_micros())),
        Err(_) => (-1, -1),
    };
    let timestamp = json!({ "seconds": seconds, "microseconds": microseconds });
    let mut event = json!({ "event": name, "timestamp": timestamp });
    if !data.is_null() {
        event["data"] = data;
    }
    to_line(&event)
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
}
