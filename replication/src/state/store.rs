use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use brep_block::storage::{self, PlainFile};

use super::Record;
use crate::{Error, Result};

const MAGIC: &[u8; 8] = b"BREPREC\0";
const FORMAT_VERSION: u32 = 2;
const HEADER_LEN: usize = 32;
const SLOT_LEN: usize = 256 << 10;
const PAYLOAD_MAX: usize = SLOT_LEN - HEADER_LEN;

/// What helps when a record could not be saved.
pub(crate) const RESTART: &str =
    "make room or repair the file system of the state directory, then restart this side";

/// The file that holds a [`Record`]: two slots, of which the newest valid one counts.
///
/// Slot `i` begins at byte `i * 262144`. All integers are big-endian.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 8 | magic `BREPREC\0` |
/// | 8 | 4 | format version, 2 |
/// | 12 | 4 | length of the payload in bytes |
/// | 16 | 8 | sequence number, from 1; the highest valid one wins |
/// | 24 | 4 | CRC-32 of bytes 0 to 23 and of the payload |
/// | 28 | 4 | zero |
/// | 32 | … | payload: the record as a JSON object |
///
/// A save writes the slot that does not hold the newest record, with one call; so a process that
/// is killed at any moment leaves the old record or the new one.
/// A save reaches the page cache; [`sync`](RecordStore::sync) makes it survive a power loss. The
/// file is locked
/// (`flock`) while it is open: one state directory serves one process.
#[derive(Debug)]
pub struct RecordStore {
    path: PathBuf,
    file: Arc<dyn PlainFile>,
    seq: u64,
    record: Record,
    /// What a power loss leaves is this record, or a later one.
    synced: u64,
    /// Power losses count: see [`set_durable`](Self::set_durable).
    durable: bool,
    /// How a save failed, if one did: what the file holds is unknown, and nothing more may be
    /// promised.
    broken: Arc<OnceLock<String>>,
}

impl RecordStore {
    /// Opens the record in `dir`, or makes a first one with `blank`.
    ///
    /// # Errors
    /// The file cannot be read, neither slot is valid although the file holds something, or the newest
    /// record was written by another version of brep: the older one must not take its place.
    pub fn open(dir: &Path, blank: impl FnOnce() -> Record) -> Result<Self> {
        let path = dir.join("state");
        let file = open_file(&path)?;
        match newest(&path, &*file)? {
            Some((seq, record)) => Ok(Self::new(path, file, seq, record)),
            None => {
                let mut store = Self::new(path, file, 0, blank());
                store.save(store.record.clone())?;
                Ok(store)
            }
        }
    }

    /// Opens the record in `dir`, and makes none.
    ///
    /// # Errors
    /// As [`open`](Self::open), or there is no record.
    pub fn open_existing(dir: &Path) -> Result<Self> {
        let path = dir.join("state");
        let none = || {
            let path = path.display();
            Error::refused(format!("{path}: no state record; no side has run on this directory"))
        };
        if !storage::exists(&path) {
            return Err(none());
        }
        let file = open_file(&path)?;
        let (seq, record) = newest(&path, &*file)?.ok_or_else(none)?;
        Ok(Self::new(path, file, seq, record))
    }

    fn new(path: PathBuf, file: Arc<dyn PlainFile>, seq: u64, record: Record) -> Self {
        let broken = Arc::default();
        RecordStore { path, file, seq, record, synced: 0, durable: false, broken }
    }

    /// The record as last saved.
    #[must_use]
    pub fn record(&self) -> &Record {
        &self.record
    }

    /// Makes `record` the one that counts.
    ///
    /// # Errors
    /// The write failed, now or earlier; then the old record counts, or the new one: nothing may
    /// be reported as done.
    pub fn save(&mut self, record: Record) -> Result<()> {
        if let Some(reason) = self.broken.get() {
            return Err(Error::failed(format!("{reason}; {RESTART}")));
        }
        let payload = serde_json::to_vec(&record)
            .map_err(|e| Error::failed(format!("{}: {e}", self.path.display())))?;
        if payload.len() > PAYLOAD_MAX {
            return Err(Error::failed(format!(
                "{}: the record needs {} bytes, more than the {PAYLOAD_MAX} that fit",
                self.path.display(),
                payload.len()
            )));
        }
        if !self.is_secure() {
            // The newest record is not safe: the one before it is all that there is.
            self.sync()?;
        }
        let seq = self.seq + 1;
        let slot = encode_slot(seq, &payload);
        #[cfg(test)]
        let written = faults::pass(&self.path, faults::Kind::Write);
        #[cfg(not(test))]
        let written = Ok(());
        let written =
            written.and_then(|()| self.file.write_all_at(&slot, (seq % 2) * SLOT_LEN as u64));
        written.map_err(|error| self.broken("write", &error))?;
        self.seq = seq;
        self.record = record;
        #[cfg(test)]
        faults::saved(&self.path);
        Ok(())
    }

