//! Opening: checks, the lock, and what the file can do.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{AtFlags, FallocateFlags, OFlags, StatxFlags};
use rustix::io::Errno;

use super::core::Core;
use super::direct::Direct;
use super::{RawFile, sys};
use crate::{Error, ErrorKind, Limits, Operation, RangeLock, Result};

/// How a file is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum CacheMode {
    /// Through the page cache: writes are complete when they are in it, and survive the end of
    /// this process.
    #[default]
    Writeback,
    /// Past the page cache (`O_DIRECT`).
    None,
}

/// How to open a [`RawFile`].
#[derive(Debug, Clone)]
pub struct RawFileOptions {
    /// The name that errors and events use; the path if there is none.
    pub name: Option<String>,
    /// Refuse everything that changes content. Such a device shares the lock with others of its
    /// kind.
    pub read_only: bool,
    /// Make the file, with this many bytes that read as zeroes, if it does not exist. A file
    /// that exists is opened as it is, whatever its size.
    pub create: Option<u64>,
    /// Together with `create`: fail if the file exists.
    pub create_new: bool,
    /// Writes beyond the end extend the file. Ignored for block special files.
    pub growable: bool,
    /// Through the page cache or past it.
    pub cache: CacheMode,
    /// Take the lock, so that nobody else does. Without it nothing protects the file.
    pub lock: bool,
}

impl Default for RawFileOptions {
    /// For reading and writing a file that exists, through the page cache, locked.
    fn default() -> Self {
        RawFileOptions {
            name: None,
            read_only: false,
            create: None,
            create_new: false,
            growable: false,
            cache: CacheMode::Writeback,
            lock: true,
        }
    }
}

pub(super) fn open(path: &Path, options: RawFileOptions) -> Result<Arc<RawFile>> {
    let opening = Opening { path, options: &options };
    let (file, created) = opening.open_or_create()?;
    let result = opening.finish(file);
    if created && result.is_err() {
        // Nobody has seen it; what remains would only be in the way of the next attempt.
        let _ = std::fs::remove_file(path);
    }
    result.map(|core| Arc::new(RawFile::new(core)))
}

struct Opening<'a> {
    path: &'a Path,
    options: &'a RawFileOptions,
}

