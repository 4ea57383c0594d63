use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use super::TlsError;
use super::directory::{Directory, FILES};

/// What was made of a directory of certificates; made anew when its files have changed, so that
/// renewed ones count without a new start.
pub(super) struct Reload<T> {
    directory: PathBuf,
    load: fn(&Directory<'_>) -> Result<T, TlsError>,
    current: Mutex<(Stamp, T)>,
}

/// Tells whether a file is the same: when it was changed, and which one it is.
type Stamp = [Option<(SystemTime, u64)>; FILES.len()];

impl<T: Clone + Send + 'static> Reload<T> {
    pub(super) fn new(
        directory: &Path,
        load: fn(&Directory<'_>) -> Result<T, TlsError>,
    ) -> Result<Arc<Self>, TlsError> {
        // First, so that a change in between is seen later.
        let stamp = stamp(directory);
        let current = load(&Directory(directory))?;
        let directory = directory.to_owned();
        Ok(Arc::new(Reload { directory, load, current: Mutex::new((stamp, current)) }))
    }

    /// Files may hang: they are looked at beside the thread that asks.
    pub(super) async fn get(self: &Arc<Self>) -> T {
        let this = Arc::clone(self);
        let looked = tokio::task::spawn_blocking(move || this.look()).await;
        looked.unwrap_or_else(|_| self.lock().1.clone())
    }

    fn look(&self) -> T {
        let stamp = stamp(&self.directory);
        if self.lock().0 == stamp {
            return self.lock().1.clone();
        }
        let loaded = (self.load)(&Directory(&self.directory));
        let mut current = self.lock();
        current.0 = stamp;
        match loaded {
            Ok(loaded) => {
                tracing::info!("new certificates in {}", self.directory.display());
                current.1 = loaded;
            }
            Err(error) => tracing::warn!("the certificates that there were stay in use: {error}"),
        }
        current.1.clone()
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, (Stamp, T)> {
        // No code that can panic runs under this lock.
        self.current.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn stamp(directory: &Path) -> Stamp {
    FILES.map(|file| {
        let metadata = std::fs::metadata(directory.join(file)).ok()?;
        Some((metadata.modified().ok()?, metadata.ino()))
    })
}
