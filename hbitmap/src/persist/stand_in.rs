//! What a simulator puts in the place of mapped files. No release has this.

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

/// Keeps files of maps.
pub trait MapStorage {
    /// Makes a file, on stable storage.
    ///
    /// # Errors
    /// [`io::ErrorKind::AlreadyExists`], or there is no space.
    fn create(&self, path: &Path, contents: Vec<u8>) -> io::Result<()>;

    /// Opens a file for nobody else.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`], or [`io::ErrorKind::WouldBlock`] if somebody else has it.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn MapMemory>>;

    /// Gives a file another name, in the place of whatever had it.
    ///
    /// # Errors
    /// There is no such file.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let _ = (from, to);
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Puts the names in a directory on stable storage.
    ///
    /// # Errors
    /// It failed, and it is unknown which are there.
    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        let _ = directory;
        Ok(())
    }

    /// Removes a file.
    ///
    /// # Errors
    /// [`io::ErrorKind::NotFound`].
    fn remove(&self, path: &Path) -> io::Result<()> {
        let _ = path;
        Err(io::ErrorKind::NotFound.into())
    }

    /// What tells one boot of the machine that has this file from every other.
    fn boot_id(&self, path: &Path) -> [u8; 16];
}

/// A mapped file, until it is dropped.
pub trait MapMemory: Send + Sync + fmt::Debug {
    /// Its length in bytes, a multiple of 8.
    fn len_bytes(&self) -> u64;

    /// The word at an index.
    fn load(&self, index: u64) -> u64;

    /// Stores a word; it outlives the process at once.
    fn store(&self, index: u64, value: u64);

    /// Puts a range of bytes on stable storage.
    ///
    /// # Errors
    /// It failed, and it is unknown what is there.
    fn flush(&self, bytes: Range<u64>) -> io::Result<()>;
}

thread_local! {
    static INSTALLED: RefCell<Option<Rc<dyn MapStorage>>> = const { RefCell::new(None) };
}

/// From now on this thread's maps lie there; with `None`, in mapped files again.
pub fn install(storage: Option<Rc<dyn MapStorage>>) {
    INSTALLED.set(storage);
}

pub(super) fn installed() -> Option<Rc<dyn MapStorage>> {
    INSTALLED.with_borrow(Clone::clone)
}
