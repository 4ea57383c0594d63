use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use super::TlsError;
use super::directory::{CA_CRL, Directory, FILES};

/// How long a look at the files is waited for.
const LOOK_TIMEOUT: Duration = Duration::from_secs(1);

/// What was made of a directory of certificates; made anew when its files have changed, so that
/// renewed ones count without a new start. What cannot be used is tried again the next time.
pub(super) struct Reload<T> {
    directory: PathBuf,
    load: fn(&Directory<'_>) -> Result<T, TlsError>,
    state: Mutex<State<T>>,
    /// Somebody is looking at the files: one at a time, or those of a directory that hangs would
    /// take all the threads that there are for what may block, of disks too.
    looking: AtomicBool,
}

struct State<T> {
    current: T,
    /// Of the files that `current` was made of.
    stamp: Stamp,
    /// Of those that could not be used, and of which that has been told.
    unusable: Option<Stamp>,
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
        let state = Mutex::new(State { current, stamp, unusable: None });
        let looking = AtomicBool::new(false);
        Ok(Arc::new(Reload { directory: directory.to_owned(), load, state, looking }))
    }

    /// Files may hang: they are looked at beside the thread that asks, and not waited for long.
    pub(super) async fn get(self: &Arc<Self>) -> T {
        if self.looking.swap(true, Ordering::AcqRel) {
            return self.lock().current.clone();
        }
        let looking = Looking(Arc::clone(self));
        let look = tokio::task::spawn_blocking(move || looking.0.look());
        if tokio::time::timeout(LOOK_TIMEOUT, look).await.is_err() {
            let directory = self.directory.display();
            tracing::warn!("{directory} does not answer: the certificates there were stay in use");
        }
        self.lock().current.clone()
    }

    fn look(&self) {
        let stamp = stamp(&self.directory);
        let old = self.lock().stamp;
        if old == stamp {
            return;
        }
        let loaded = match has_crl(&old) && !has_crl(&stamp) {
            // It is being replaced, or cannot be seen: nobody shall come in meanwhile.
            true => Err(Directory(&self.directory).unusable(format!("{CA_CRL} has gone"))),
            false => (self.load)(&Directory(&self.directory)),
        };
        let mut state = self.lock();
        match loaded {
            Ok(loaded) => {
                tracing::info!("new certificates in {}", self.directory.display());
                *state = State { current: loaded, stamp, unusable: None };
            }
            Err(error) => {
                if state.unusable.replace(stamp) != Some(stamp) {
                    tracing::warn!("the certificates that there were stay in use: {error}");
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code that can panic runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The one who looks.
struct Looking<T>(Arc<Reload<T>>);

impl<T> Drop for Looking<T> {
    fn drop(&mut self) {
        self.0.looking.store(false, Ordering::Release);
    }
}

fn has_crl(stamp: &Stamp) -> bool {
    FILES.iter().zip(stamp).any(|(file, found)| *file == CA_CRL && found.is_some())
}

fn stamp(directory: &Path) -> Stamp {
    FILES.map(|file| {
        let metadata = std::fs::metadata(directory.join(file)).ok()?;
        Some((metadata.modified().ok()?, metadata.ino()))
    })
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;
    use std::sync::mpsc;

    use super::*;

    fn write(directory: &Path, file: &str, contents: &str) {
        // Another file, so that the clock does not matter.
        std::fs::write(directory.join("new"), contents).unwrap();
        std::fs::rename(directory.join("new"), directory.join(file)).unwrap();
    }

    fn contents(directory: &Directory<'_>) -> Result<String, TlsError> {
        let text = std::fs::read_to_string(directory.0.join("server-cert.pem")).unwrap();
        if text == "bad" { Err(directory.unusable("bad")) } else { Ok(text) }
    }

    #[tokio::test]
    async fn what_could_not_be_used_is_tried_again_though_nothing_has_changed() {
        static LOADS: AtomicUsize = AtomicUsize::new(0);
        let load = |directory: &Directory<'_>| {
            // The second one fails for a reason that no file shows: a mode, a lack of descriptors.
            match LOADS.fetch_add(1, Ordering::Relaxed) {
                1 => Err(directory.unusable("not now")),
                _ => contents(directory),
            }
        };
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "server-cert.pem", "old");
        let reload = Reload::new(directory.path(), load).unwrap();
        write(directory.path(), "server-cert.pem", "new");
        assert_eq!(reload.get().await, "old");
        assert_eq!(reload.get().await, "new");
        assert_eq!(reload.get().await, "new");
        assert_eq!(LOADS.load(Ordering::Relaxed), 3, "and not again once that is done");
    }

    #[tokio::test]
    async fn a_list_of_what_is_revoked_does_not_just_vanish() {
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "server-cert.pem", "old");
        write(directory.path(), CA_CRL, "list");
        let reload = Reload::new(directory.path(), contents).unwrap();
        std::fs::remove_file(directory.path().join(CA_CRL)).unwrap();
        write(directory.path(), "server-cert.pem", "new");
        assert_eq!(reload.get().await, "old");
        write(directory.path(), CA_CRL, "another");
        assert_eq!(reload.get().await, "new");
    }

    #[tokio::test]
    async fn files_that_hang_cost_one_thread_and_nobody_waits_for_them_long() {
        static HANG: Mutex<Option<mpsc::Receiver<()>>> = Mutex::new(None);
        static LOADS: AtomicUsize = AtomicUsize::new(0);
        let load = |directory: &Directory<'_>| {
            LOADS.fetch_add(1, Ordering::Relaxed);
            if let Some(hang) = &*HANG.lock().unwrap() {
                // Until the sender goes.
                let _ = hang.recv();
            }
            contents(directory)
        };
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "server-cert.pem", "old");
        let reload = Reload::new(directory.path(), load).unwrap();
        let (release, hang) = mpsc::channel();
        *HANG.lock().unwrap() = Some(hang);
        write(directory.path(), "server-cert.pem", "new");
        let everybody = (0..100).map(|_| reload.get());
        let found = futures_util::future::join_all(everybody).await;
        assert_eq!(found, vec!["old"; 100]);
        assert!(LOADS.load(Ordering::Relaxed) <= 2, "one at the start, and one that hangs");
        drop(release);
        while reload.looking.load(Ordering::Acquire) {
            tokio::task::yield_now().await;
        }
        assert_eq!(reload.get().await, "new");
    }
}
