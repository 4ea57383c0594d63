//! What a simulator puts in the place of things outside: randomness, and the control socket. No
//! release has this.
//!
//! The rest is elsewhere: files in `brep_block::storage` and `brep_hbitmap::persist`, connections
//! in `brep_nbd::simulation`; the clock is tokio's.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;

use crate::control::{EventBus, Handler, Listener};

type Random = Box<dyn FnMut() -> [u8; 16]>;

/// What stands in the place of a control socket.
#[derive(Clone)]
pub struct Control {
    /// Carries the commands out.
    pub handler: Arc<dyn Handler>,
    events: Arc<Mutex<Listener>>,
}

impl Control {
    pub(crate) fn new(handler: Arc<dyn Handler>, events: &EventBus) -> Self {
        Control { handler, events: Arc::new(Mutex::new(events.listen())) }
    }

    /// An event that was sent and not taken.
    #[must_use]
    pub fn next_event(&self) -> Option<Value> {
        self.events.lock().unwrap_or_else(PoisonError::into_inner).next()
    }
}

#[derive(Default)]
struct World {
    random: Option<Random>,
    controls: BTreeMap<PathBuf, Control>,
}

thread_local! {
    static WORLD: RefCell<World> = RefCell::default();
}

/// From now on identities come from `random` in this thread, and control sockets are only known
/// to [`control`]. `None` ends that.
pub fn install(random: Option<Random>) {
    WORLD.set(World { random, controls: BTreeMap::new() });
}

/// Whether this thread simulates.
pub(crate) fn is_installed() -> bool {
    WORLD.with_borrow(|world| world.random.is_some())
}

/// The control socket of this path, if a side serves it.
#[must_use]
pub fn control(path: &Path) -> Option<Control> {
    WORLD.with_borrow(|world| world.controls.get(path).cloned())
}

pub(crate) fn random_bytes() -> Option<[u8; 16]> {
    WORLD.with_borrow_mut(|world| world.random.as_mut().map(|random| random()))
}

/// Takes the place of a control socket; `false` if nothing is simulated.
pub(crate) fn serve(path: &Path, control: Control) -> bool {
    WORLD.with_borrow_mut(|world| {
        let simulated = world.random.is_some();
        if simulated {
            world.controls.insert(path.to_owned(), control);
        }
        simulated
    })
}
