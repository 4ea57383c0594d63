//! When the workers of a guest ask for something.

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::time::Instant;

use crate::world::World;

#[derive(Debug, Default)]
struct State {
    /// Workers wait.
    paused: bool,
    ended: bool,
    busy: u64,
}

/// What the workers of a guest share.
pub(crate) struct Pace {
    world: Arc<World>,
    state: Mutex<State>,
}

/// A request that has begun; dropped: it has been answered.
pub(crate) struct Busy<'a>(&'a Pace);

impl Drop for Busy<'_> {
    fn drop(&mut self) {
        self.0.state().busy -= 1;
    }
}

impl Pace {
    pub(crate) fn new(world: &Arc<World>) -> Self {
        Pace { world: Arc::clone(world), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("one thread")
    }

    /// Returns when a worker may ask for something; false: the guest has ended.
    pub(crate) async fn wait(&self, pause_ms_max: u64) -> bool {
        loop {
            let pause = self.world.with_rng(|rng| rng.range(1, pause_ms_max));
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let (ended, paused) = {
                let state = self.state();
                (state.ended, state.paused)
            };
            if ended || self.world.is_violated() {
                return false;
            }
            if !paused {
                return true;
            }
        }
    }

    pub(crate) fn begin(&self) -> Busy<'_> {
        self.state().busy += 1;
        Busy(self)
    }

    /// Nothing new is asked for; returns when everything has been answered, or after `limit`.
    pub(crate) async fn pause(&self, limit: Duration) -> bool {
        self.state().paused = true;
        let until = Instant::now() + limit;
        while self.state().busy > 0 {
            if Instant::now() >= until {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        true
    }

    pub(crate) fn resume(&self) {
        self.state().paused = false;
    }

    pub(crate) fn end(&self) {
        self.state().ended = true;
    }
}
