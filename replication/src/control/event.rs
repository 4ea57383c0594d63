use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tokio::sync::broadcast;

use super::json::to_line;

/// How many events a client may be behind before it loses the oldest.
const BACKLOG_EVENTS: usize = 256;

/// Carries events to every client of the control socket. Cloning it gives another sender.
///
/// Sending never waits. A client that reads too slowly loses its oldest events, and is told how
/// many by an event `EVENTS_LOST`.
#[derive(Debug, Clone)]
pub struct EventBus(broadcast::Sender<Arc<[u8]>>);

impl EventBus {
    /// A bus without listeners.
    pub fn new() -> Self {
        EventBus(broadcast::Sender::new(BACKLOG_EVENTS))
    }

    /// Sends an event to all clients that have negotiated. `name` is in capitals with
    /// underscores; `data` is an object, or null for an event without data.
    pub fn emit(&self, name: &str, data: Value) {
        if self.0.receiver_count() > 0 {
            // The last listener may just have left: then nobody misses the event.
            let _ = self.0.send(event_line(name, data).into());
        }
    }

    pub(super) fn subscribe(&self) -> broadcast::Receiver<Arc<[u8]>> {
        self.0.subscribe()
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
