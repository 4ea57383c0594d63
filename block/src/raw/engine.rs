//! Where system calls are made: inline if they cannot block, else by io_uring or on tokio's
//! blocking threads.

use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::Arc;

use rustix::io::{Errno, ReadWriteFlags};

use super::core::Core;
use super::sys::ring::{self, Outcome, Read};
use crate::Buffer;
use crate::{Error, ErrorKind, Operation, Result};

/// Runs `work` where it may block.
///
/// # Panics
/// Outside a tokio runtime.
pub(super) async fn run<T: Send + 'static>(
    core: &Arc<Core>,
    operation: Operation,
    work: impl FnOnce(&Arc<Core>) -> Result<T> + Send + 'static,
) -> Result<T> {
    let owned = Arc::clone(core);
    match tokio::task::spawn_blocking(move || work(&owned)).await {
        Ok(result) => result,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(shutdown(core, operation)),
        },
    }
}

pub(super) fn shutdown(core: &Core, operation: Operation) -> Error {
    Error::new(operation, ErrorKind::Shutdown, &core.name, "the runtime is shutting down")
}

/// Reads into a buffer from index `from` on, if there is a ring: how many bytes are there then.
///
/// Fewer than wanted say nothing: plain calls have to read on.
pub(super) async fn read_by_ring(
    core: &Arc<Core>,
    offset: u64,
    buffer: Buffer,
    from: usize,
) -> Result<(Buffer, usize)> {
    let read = Read { core: Arc::clone(core), offset, buffer, from };
    match ring::read(read).await {
        Outcome::Done(len, buffer) => Ok((buffer, from + len)),
        Outcome::Refused(buffer) => Ok((buffer, from)),
        Outcome::Shutdown => Err(shutdown(core, Operation::Read)),
    }
}

/// Reads what can be had without waiting: how many bytes, from the start of `buffer`.
/// `None` if the file cannot say.
pub(super) fn read_cached(file: &File, offset: u64, buffer: &mut [u8]) -> Option<usize> {
    loop {
        let slices = &mut [IoSliceMut::new(buffer)];
        match rustix::io::preadv2(file, slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(len) => return Some(len),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => return None,
            // Not in the cache, or an error that the waiting read will meet again.
            Err(_) => return Some(0),
        }
    }
}

/// Reads until the buffer is full or the file ends; how many bytes.
///
/// After a short read it goes on at a multiple of `align`, as direct I/O demands.
pub(super) fn read_full(
    file: &File,
    offset: u64,
    buffer: &mut [u8],
    align: usize,
) -> io::Result<usize> {
    let mut done = 0;
    while done < buffer.len() {
        let from = done / align * align;
        let len = match rustix::io::pread(file, &mut buffer[from..], offset + from as u64) {
            Ok(len) => len,
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        };
        if from + len <= done {
            break;
        }
        done = from + len;
    }
    Ok(done)
}

/// Writes all of `data`; with `durable`, onto stable storage.
pub(super) fn write_full(
    file: &File,
    offset: u64,
    data: &[u8],
    align: usize,
    durable: bool,
) -> io::Result<()> {
    let flags = if durable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
    let mut done = 0;
    while done < data.len() {
        let slices = &[IoSlice::new(&data[done..])];
        match rustix::io::pwritev2(file, slices, offset + done as u64, flags) {
            // No file system does this; it must not become an endless loop.
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            // What is written twice by rounding down is the same data.
            Ok(len) if done + len < data.len() => {
                let next = (done + len) / align * align;
                if next == done {
                    return Err(io::ErrorKind::WriteZero.into());
                }
                done = next;
            }
            Ok(len) => done += len,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
