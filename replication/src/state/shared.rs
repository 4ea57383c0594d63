use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{Record, RecordStore};
use crate::Result;

/// The record of a running side. Changes are the data thread's, one after the other; anybody may
/// look at what was saved last, and never waits for a file system over that.
#[derive(Debug)]
pub(crate) struct SharedRecord {
    store: Mutex<RecordStore>,
    saved: Mutex<Arc<Record>>,
}

impl SharedRecord {
    pub(crate) fn new(store: RecordStore) -> Self {
        let saved = Mutex::new(Arc::new(store.record().clone()));
        SharedRecord { store: Mutex::new(store), saved }
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
        store.update(change)?;
        *lock(&self.saved) = Arc::new(store.record().clone());
        Ok(())
    }

    /// Puts the record on stable storage. Waits as [`update`](Self::update) does.
    ///
    /// # Errors
    /// As [`RecordStore::sync`].
    pub(crate) fn sync(&self) -> Result<()> {
        lock(&self.store).sync()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
