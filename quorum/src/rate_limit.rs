use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The time in which at most one event of a kind is sent.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lets the first event of a kind pass at once, and then at most one per second: the last one,
/// when the second is over.
///
/// Cloning it gives the same limiter.
pub struct RateLimit<K, E>(Arc<Shared<K, E>>);

struct Shared<K, E> {
    send: Box<dyn Fn(E) + Send + Sync>,
    /// Seconds that are running, each with the event that waits for its end. Bounded by the
    /// number of kinds; each has one task.
    seconds: Mutex<HashMap<K, Option<E>>>,
}

impl<K, E> RateLimit<K, E>
where
    K: Clone + Eq + Hash + Send + 'static,
    E: Send + 'static,
{
    /// A limiter in front of `send`, which must not block.
    pub fn new(send: impl Fn(E) + Send + Sync + 'static) -> Self {
        RateLimit(Arc::new(Shared { send: Box::new(send), seconds: Mutex::default() }))
    }

    /// Sends an event of a kind, now or later, unless a later one of its kind comes before. Outside
    /// of a tokio runtime there is no clock to limit by: everything is sent.
    pub fn send(&self, kind: K, event: E) {
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            if let Some(waiting) = self.0.seconds().get_mut(&kind) {
                *waiting = Some(event);
                return;
            }
            self.0.seconds().insert(kind.clone(), None);
            let shared = Arc::clone(&self.0);
            runtime.spawn(async move { shared.run_seconds(kind).await });
        }
        (self.0.send)(event);
    }
}

impl<K: Eq + Hash, E> Shared<K, E> {
    /// One second after the other, until one passes without an event.
    async fn run_seconds(&self, kind: K) {
        loop {
            tokio::time::sleep(INTERVAL).await;
            let waiting = {
                let mut seconds = self.seconds();
                let waiting = seconds.get_mut(&kind).and_then(Option::take);
                if waiting.is_none() {
                    seconds.remove(&kind);
                }
                waiting
            };
            match waiting {
                Some(event) => (self.send)(event),
                None => return,
            }
        }
    }

    fn seconds(&self) -> MutexGuard<'_, HashMap<K, Option<E>>> {
        self.seconds.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K, E> Clone for RateLimit<K, E> {
    fn clone(&self) -> Self {
        RateLimit(Arc::clone(&self.0))
    }
}

impl<K, E> fmt::Debug for RateLimit<K, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("RateLimit")
    }
}
