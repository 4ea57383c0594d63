//! The mapped file as an array of 64-bit words. The only unsafe code of the crate.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use memmap2::MmapRaw;

/// A shared mapping of a file whose blocks are all allocated.
///
/// Stores become visible in the order in which they are made, and outlive the process however
/// it ends: they are in the page cache.
#[derive(Debug)]
pub(super) enum Words {
    Mapped(MmapRaw),
    #[cfg(feature = "simulation")]
    StandIn(std::sync::Arc<dyn super::stand_in::MapMemory>),
}

impl Words {
    /// Maps all of `file`, whose length is a multiple of 8.
    pub(super) fn map(file: &File) -> io::Result<Words> {
        Ok(Words::Mapped(MmapRaw::map_raw(file)?))
    }

    pub(super) fn load(&self, index: u64) -> u64 {
        match self {
            Words::Mapped(map) => u64::from_le(word(map, index).load(Ordering::Relaxed)),
            #[cfg(feature = "simulation")]
            Words::StandIn(memory) => memory.load(index),
        }
    }

    fn put(&self, index: u64, value: u64) {
        match self {
            Words::Mapped(map) => word(map, index).store(value.to_le(), Ordering::Release),
            #[cfg(feature = "simulation")]
            Words::StandIn(memory) => memory.store(index, value),
        }
    }

    /// Not before anything that was stored before it.
    pub(super) fn store(&self, index: u64, value: u64) {
        #[cfg(test)]
        crash::count_store();
        self.put(index, value);
    }

    /// Stores zeroes to a range of words.
    pub(super) fn clear(&self, words: Range<u64>) {
        for index in words.clone() {
            // A test need not try every one of them.
            #[cfg(test)]
            if index == words.start + (words.end - words.start) / 2 {
                crash::count_store();
            }
            self.put(index, 0);
        }
    }

    /// Waits until a range of bytes is on stable storage.
    pub(super) fn flush(&self, bytes: Range<u64>) -> io::Result<()> {
        match self {
            Words::Mapped(map) => {
                map.flush_range(bytes.start as usize, (bytes.end - bytes.start) as usize)
            }
            #[cfg(feature = "simulation")]
            Words::StandIn(memory) => memory.flush(bytes),
        }
    }
}

fn word(map: &MmapRaw, index: u64) -> &AtomicU64 {
    let index = index as usize;
    assert!(index < map.len() / 8, "word {index} lies outside the file");
    // SAFETY: the word lies inside the mapping, which lives as long as the reference and starts
    // at a page, so that it is aligned. Nothing in this process touches the mapping but through
    // these atomics; other processes are kept out by the lock on the file.
    unsafe { AtomicU64::from_ptr(map.as_mut_ptr().cast::<u64>().add(index)) }
}

/// Ends a test's "process" at a given store: a panic takes the place of the kill.
#[cfg(test)]
pub(crate) mod crash {
    use std::cell::Cell;
    use std::io;

    thread_local! {
        static STORES_LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
        static DIRECTORY_FLUSHES_LEFT: Cell<u64> = const { Cell::new(u64::MAX) };
    }

    /// Lets this thread flush so many directories; all later flushes of one fail.
    pub(crate) fn fail_directory_flushes_after(flushes: u64) {
        DIRECTORY_FLUSHES_LEFT.set(flushes);
    }

    pub(in crate::persist) fn directory_flush() -> io::Result<()> {
        let left = DIRECTORY_FLUSHES_LEFT.get().checked_sub(1);
        let left = left.ok_or_else(|| io::Error::other("no flush of a directory"))?;
        DIRECTORY_FLUSHES_LEFT.set(left);
        Ok(())
    }

    /// The panic's payload.
    pub(crate) struct Killed;

    /// Lets this thread make `stores` more stores, and kills it at the next one.
    pub(crate) fn kill_after(stores: u64) {
        STORES_LEFT.set(stores);
    }

    pub(super) fn count_store() {
        match STORES_LEFT.get() {
            0 => std::panic::resume_unwind(Box::new(Killed)),
            left => STORES_LEFT.set(left - 1),
        }
    }
}
