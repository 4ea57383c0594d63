use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::storage;

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

    /// Puts the record on stable storage. Nobody is held up meanwhile.
    ///
    /// # Errors
    /// As [`RecordStore::sync`].
    pub(crate) async fn sync(&self) -> Result<()> {
        let (file, seq) = lock(&self.store).to_sync();
        let result = storage::sync(file).await;
        lock(&self.store).synced(seq, result)
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
        lock(&self.store).sync()
    }

    /// As [`secure`](Self::secure), in the same way.
    ///
    /// # Errors
    /// As [`RecordStore::sync`].
    pub(crate) fn secure_now(&self) -> Result<()> {
        let mut store = lock(&self.store);
        if store.is_secure() { Ok(()) } else { store.sync() }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