    /// Puts the record on stable storage, where a power loss leaves it. Blocks.
    ///
    /// # Errors
    /// As [`save`](Self::save).
    pub fn sync(&mut self) -> Result<()> {
        let result = self.file.sync_data();
        self.synced(self.seq, result)
    }

    /// Whether what counts leaves this record: a power loss only if it
    /// [counts](Self::set_durable).
    pub(crate) fn is_secure(&self) -> bool {
        !self.durable || self.synced >= self.seq
    }

    /// From now on at every moment one of the slots holds a record that a power loss leaves. Whoever
    /// must not be forgotten still [syncs](Self::sync).
    pub(crate) fn set_durable(&mut self) {
        self.durable = true;
    }

    /// The file, to be synced by somebody who must not hold the store meanwhile, and the record
    /// that is newest now: for [`synced`](Self::synced).
    pub(crate) fn to_sync(&self) -> (Arc<dyn PlainFile>, u64) {
        (Arc::clone(&self.file), self.seq)
    }

    #[cfg(test)]
    pub(crate) fn path(&self) -> PathBuf {
        self.path.clone()
    }

    /// A sync that was begun when `seq` was the newest record has ended.
    ///
    /// # Errors
    /// As [`save`](Self::save), if it has failed.
    pub(crate) fn synced(&mut self, seq: u64, result: io::Result<()>) -> Result<()> {
        #[cfg(test)]
        let result = result.and_then(|()| faults::pass(&self.path, faults::Kind::Sync));
        result.map_err(|error| self.broken("flush", &error))?;
        self.synced = self.synced.max(seq);
        Ok(())
    }

    /// How a save failed, if one did, for those who must not wait for the store.
    pub(crate) fn failure(&self) -> Arc<OnceLock<String>> {
        Arc::clone(&self.broken)
    }

    /// From now on nothing is saved.
    fn broken(&self, what: &str, error: &io::Error) -> Error {
        let error = io_error(&self.path, what, error);
        let _ = self.broken.set(error.to_string());
        error
    }

    /// Changes the record and saves it.
    ///
    /// # Errors
    /// As [`save`](Self::save); then [`record`](Self::record) is unchanged.
    pub fn update(&mut self, change: impl FnOnce(&mut Record)) -> Result<()> {
        let mut record = self.record.clone();
        change(&mut record);
        if record == self.record {
            return Ok(());
        }
        self.save(record)
    }
}

fn open_file(path: &Path) -> Result<Arc<dyn PlainFile>> {
    storage::open_file(path).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock => Error::refused(format!(
            "{}: another brep runs on this state directory; stop it first",
            path.display()
        )),
        _ => Error::failed(format!("{}: cannot open: {e}", path.display())),
    })
}

/// The record of the highest sequence number; None if the file was never written to.
fn newest(path: &Path, file: &dyn PlainFile) -> Result<Option<(u64, Record)>> {
    let read_error = |error: io::Error| io_error(path, "read", &error);
    if has_no_record(file).map_err(read_error)? {
        return Ok(None);
    }
    let slots = (0..2).filter_map(|slot| read_slot(file, slot).transpose());
    let slots = slots.collect::<io::Result<Vec<_>>>().map_err(read_error)?;
    let refused = |what: &str| {
        Err(Error::refused(format!(
            "{}: {what}; nothing was changed. If this side is to start over, move the state \
             directory away",
            path.display()
        )))
    };
    match slots.into_iter().max_by_key(|slot| slot.seq) {
        None => refused("not a valid state record (damaged, or of another program)"),
        Some(Slot { record: None, .. }) => {
            refused("the state record was written by another version of brep: run that one")
        }
        // What a killed process has left may be in the page cache only.
        Some(Slot { seq, record: Some(record) }) => Ok(Some((seq, record))),
    }
}

