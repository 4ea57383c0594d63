//! The system calls for which there is no safe wrapper.

pub(super) mod ring;

use std::ffi::c_int;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

use rustix::ioctl::{self, Opcode, Setter, opcode};

#[cfg(not(target_pointer_width = "64"))]
compile_error!("the layout of `struct flock` below is that of 64-bit Linux");

/// `struct flock` of 64-bit Linux.
#[repr(C)]
struct Flock {
    l_type: i16,
    l_whence: i16,
    l_start: i64,
    l_len: i64,
    l_pid: i32,
}

const F_OFD_SETLK: c_int = 37;
const F_RDLCK: i16 = 0;
const F_WRLCK: i16 = 1;
const SEEK_SET: i16 = 0;

const BLKDISCARD: Opcode = opcode::none(0x12, 119);

unsafe extern "C" {
    fn fcntl(fd: c_int, command: c_int, ...) -> c_int;
}

/// Locks the whole file, whatever its length becomes, for this open file description: against
/// every other one, also of this process. Does not wait.
///
/// # Errors
/// `EAGAIN` or `EACCES` if somebody else holds a lock that conflicts.
pub(super) fn lock_file(file: &File, exclusive: bool) -> io::Result<()> {
    let l_type = if exclusive { F_WRLCK } else { F_RDLCK };
    let flock = Flock { l_type, l_whence: SEEK_SET, l_start: 0, l_len: 0, l_pid: 0 };
    loop {
        // SAFETY: the descriptor is open as long as `file` is borrowed, and F_OFD_SETLK reads one
        // `struct flock`, which is what the pointer points at.
        if unsafe { fcntl(file.as_raw_fd(), F_OFD_SETLK, &raw const flock) } >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Tells a block device that a range, in whole logical blocks, is no longer needed.
pub(super) fn block_device_discard(file: &File, offset: u64, len: u64) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two 64-bit integers, start and length, through its argument.
    unsafe { ioctl::ioctl(file, Setter::<BLKDISCARD, [u64; 2]>::new([offset, len])) }?;
    Ok(())
}

/// Whether the file lies in a file system that has no disk below it (tmpfs, ramfs). Those refuse
/// reads that must not wait, although none of theirs does.
pub(in crate::raw) fn is_in_memory(file: &File) -> bool {
    const TMPFS: u64 = 0x0102_1994;
    const RAMFS: u64 = 0x8584_58f6;
    rustix::fs::fstatfs(file).is_ok_and(|fs| matches!(fs.f_type as u64, TMPFS | RAMFS))
}