impl Opening<'_> {
    fn failed(&self, kind: ErrorKind, detail: &str) -> Error {
        Error::new(Operation::Open, kind, self.path.display().to_string(), detail)
    }

    /// A failure of the operating system, with what to do about it.
    fn os_failed(&self, error: &io::Error) -> Error {
        let (kind, advice) = match error.kind() {
            io::ErrorKind::NotFound => (ErrorKind::Io, "check the path, or create it first"),
            io::ErrorKind::PermissionDenied if self.options.read_only => {
                (ErrorKind::Io, "check the owner and the mode of the file and its directories")
            }
            io::ErrorKind::PermissionDenied => {
                (ErrorKind::Io, "check the owner and the mode of the file, or open it read-only")
            }
            io::ErrorKind::AlreadyExists => {
                (ErrorKind::InvalidInput, "choose another name, or remove the file first")
            }
            io::ErrorKind::IsADirectory => (ErrorKind::InvalidInput, "name the file inside it"),
            io::ErrorKind::ReadOnlyFilesystem => {
                (ErrorKind::ReadOnly, "open it read-only, or mount it for writing")
            }
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                (ErrorKind::NoSpace, "make room on the file system")
            }
            io::ErrorKind::ResourceBusy => (
                ErrorKind::Locked,
                "the block device is in use, for instance mounted: release it first",
            ),
            io::ErrorKind::InvalidInput if self.options.cache == CacheMode::None => {
                (ErrorKind::Unsupported, NO_DIRECT)
            }
            _ => return Error::from_os(Operation::Open, self.path.display().to_string(), error),
        };
        self.failed(kind, &format!("{error}: {advice}")).with_errno(error.raw_os_error())
    }

    fn open_or_create(&self) -> Result<(File, bool)> {
        let Some(size) = self.options.create else { return Ok((self.open(false)?, false)) };
        if self.options.read_only {
            let detail = "a file cannot be created read-only: leave out one of the two";
            return Err(self.failed(ErrorKind::InvalidInput, detail));
        }
        match self.open(true) {
            Ok(file) => {
                if let Err(error) = self.prepare(&file, size) {
                    // Who has locked it meanwhile uses it.
                    if error.kind() != ErrorKind::Locked {
                        let _ = std::fs::remove_file(self.path);
                    }
                    return Err(error);
                }
                Ok((file, true))
            }
            Err(error) if error.errno() == EEXIST && !self.options.create_new => {
                Ok((self.open(false)?, false))
            }
            Err(error) => Err(error),
        }
    }

    fn open(&self, create_new: bool) -> Result<File> {
        // A FIFO would be waited for, and opening some devices has effects.
        if let Ok(metadata) = std::fs::metadata(self.path) {
            self.check_type(&metadata.file_type())?;
        }
        // Somebody who has mounted a block device holds it exclusively as well.
        let is_block = std::fs::metadata(self.path).is_ok_and(|m| m.file_type().is_block_device());
        let exclusive = is_block && !self.options.read_only && self.options.lock;
        let mut flags = OFlags::empty();
        flags.set(OFlags::EXCL, exclusive);
        flags.set(OFlags::DIRECT, self.options.cache == CacheMode::None);
        OpenOptions::new()
            .read(true)
            .write(!self.options.read_only)
            .create_new(create_new)
            .mode(0o600)
            .custom_flags(flags.bits().cast_signed())
            .open(self.path)
            .map_err(|error| self.os_failed(&error))
    }

    fn check_type(&self, file_type: &std::fs::FileType) -> Result<()> {
        if file_type.is_dir() {
            let detail = "is a directory: name the file inside it";
            return Err(self.failed(ErrorKind::InvalidInput, detail).with_errno(Some(EISDIR)));
        }
        if !file_type.is_file() && !file_type.is_block_device() {
            let detail = "is neither a file nor a block device: only those hold a disk";
            return Err(self.failed(ErrorKind::InvalidInput, detail));
        }
        Ok(())
    }

    /// Gives a new file its size and makes its name durable.
    fn prepare(&self, file: &File, size: u64) -> Result<()> {
        let failed = |error: io::Error| self.os_failed(&error);
        self.lock(file)?;
        rustix::fs::ftruncate(file, size).map_err(|e| failed(e.into()))?;
        file.sync_all().map_err(failed)?;
        let parent = match self.path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent.to_owned(),
            _ => PathBuf::from("."),
        };
        File::open(parent).and_then(|directory| directory.sync_all()).map_err(failed)
    }

    fn lock(&self, file: &File) -> Result<()> {
        if !self.options.lock {
            return Ok(());
        }
        let Err(error) = sys::lock_file(file, !self.options.read_only) else { return Ok(()) };
        Err(match Errno::from_io_error(&error) {
            Some(Errno::AGAIN | Errno::ACCESS) => {
                let others = if self.options.read_only { "writing" } else { "reading or writing" };
                let detail = format!(
                    "locked: another process (or another disk of this one) has it open for \
                     {others}: stop that first, or name another file"
                );
                self.failed(ErrorKind::Locked, &detail)
            }
            _ => {
                let detail = format!(
                    "cannot be locked ({error}): use a file system that knows locks, or switch \
                     locking off and see to it yourself that nobody else opens the file"
                );
                self.failed(ErrorKind::Unsupported, &detail)
            }
        })
    }

    fn finish(&self, file: File) -> Result<Core> {
        let failed = |error: io::Error| self.os_failed(&error);
        let metadata = file.metadata().map_err(failed)?;
        self.check_type(&metadata.file_type())?;
        self.lock(&file)?;
        let is_block = metadata.file_type().is_block_device();
        // After taking the lock: its last holder may have made the file longer.
        let size = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0))
            .map_err(|error| failed(error.into()))?;
        let block_device = if is_block { Some(block_len(&file).map_err(failed)?) } else { None };
        let direct = match self.options.cache {
            CacheMode::Writeback => None,
            CacheMode::None => Some(self.direct(&file, block_device)?),
        };
        let (can_discard, fast_zero) = match block_device {
            _ if self.options.read_only => (false, false),
            Some(_) => {
                let id = metadata.rdev();
                (queue_limit(id, "discard_max_bytes"), queue_limit(id, "write_zeroes_max_bytes"))
            }
            None => {
                let can_punch = can_punch(&file, size);
                (can_punch, can_punch)
            }
        };
        let limits = Limits {
            preferred_size: direct.as_ref().map_or(4096, |d| (d.block_len as u32).max(4096)),
            read_only: self.options.read_only,
            growable: self.options.growable && !is_block,
            can_discard,
            fast_zero,
            ..Limits::default()
        };
        let name = self.options.name.clone();
        let name = name.unwrap_or_else(|| self.path.display().to_string());
        Ok(Core::new(name, file, limits, size, block_device, direct))
    }

    /// Finds the alignment that direct I/O demands.
    fn direct(&self, file: &File, block_device: Option<u64>) -> Result<Direct> {
        let asked = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
        let known = asked.ok().filter(|found| found.stx_mask & StatxFlags::DIOALIGN.bits() != 0);
        let (memory_align, block_len) = match known {
            Some(found) if found.stx_dio_offset_align == 0 => {
                return Err(self.failed(ErrorKind::Unsupported, NO_DIRECT));
            }
            Some(found) => (found.stx_dio_mem_align, found.stx_dio_offset_align.into()),
            // A multiple of whatever a disk has in practice.
            None => (4096, block_device.unwrap_or(4096).max(512)),
        };
        let valid = |align: u64| align.is_power_of_two() && align <= 1 << 16;
        if !valid(memory_align.into()) || !valid(block_len) {
            return Err(self.failed(ErrorKind::Unsupported, NO_DIRECT));
        }
        // The very file that is open, even if the path has come to name another one.
        let same = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
        let cached = OpenOptions::new()
            .read(true)
            .write(!self.options.read_only)
            .open(same)
            .map_err(|error| self.os_failed(&error))?;
        let lock = RangeLock::new();
        Ok(Direct { memory_align: memory_align as usize, block_len, cached, lock })
    }
}

const EEXIST: i32 = Errno::EXIST.raw_os_error();
const EISDIR: i32 = Errno::ISDIR.raw_os_error();
const NO_DIRECT: &str = "the file system does not support direct I/O: use cache=writeback";

fn block_len(file: &File) -> io::Result<u64> {
    Ok(rustix::fs::ioctl_blksszget(file)?.max(512).into())
}

/// Whether holes can be made. Asked of a place beyond the end, so that nothing changes.
fn can_punch(file: &File, size: u64) -> bool {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, size, 4096).is_ok()
}

/// Whether a block device has this ability: the kernel gives its longest request.
fn queue_limit(device: u64, limit: &str) -> bool {
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    // A partition has the queue of its disk.
    ["queue", "../queue"].iter().any(|queue| {
        std::fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/{queue}/{limit}"))
            .is_ok_and(|value| value.trim().parse::<u64>().is_ok_and(|bytes| bytes > 0))
    })
}