fn io_error(path: &Path, what: &str, error: &io::Error) -> Error {
    Error::failed(format!("{}: cannot {what} the state record: {error}", path.display()))
}

fn encode_slot(seq: u64, payload: &[u8]) -> Vec<u8> {
    encode_version(FORMAT_VERSION, seq, payload)
}

fn encode_version(version: u32, seq: u64, payload: &[u8]) -> Vec<u8> {
    let mut slot = Vec::with_capacity(HEADER_LEN + payload.len());
    slot.extend_from_slice(MAGIC);
    slot.extend_from_slice(&version.to_be_bytes());
    slot.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    slot.extend_from_slice(&seq.to_be_bytes());
    let mut crc = crc32fast::Hasher::new();
    crc.update(&slot);
    crc.update(payload);
    slot.extend_from_slice(&crc.finalize().to_be_bytes());
    slot.extend_from_slice(&[0; 4]);
    slot.extend_from_slice(payload);
    slot
}

/// A slot that was written to its end.
struct Slot {
    seq: u64,
    /// None: it is of another version.
    record: Option<Record>,
}

/// Reads a slot; `None` if it was not written to its end.
fn read_slot(file: &dyn PlainFile, slot: u64) -> io::Result<Option<Slot>> {
    let base = slot * SLOT_LEN as u64;
    let Some(header) = read_exact(file, base, HEADER_LEN)? else { return Ok(None) };
    let be32 = |at: usize| u32::from_be_bytes(header[at..at + 4].try_into().expect("4 bytes"));
    if &header[..8] != MAGIC {
        return Ok(None);
    }
    let len = be32(12) as usize;
    let seq = u64::from_be_bytes(header[16..24].try_into().expect("8 bytes"));
    if len > PAYLOAD_MAX || seq % 2 != slot {
        return Ok(None);
    }
    let Some(payload) = read_exact(file, base + HEADER_LEN as u64, len)? else { return Ok(None) };
    let mut crc = crc32fast::Hasher::new();
    crc.update(&header[..24]);
    crc.update(&payload);
    if crc.finalize() != be32(24) {
        return Ok(None);
    }
    let known = be32(8) == FORMAT_VERSION;
    let record = known.then(|| serde_json::from_slice(&payload).ok()).flatten();
    Ok(Some(Slot { seq, record }))
}

/// Whether no record was ever relied on: the file is empty, or the very first save was cut short.
/// The second one would have begun after the first was whole.
fn has_no_record(file: &dyn PlainFile) -> io::Result<bool> {
    let len = file.len()?;
    if len <= SLOT_LEN as u64 {
        return Ok(len == 0);
    }
    let mut slot = vec![0; SLOT_LEN];
    file.read_exact_at(&mut slot, 0)?;
    Ok(slot.iter().all(|byte| *byte == 0) && read_slot(file, 1)?.is_none())
}

/// Reads `len` bytes, or nothing if the file is shorter.
fn read_exact(file: &dyn PlainFile, offset: u64, len: usize) -> io::Result<Option<Vec<u8>>> {
    let mut data = vec![0; len];
    match file.read_exact_at(&mut data, offset) {
        Ok(()) => Ok(Some(data)),
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
        Err(e) => Err(e),
    }
}

