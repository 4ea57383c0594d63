use std::io;
use std::sync::Arc;

use brep_block::{
    BlockDevice, BlockStatus, Error, ErrorKind, FlushLevel, Io, Limits, Operation, Result,
    StatusFlags, WriteFlags, ZeroFlags, is_zero,
};
use bytes::Bytes;

use crate::file::FileData;
use crate::files::Handle;

/// Bytes whose state is asked for at once.
const STATUS_BYTES: u64 = 4096;

/// A file as a device. Operations take time, fail, hang, and end in the middle when their process
/// is killed, as its machine's faults say.
#[derive(Debug)]
pub(crate) struct Disk {
    open: Arc<Open>,
}

#[derive(Debug)]
struct Open {
    handle: Handle,
    name: String,
    limits: Limits,
}

type Work<T> = Box<dyn FnOnce(&mut FileData) -> T + Send>;

impl Disk {
    pub(crate) fn over(
        handle: Handle,
        name: String,
        growable: bool,
        read_only: bool,
    ) -> Arc<dyn BlockDevice> {
        let limits =
            Limits { growable, read_only, can_discard: true, fast_zero: true, ..Limits::default() };
        Arc::new(Disk { open: Arc::new(Open { handle, name, limits }) })
    }

    /// Carries an operation out, at once or later. `first` is done when it begins, so that a kill
    /// leaves a part of it.
    fn run<T: Send + 'static>(
        &self,
        operation: Operation,
        (offset, len): (u64, u64),
        first: Option<Work<()>>,
        work: Work<T>,
    ) -> Io<'_, T> {
        let changes = matches!(operation, Operation::Write | Operation::WriteZeroes);
        let beyond = offset.checked_add(len).is_none_or(|end| end > self.size());
        if beyond && !(changes && self.open.limits.growable) {
            let kind = if changes { ErrorKind::NoSpace } else { ErrorKind::InvalidInput };
            let error = Error::new(operation, kind, &self.open.name, "beyond the end");
            return Io::err(error.at(offset, len));
        }
        let handle = &self.open.handle;
        let Some(delay) = handle.world.disk_delay(handle.life.side) else {
            if !handle.world.is_alive(handle.life) {
                return Io::future(std::future::pending());
            }
            let outcome = self.open.finish(operation, offset, len, work);
            if !handle.world.is_alive(handle.life) {
                return Io::future(std::future::pending());
            }
            return outcome.into();
        };
        let open = Arc::clone(&self.open);
        // It goes on although nobody waits for it any more.
        let task = tokio::spawn(async move {
            let (world, life) = (&open.handle.world, open.handle.life);
            if let Some(first) = first
                && world.is_alive(life)
            {
                first(&mut open.handle.file());
            }
            tokio::time::sleep(delay).await;
            while world.lock().machines[life.side].faults.hanging && world.is_alive(life) {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            }
            if !world.is_alive(life) {
                return std::future::pending().await;
            }
            let outcome = open.finish(operation, offset, len, work);
            if !world.is_alive(life) {
                return std::future::pending().await;
            }
            outcome
        });
        Io::future(async move {
            match task.await {
                Ok(outcome) => outcome,
                Err(_) => std::future::pending().await,
            }
        })
    }
}

impl Open {
    fn finish<T>(&self, operation: Operation, offset: u64, len: u64, work: Work<T>) -> Result<T> {
        let failed =
            |e: io::Error| Error::from_os(operation, self.name.as_str(), &e).at(offset, len);
        self.handle.world.mix(offset ^ len << 40);
        self.handle.operate(50 + operation as u64).map_err(failed)?;
        if matches!(operation, Operation::Write | Operation::WriteZeroes | Operation::Truncate) {
            self.handle.admit_len(offset + len).map_err(failed)?;
        }
        Ok(work(&mut self.handle.file()))
    }
}

fn whole_sectors(len: usize) -> usize {
    len / 512 / 2 * 512
}

impl BlockDevice for Disk {
    fn name(&self) -> &str {
        &self.open.name
    }

    fn size(&self) -> u64 {
        self.open.handle.file().data.len() as u64
    }

    fn limits(&self) -> Limits {
        self.open.limits
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        let work = move |file: &mut FileData| {
            // A file that was made shorter meanwhile reads as zeroes.
            let mut data = vec![0; len];
            let from = (offset as usize).min(file.data.len());
            let to = (offset as usize + len).min(file.data.len());
            data[..to - from].copy_from_slice(&file.data[from..to]);
            Bytes::from(data)
        };
        self.run(Operation::Read, (offset, len as u64), None, Box::new(work))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        let len = data.len() as u64;
        self.open.handle.world.mix_bytes(&data);
        let half = data.slice(..whole_sectors(data.len()));
        let fits = offset + len <= self.size();
        let first: Option<Work<()>> =
            fits.then(|| Box::new(move |file: &mut FileData| file.write(offset, &half)) as _);
        let work = move |file: &mut FileData| {
            file.write(offset, &data);
            if flags.fua {
                let flush = file.begin_flush();
                file.end_flush(flush, offset..offset + data.len() as u64);
            }
        };
        self.run(Operation::Write, (offset, len), first, Box::new(work))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        let work = move |file: &mut FileData| {
            file.zero(offset, len);
            if flags.fua {
                let flush = file.begin_flush();
                file.end_flush(flush, offset..offset + len);
            }
        };
        self.run(Operation::WriteZeroes, (offset, len), None, Box::new(work))
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        let work = move |file: &mut FileData| file.zero(offset, len);
        self.run(Operation::Discard, (offset, len), None, Box::new(work))
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        let work = move |file: &mut FileData| {
            let zero = |at: u64| {
                let end = (at - at % STATUS_BYTES + STATUS_BYTES).min(offset + len);
                (is_zero(&file.data[at as usize..end as usize]), end)
            };
            if len == 0 {
                return BlockStatus { len: 0, flags: StatusFlags::default() };
            }
            let (first, mut end) = zero(offset);
            while end < offset + len {
                let (next, further) = zero(end);
                if next != first {
                    break;
                }
                end = further;
            }
            let flags = StatusFlags { data: !first, zero: first, allocated: true };
            BlockStatus { len: end - offset, flags }
        };
        self.run(Operation::BlockStatus, (offset, len), None, Box::new(work))
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        match level {
            FlushLevel::Process => Io::ok(()),
            FlushLevel::Durable => {
                // It may take a while, in which others write on.
                let flush = self.open.handle.file().begin_flush();
                let work = move |file: &mut FileData| file.end_flush(flush, 0..u64::MAX);
                self.run(Operation::Flush, (0, 0), None, Box::new(work))
            }
        }
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        let work = move |file: &mut FileData| file.truncate(size);
        self.run(Operation::Truncate, (0, 0), None, Box::new(work))
    }
}
