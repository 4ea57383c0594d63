use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use brep_block::{detach, storage};
use serde_json::json;

use super::store::RESTART;
use super::{Record, RecordStore};
use crate::control::EventBus;
use crate::{Error, Result};

/// The record of a running side. Changes are the data thread's, one after the other; anybody may
/// look at what was saved last, and never waits for a file system over that.
#[derive(Debug)]
pub(crate) struct SharedRecord {
    store: Arc<Mutex<RecordStore>>,
    saved: Mutex<Arc<Record>>,
    failure: Arc<Failure>,
}

/// That a save has failed, and who is told.
#[derive(Debug)]
struct Failure {
    reason: Arc<OnceLock<String>>,
    told: AtomicBool,
    events: EventBus,
}

impl Failure {
    /// Tells it, once, if there was one.
    fn tell(&self) {
        if let Some(reason) = self.reason.get()
            && !self.told.swap(true, Ordering::Relaxed)
        {
            tracing::error!(reason, "nothing more is recorded: {RESTART}");
            self.events.emit("BREP_STATE_FAILED", json!({ "reason": reason }));
        }
    }
}

impl SharedRecord {
    pub(crate) fn new(store: RecordStore, events: &EventBus) -> Self {
        let saved = Mutex::new(Arc::new(store.record().clone()));
        let (reason, events) = (store.failure(), events.clone());
        let failure = Arc::new(Failure { reason, told: AtomicBool::new(false), events });
        SharedRecord { store: Arc::new(Mutex::new(store)), saved, failure }
    }

    /// Why nothing more can be recorded, if a save has failed. Never waits.
    pub(crate) fn failure(&self) -> Option<&str> {
        self.failure.reason.get().map(String::as_str)
    }

    /// Whether changes can still be recorded.
    ///
    /// # Errors
    /// They cannot.
    pub(crate) fn check(&self) -> Result<()> {
        self.failure().map_or(Ok(()), |reason| Err(Error::failed(format!("{reason}; {RESTART}"))))
    }

    /// The record as last saved.
    pub(crate) fn get(&self) -> Arc<Record> {
        Arc::clone(&lock(&self.saved))
    }

    /// Changes the record; it is saved when this returns. Waits for the file system: whatever
    /// queries need is not to be locked meanwhile.
    ///
    /// # Errors
    /// As [`RecordStore::update`].
    pub(crate) fn update(&self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut store = lock(&self.store);
        store.update(change).inspect_err(|_| self.failure.tell())?;
        *lock(&self.saved) = Arc::new(store.record().clone());
        Ok(())
    }

    /// Puts the record on stable storage. Nobody is held up meanwhile. Whoever waits for it may give
    /// up; it goes on, and a failure is noted: the kernel tells of one only once.
    ///
    /// # Errors
    /// As [`RecordStore::sync`].
    pub(crate) async fn sync(&self) -> Result<()> {
        let (store, failure) = (Arc::clone(&self.store), Arc::clone(&self.failure));
        let (file, seq) = lock(&store).to_sync();
        detach(async move {
            let result = storage::sync(file).await;
            #[cfg(test)]
            {
                let path = lock(&store).path();
                super::faults::until_synced(&path).await;
            }
            lock(&store).synced(seq, result).inspect_err(|_| failure.tell())
        })
        .await
    }

    /// Puts the record on stable storage if power losses count and it is not there.
    ///
    /// # Errors
    /// As [`RecordStore::sync`].
    pub(crate) async fn secure(&self) -> Result<()> {
        let safe = lock(&self.store).is_secure();
        if safe { Ok(()) } else { self.sync().await }
    }

    /// As [`sync`](Self::sync), for what is rare and cannot be interrupted. Waits as
    /// [`update`](Self::update) does.
    ///
    /// # Errors
    /// As [`RecordStore::sync`].
    pub(crate) fn sync_now(&self) -> Result<()> {
        lock(&self.store).sync().inspect_err(|_| self.failure.tell())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
