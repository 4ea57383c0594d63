use std::fs::{File, TryLockError};
use std::ops::Deref;
use std::path::Path;

use crate::{Error, Result};

/// A file that nobody else uses. The lock ends with this value, or with the process.
#[derive(Debug)]
pub(super) struct LockedFile(File);

impl LockedFile {
    pub(super) fn lock(file: File, path: &Path) -> Result<LockedFile> {
        match file.try_lock() {
            Ok(()) => Ok(LockedFile(file)),
            Err(TryLockError::WouldBlock) => Err(Error::Locked { path: path.to_owned() }),
            Err(TryLockError::Error(error)) => Err(Error::io(path, "lock")(error)),
        }
    }
}

impl Deref for LockedFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.0
    }
}

impl Drop for LockedFile {
    fn drop(&mut self) {
        // Closing is not enough: a process that another thread is just starting has a copy of
        // the descriptor, and of the lock, until it executes its program. If this fails, closing
        // ends the lock all the same, only later.
        let _ = self.0.unlock();
    }
}
