//! Where the files of a replicating side lie: its disks and buffers, its state record, whatever
//! else its state directory holds.
//!
//! That is the file system. The feature `simulation`, which no release has, lets a thread put
//! something else in its place, so that a history with power losses and failing disks runs in
//! memory. Code that a simulation takes part in opens files through these functions only.

mod file_system;
#[cfg(feature = "simulation")]
mod stand_in;

use std::ffi::OsString;
use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::{BlockDevice, RawFileOptions, Result};

pub use file_system::FileSystem;
#[cfg(feature = "simulation")]
pub use stand_in::install;

/// Somewhere to keep files.
pub trait Storage: fmt::Debug {
    /// Opens a disk, or makes it; see [`RawFile::open`](crate::RawFile::open).
    ///
    /// # Errors
    /// As there.
    fn open_disk(&self, path: &Path, options: RawFileOptions) -> Result<Arc<dyn BlockDevice>>;

    /// Opens a small file for reading and writing, locked for this process; makes an empty one,
    /// with mode 0600, if there is none, and puts its name on stable storage.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] if somebody else has it open; else what the operating system
    /// says.
    fn open_file(&self, path: &Path) -> io::Result<Arc<dyn PlainFile>>;

    /// Makes a directory and those above it, if they are missing, and puts their names on stable
    /// storage; its mode is 0700 afterwards.
    ///
    /// # Errors
    /// What the operating system says.
    fn create_dir(&self, path: &Path) -> io::Result<()>;

    /// Puts on stable storage which files a directory has, and under which names.
    ///
    /// # Errors
    /// What the operating system says.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;

    /// The names of what lies in a directory, sorted.
    ///
    /// # Errors
    /// What the operating system says.
    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>>;

    /// Whether there is something under this name.
    fn exists(&self, path: &Path) -> bool;

    /// Gives a file another name, in the place of whatever had it.
    ///
    /// # Errors
    /// What the operating system says.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;

    /// Removes a file.
    ///
    /// # Errors
    /// What the operating system says.
    fn remove(&self, path: &Path) -> io::Result<()>;

    /// What tells one boot of the machine under `path` from every other, if it says. A file system
    /// that lies on another machine says nothing: that one loses its power alone.
    fn boot_id(&self, path: &Path) -> Option<String>;
}

/// A small file that is read and written in place. Nothing here waits for anybody but the disk.
pub trait PlainFile: Send + Sync + fmt::Debug {
    /// Its length in bytes.
    ///
    /// # Errors
    /// What the operating system says.
    fn len(&self) -> io::Result<u64>;

    /// Whether it has no bytes.
    ///
    /// # Errors
    /// What the operating system says.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads exactly as many bytes as fit.
    ///
    /// # Errors
    /// [`io::ErrorKind::UnexpectedEof`] if the file ends before; else what the operating system
    /// says.
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `data`, beyond the end too. It survives the end of the process.
    ///
    /// # Errors
    /// What the operating system says; then some of it may have been written.
    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()>;

    /// Puts everything that was written on stable storage.
    ///
    /// # Errors
    /// What the operating system says; then it is unknown what is there.
    fn sync_data(&self) -> io::Result<()>;
}

fn on<T>(work: impl FnOnce(&dyn Storage) -> T) -> T {
    #[cfg(feature = "simulation")]
    if let Some(storage) = stand_in::installed() {
        return work(&*storage);
    }
    work(&FileSystem)
}

/// Puts everything that was written to a file on stable storage. Waits for the disk beside the
/// thread, inside a tokio runtime.
///
/// # Errors
/// As [`PlainFile::sync_data`].
pub async fn sync(file: Arc<dyn PlainFile>) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if stand_in::installed().is_some() {
        return file.sync_data();
    }
    tokio::task::spawn_blocking(move || file.sync_data()).await.map_err(io::Error::other)?
}

/// Does what waits for a disk beside the thread, inside a tokio runtime; a simulation has nobody
/// else to do it.
///
/// # Errors
/// The runtime is going away.
pub async fn beside<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
    #[cfg(feature = "simulation")]
    if stand_in::installed().is_some() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)
}

/// See [`Storage::open_disk`].
///
/// # Errors
/// As there.
pub fn open_disk(path: impl AsRef<Path>, options: RawFileOptions) -> Result<Arc<dyn BlockDevice>> {
    on(|storage| storage.open_disk(path.as_ref(), options))
}

/// See [`Storage::open_file`].
///
/// # Errors
/// As there.
pub fn open_file(path: impl AsRef<Path>) -> io::Result<Arc<dyn PlainFile>> {
    on(|storage| storage.open_file(path.as_ref()))
}

/// See [`Storage::create_dir`].
///
/// # Errors
/// As there.
pub fn create_dir(path: impl AsRef<Path>) -> io::Result<()> {
    on(|storage| storage.create_dir(path.as_ref()))
}

/// See [`Storage::sync_dir`]. Waits for the disk beside the thread, inside a tokio runtime.
///
/// # Errors
/// As there.
pub async fn sync_dir(path: impl AsRef<Path>) -> io::Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(storage) = stand_in::installed() {
        return storage.sync_dir(path.as_ref());
    }
    let path = path.as_ref().to_owned();
    let work = move || FileSystem.sync_dir(&path);
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

/// See [`Storage::list`].
///
/// # Errors
/// As there.
pub fn list(directory: impl AsRef<Path>) -> io::Result<Vec<OsString>> {
    on(|storage| storage.list(directory.as_ref()))
}

/// See [`Storage::exists`].
pub fn exists(path: impl AsRef<Path>) -> bool {
    on(|storage| storage.exists(path.as_ref()))
}

/// See [`Storage::rename`].
///
/// # Errors
/// As there.
pub fn rename(from: impl AsRef<Path>, to: impl AsRef<Path>) -> io::Result<()> {
    on(|storage| storage.rename(from.as_ref(), to.as_ref()))
}

/// See [`Storage::remove`].
///
/// # Errors
/// As there.
pub fn remove(path: impl AsRef<Path>) -> io::Result<()> {
    on(|storage| storage.remove(path.as_ref()))
}

/// See [`Storage::boot_id`].
pub fn boot_id(path: impl AsRef<Path>) -> Option<String> {
    on(|storage| storage.boot_id(path.as_ref()))
}
