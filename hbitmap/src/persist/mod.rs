//! Bitmaps that outlive the process: one in a file, or a set of three with roles.
//!
//! # The file
//!
//! Two copies of a header; in a set, words for what is in flight; a table; the bits. A file holds
//! one map or three, and as many *banks*, each with room for one map. A bank is cut into *chunks*
//! of one page, 32 768 bits, and the table has the generation of each, and, once it is *sealed*, its
//! checksum. A chunk whose generation is not that of its map is empty, whatever its page contains.
//! Every byte is described in `docs/internals/bitmap-file.md`. All blocks are allocated before the
//! file is mapped, so that a full disk is an error when the file is made and not a signal when it
//! is used.
//!
//! # Why a kill at any instruction leaves the file right
//!
//! Every store is one aligned 64-bit word, and they become visible in program order; a process
//! that is killed has made some first part of them, all in the page cache.
//!
//! * *A bit*: the chunk is made ready first. If it is sealed, its state becomes "not sealed"; if
//!   it belongs to another generation, its page is cleared, then its state is stored. Then the
//!   words. So an acknowledged bit is in the file, and a checksum is only ever claimed for a page
//!   that has not been written to since: **one that does not match is damage, never the result of
//!   a kill.**
//! * *Emptying a map, changing roles*: a new header. The older copy is overwritten, then the
//!   other. A copy under way is marked invalid by its first store, made valid by its last; the
//!   other one counts meanwhile. Emptying gives the map a generation that no chunk has, so it
//!   takes the same time whatever the map holds, and nothing is left to be cleaned up.
//!
//! * *What is in flight*: one word a request, stored when it begins and cleared when it has ended. A
//!   word that is left over was in flight, and opening the file makes that range differ.
//!
//! # What a flush does, and a loss of power
//!
//! [`MapSet::flush`] writes the bits to stable storage, then seals the chunks that were written
//! to, then does the same with tables and header; [`MapSet::close`] notes a clean stop as well.
//! Bits that were set after the last flush may be missing after a loss of power, with nothing in
//! the file to show it. Hence the boot id: a file that was in use under another boot is not opened
//! ([`Error::PowerLost`](crate::Error::PowerLost)). What it described is unknown then, and the
//! conservative content is "everything is dirty": remove it, create it anew, set all. A caller who
//! keeps a log of what may be missing says [`AfterPowerLoss::Accept`].

mod backing;
mod create;
mod file;
mod header;
mod in_flight;
mod layout;
mod lock;
mod log;
mod open;
mod rebuild;
mod set;
mod single;
#[cfg(feature = "simulation")]
mod stand_in;
mod words;

#[cfg(test)]
pub(crate) use words::crash;

use std::fmt;
use std::path::Path;

pub use file::MapFlush;
pub use in_flight::InFlight;
pub use log::{ActivityLog, LogWrite, Sync};
pub use set::{MapSet, Role};
pub use single::PersistentBitmap;
#[cfg(feature = "simulation")]
pub use stand_in::{MapMemory, MapStorage, install};

/// What a file belongs to, for example a disk of a set: 16 bytes that the caller chooses, a UUID.
/// A file with another identity is not opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Identity(pub [u8; 16]);

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// Whatever the caller wants to know about one map later on, for example since when it counts:
/// the line of writes, and the epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Tag {
    /// 16 bytes, a UUID.
    pub id: [u8; 16],
    /// A number.
    pub number: u64,
}

/// What to do with a file that was in use when power was lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum AfterPowerLoss {
    /// Fail with [`Error::PowerLost`](crate::Error::PowerLost).
    #[default]
    Refuse,
    /// Take what is there, if its last user kept a log ([`MapSet::set_logged`]): for a caller who
    /// has that log, and sets what was hot in it before he says whether he keeps one himself. Chunks
    /// whose checksum or state does not fit are taken as dirty from end to end.
    Accept,
}

/// How the last user of a file ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LastStop {
    /// With `close`, or the file is new.
    Clean,
    /// Without, under the same boot of this machine: nothing is missing.
    Killed,
    /// Without, under another boot, and [`AfterPowerLoss::Accept`] was given.
    PowerLost,
}

/// What a file must be to be opened, and what it becomes when it is created.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    identity: Identity,
    size: u64,
    granularity_log2: u32,
    keep_granularity: bool,
    keep_size: bool,
    after_power_loss: AfterPowerLoss,
    boot_id: Option<[u8; 16]>,
}

impl Options {
    /// Maps of `size` items in groups of `2^granularity_log2`.
    pub fn new(identity: Identity, size: u64, granularity_log2: u32) -> Self {
        let after_power_loss = AfterPowerLoss::Refuse;
        let keep_granularity = false;
        Options {
            identity,
            size,
            granularity_log2,
            keep_granularity,
            keep_size: false,
            after_power_loss,
            boot_id: None,
        }
    }

    /// A file that exists keeps the granularity that it has.
    #[must_use]
    pub fn keep_granularity(mut self) -> Self {
        self.keep_granularity = true;
        self
    }

    /// A file that exists keeps the size that it has, which is not more than that of the options.
    #[must_use]
    pub fn keep_size(mut self) -> Self {
        self.keep_size = true;
        self
    }

    /// The granularity, as a power of two, with which the maps of a set for a disk of `size` bytes
    /// take at most 64 MiB of memory, file and all: 64 KiB up to 4 TiB, 256 KiB for 16 TiB, and so on up
    /// to 16 MiB, which is enough for 1 PiB.
    pub fn granularity_log2_for(size: u64) -> u32 {
        (16..24).find(|log2| size.div_ceil(1 << log2) <= 1 << 26).unwrap_or(24)
    }

    /// What to do with a file that was in use when power was lost; refuse it by default.
    #[must_use]
    pub fn after_power_loss(mut self, what: AfterPowerLoss) -> Self {
        self.after_power_loss = what;
        self
    }

    /// What tells one boot of one machine from every other; the kernel's boot id by default. All
    /// zeroes mean that it is not known, and are never the same boot.
    #[must_use]
    pub fn boot_id(mut self, boot_id: [u8; 16]) -> Self {
        self.boot_id = Some(boot_id);
        self
    }

    fn current_boot_id(&self, _path: &Path) -> [u8; 16] {
        #[cfg(feature = "simulation")]
        if let Some(storage) = stand_in::installed() {
            return storage.boot_id(_path);
        }
        self.boot_id.or_else(kernel_boot_id).unwrap_or(UNKNOWN_BOOT)
    }
}

/// Never the same as any other.
const UNKNOWN_BOOT: [u8; 16] = [0; 16];

fn kernel_boot_id() -> Option<[u8; 16]> {
    let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
    let hex: String = text.trim().chars().filter(|c| *c != '-').collect();
    (hex.len() == 32).then_some(())?;
    Some(u128::from_str_radix(&hex, 16).ok()?.to_be_bytes())
}
