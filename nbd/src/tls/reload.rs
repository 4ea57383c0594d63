use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;

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
    /// One at a time, or those of a directory that hangs would take all the threads that there are
    /// for what may block, of disks too.
    looks: watch::Sender<Looks>,
}

/// How often somebody has looked at the files.
#[derive(Debug, Clone, Copy, Default)]
struct Looks {
    begun: u64,
    ended: u64,
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
        let looks = watch::Sender::new(Looks::default());
        Ok(Arc::new(Reload { directory: directory.to_owned(), load, state, looks }))
    }

    /// Files may hang: they are looked at beside the thread that asks, and not waited for long. A
    /// look that began earlier may not have seen the newest of them, such as a list of what is revoked:
    /// it does not do.
    pub(super) async fn get(self: &Arc<Self>) -> T {
        let mut looks = self.looks.subscribe();
        let needed = looks.borrow().begun + 1;
        let looked = async {
            while looks.borrow_and_update().ended < needed {
                if self.begin_look() {
                    let looking = Looking(Arc::clone(self));
                    tokio::task::spawn_blocking(move || looking.0.look());
                }
                // The sender is ours.
                let _ = looks.changed().await;
            }
        };
        if tokio::time::timeout(LOOK_TIMEOUT, looked).await.is_err() {
            let directory = self.directory.display();
            tracing::warn!("{directory} does not answer: the certificates there were stay in use");
        }
        self.lock().current.clone()
    }

    /// Whether it is on us: nobody looks at the moment.
    fn begin_look(&self) -> bool {
        self.looks.send_if_modified(|looks| {
            let begins = looks.begun == looks.ended;
            looks.begun += u64::from(begins);
            begins
        })
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
        self.0.looks.send_modify(|looks| looks.ended = looks.begun);
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
    use std::sync::atomic::{AtomicUsize, Ordering};
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
        while reload.looks.borrow().ended < reload.looks.borrow().begun {
            tokio::task::yield_now().await;
        }
        assert_eq!(reload.get().await, "new");
    }

    #[tokio::test]
    async fn who_comes_while_somebody_looks_gets_nothing_older_than_what_was_there_then() {
        static GATE: Mutex<Option<mpsc::Receiver<()>>> = Mutex::new(None);
        static LOADS: AtomicUsize = AtomicUsize::new(0);
        let load = |directory: &Directory<'_>| {
            let found = contents(directory);
            if let Some(gate) = GATE.lock().unwrap().take() {
                LOADS.fetch_add(1, Ordering::SeqCst);
                let _ = gate.recv();
            }
            found
        };
        let directory = tempfile::tempdir().unwrap();
        write(directory.path(), "server-cert.pem", "old");
        let reload = Reload::new(directory.path(), load).unwrap();
        let (release, gate) = mpsc::channel();
        *GATE.lock().unwrap() = Some(gate);
        write(directory.path(), "server-cert.pem", "new");
        let second = async {
            while LOADS.load(Ordering::SeqCst) == 0 {
                tokio::task::yield_now().await;
            }
            // The first one has read the files already.
            write(directory.path(), "server-cert.pem", "newest");
            let second = reload.get();
            drop(release);
            second.await
        };
        let (first, second) = futures_util::join!(reload.get(), second);
        assert!(["new", "newest"].contains(&first.as_str()), "{first}");
        assert_eq!(second, "newest");
    }
}