/// Lets tests make the file system of a record hang or fail.
#[cfg(test)]
pub(crate) mod faults {
    use std::collections::HashMap;
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, Condvar, Mutex};
    use std::time::Duration;

    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub(crate) enum Kind {
        Write,
        Sync,
        /// A sync that somebody waits for without holding the thread up, and no other.
        SyncBeside,
        /// Not of the record: maps that are made larger.
        Maps,
        /// Not of the record: how much room the file system has.
        Space,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Fault {
        Hang { reached: bool },
        Fail,
    }

    /// Called after each save into a directory.
    pub(crate) type Watch = Arc<dyn Fn() + Send + Sync>;

    static WATCHES: Mutex<Option<HashMap<PathBuf, Watch>>> = Mutex::new(None);

    /// From now on `watch` is called after each save into a directory; none: nobody is.
    pub(crate) fn watch(dir: &Path, watch: Option<Watch>) {
        let mut watches = WATCHES.lock().unwrap();
        let watches = watches.get_or_insert_default();
        match watch {
            Some(watch) => watches.insert(dir.join("state"), watch),
            None => watches.remove(&dir.join("state")),
        };
    }

    pub(super) fn saved(file: &Path) {
        let watch = WATCHES.lock().unwrap().get_or_insert_default().get(file).cloned();
        if let Some(watch) = watch {
            watch();
        }
    }

    static FAULTS: Mutex<Option<HashMap<(PathBuf, Kind), Fault>>> = Mutex::new(None);
    static CHANGED: Condvar = Condvar::new();

    /// Longer than any test lets a thread hang: what waits for itself fails then.
    const HANG_MAX: Duration = Duration::from_secs(40);

    /// What is done to a record hangs, or fails, until this is dropped.
    pub(crate) struct Faulty(PathBuf, Kind);

    impl Faulty {
        /// Saves into a directory hang.
        pub(crate) fn stuck(dir: &Path) -> Self {
            Self::new(dir, Kind::Write, Fault::Hang { reached: false })
        }

        /// Whatever is no save hangs.
        pub(crate) fn stuck_beside(dir: &Path, kind: Kind) -> Self {
            Self::new(dir, kind, Fault::Hang { reached: false })
        }

        pub(crate) fn failing(dir: &Path, kind: Kind) -> Self {
            Self::new(dir, kind, Fault::Fail)
        }

        fn new(dir: &Path, kind: Kind, fault: Fault) -> Self {
            let file = dir.join("state");
            FAULTS.lock().unwrap().get_or_insert_default().insert((file.clone(), kind), fault);
            Faulty(file, kind)
        }

        /// Flushes of a record hang that somebody waits for without holding the thread up.
        pub(crate) fn stuck_sync(dir: &Path) -> Self {
            Self::new(dir, Kind::Sync, Fault::Hang { reached: false })
        }

        /// Waits until it hangs.
        pub(crate) async fn reached(&self) {
            let deadline = tokio::time::Instant::now() + Duration::from_secs(20);
            let key = (self.0.clone(), self.1);
            let hangs = Fault::Hang { reached: true };
            while FAULTS.lock().unwrap().get_or_insert_default()[&key] != hangs {
                assert!(tokio::time::Instant::now() < deadline, "nothing was saved");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }

    impl Drop for Faulty {
        fn drop(&mut self) {
            let key = (self.0.clone(), self.1);
            FAULTS.lock().unwrap().get_or_insert_default().remove(&key);
            CHANGED.notify_all();
        }
    }

    /// Waits as long as flushes hang.
    pub(crate) async fn until_synced(file: &Path) {
        let hangs = |kind| {
            let key = (file.to_owned(), kind);
            match FAULTS.lock().unwrap().get_or_insert_default().get_mut(&key) {
                Some(Fault::Hang { reached }) => {
                    *reached = true;
                    true
                }
                _ => false,
            }
        };
        while hangs(Kind::Sync) || hangs(Kind::SyncBeside) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Comes to a place that may hang.
    pub(crate) fn pass_by(dir: &Path, kind: Kind) {
        let _ = pass(&dir.join("state"), kind);
    }

    pub(super) fn pass(file: &Path, kind: Kind) -> io::Result<()> {
        let key = (file.to_owned(), kind);
        let mut faults = FAULTS.lock().unwrap();
        while let Some(fault) = faults.get_or_insert_default().get_mut(&key) {
            match fault {
                Fault::Fail => return Err(io::ErrorKind::StorageFull.into()),
                Fault::Hang { reached } => *reached = true,
            }
            let (woken, timeout) = CHANGED.wait_timeout(faults, HANG_MAX).unwrap();
            faults = woken;
            if timeout.timed_out() {
                drop(faults);
                panic!("{kind:?}: nobody lets the thread of the disks go on");
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::state::Role;
    use crate::{Epoch, Generation};

    fn blank() -> Record {
        Record::blank("a", Role::Primary)
    }

    fn with_epoch(epoch: u64) -> Record {
        Record { epoch: Epoch(epoch), cur: Some(Generation::random()), ..blank() }
    }

    #[test]
    fn no_record_is_made_where_one_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let refused = || {
            let error = RecordStore::open_existing(dir.path()).unwrap_err();
            assert_eq!(error.exit_code(), 3);
            assert!(error.to_string().contains("no state record"), "{error}");
        };
        refused();
        assert!(!dir.path().join("state").exists());
        std::fs::write(dir.path().join("state"), b"").unwrap();
        refused();
        drop(RecordStore::open(dir.path(), blank).unwrap());
        assert_eq!(*RecordStore::open_existing(dir.path()).unwrap().record(), blank());
    }

    #[test]
    fn the_newest_record_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        for epoch in 1..5 {
            let mut store = RecordStore::open(dir.path(), blank).unwrap();
            assert_eq!(store.record().epoch, Epoch(epoch - 1));
            store.save(with_epoch(epoch)).unwrap();
        }
    }

    #[test]
    fn a_torn_write_leaves_the_record_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = RecordStore::open(dir.path(), blank).unwrap();
        store.save(with_epoch(7)).unwrap();
        let old = store.record().clone();
        let whole = std::fs::read(dir.path().join("state")).unwrap();
        store.save(with_epoch(8)).unwrap();
        let newest = std::fs::read(dir.path().join("state")).unwrap();
        let base = (store.seq % 2) as usize * SLOT_LEN;
        drop(store); // and its lock
        for cut in [0, 1, 20, 31, 40, 100] {
            // The first `cut` bytes of the new slot were written over what was there before.
            let mut torn = whole.clone();
            torn.resize(newest.len().max(whole.len()), 0);
            torn[base..base + cut].copy_from_slice(&newest[base..base + cut]);
            std::fs::write(dir.path().join("state"), &torn).unwrap();
            let reopened = RecordStore::open(dir.path(), blank).unwrap();
            assert_eq!(*reopened.record(), old, "cut at {cut}");
        }
    }

    #[test]
    fn a_first_save_that_was_cut_short_has_promised_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        drop(RecordStore::open(dir.path(), || with_epoch(3)).unwrap());
        let whole = std::fs::read(&path).unwrap();
        for cut in [SLOT_LEN + 1, SLOT_LEN + 20, SLOT_LEN + HEADER_LEN, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            let store = RecordStore::open(dir.path(), || with_epoch(7)).unwrap();
            assert_eq!(store.record().epoch, Epoch(7), "cut at {cut}");
        }
        // The second save has been begun, so the first was whole once.
        let mut later = whole;
        later[0] = b'B';
        later[SLOT_LEN] = 0;
        std::fs::write(&path, &later).unwrap();
        assert_eq!(RecordStore::open(dir.path(), blank).unwrap_err().exit_code(), 3);
    }

    #[test]
    fn a_foreign_file_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("state"), b"something else").unwrap();
        let error = RecordStore::open(dir.path(), blank).unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert_eq!(std::fs::read(dir.path().join("state")).unwrap(), b"something else");
    }

    /// An older record in the place of one that is not understood would take back what it says.
    #[test]
    fn a_newest_record_of_another_version_is_refused_and_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let mut store = RecordStore::open(dir.path(), blank).unwrap();
        store.save(with_epoch(7)).unwrap();
        let seq = store.seq + 1;
        drop(store); // and its lock
        let record = serde_json::to_value(with_epoch(8)).unwrap();
        let mut more = record.clone();
        more["of-tomorrow"] = true.into();
        let [record, more] = [record, more].map(|r| serde_json::to_vec(&r).unwrap());
        let of_tomorrow = encode_version(FORMAT_VERSION + 1, seq, &record);
        for slot in [encode_slot(seq, &more), of_tomorrow] {
            let mut file = std::fs::read(&path).unwrap();
            let at = (seq % 2) as usize * SLOT_LEN;
            file.resize(file.len().max(at + slot.len()), 0);
            file[at..at + slot.len()].copy_from_slice(&slot);
            std::fs::write(&path, &file).unwrap();
            let error = RecordStore::open(dir.path(), blank).unwrap_err();
            assert_eq!(error.exit_code(), 3, "{error}");
            assert!(error.to_string().contains("another version"), "{error}");
            assert!(std::fs::read(&path).unwrap() == file);
        }
    }

    #[test]
    fn after_a_failed_write_nothing_is_promised() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = RecordStore::open(dir.path(), blank).unwrap();
        store.file = Arc::new(File::open(dir.path().join("state")).unwrap()); // read-only: writes fail
        assert!(store.save(with_epoch(1)).is_err());
        store.file = Arc::new(File::options().write(true).open(dir.path().join("state")).unwrap());
        assert!(store.save(with_epoch(2)).is_err(), "the failure must be sticky");
        assert_eq!(store.record().epoch, Epoch(0));
    }
}
