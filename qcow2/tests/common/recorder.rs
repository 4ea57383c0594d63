//! A file in memory that remembers every change, so that a crash can be replayed at any point.

use std::sync::{Arc, Mutex};

use brep_block::{BlockDevice, BlockStatus, FlushLevel, Io, Limits, Memory, WriteFlags, ZeroFlags};
use bytes::Bytes;

use super::Rng;

#[derive(Debug, Clone)]
pub enum Event {
    Write(u64, Bytes),
    Punch(u64, u64),
    Truncate(u64),
    Flush,
}

#[derive(Debug)]
pub struct Recorder {
    inner: Arc<Memory>,
    events: Mutex<Vec<Event>>,
    /// Operations give way to other tasks a random number of times.
    delays: Option<Mutex<Rng>>,
}

impl Recorder {
    pub fn new() -> Arc<Self> {
        Arc::new(Recorder {
            inner: Memory::new_growable("file", 0),
            events: Mutex::default(),
            delays: None,
        })
    }

    pub fn delaying(seed: u64) -> Arc<Self> {
        Arc::new(Recorder {
            inner: Memory::new_growable("file", 0),
            events: Mutex::default(),
            delays: Some(Mutex::new(Rng::new(seed))),
        })
    }

    pub fn position(&self) -> usize {
        self.events.lock().unwrap().len()
    }

    pub fn events(&self) -> Vec<Event> {
        self.events.lock().unwrap().clone()
    }

    fn record(&self, event: Event) {
        self.events.lock().unwrap().push(event);
    }

    fn pauses(&self) -> u64 {
        self.delays.as_ref().map_or(0, |rng| {
            let mut rng = rng.lock().unwrap();
            if rng.below(3) == 0 { 0 } else { rng.below(6) }
        })
    }

    fn after_pauses<'a, T: Send + 'a>(
        &'a self,
        operation: impl FnOnce() -> Io<'a, T> + Send + 'a,
    ) -> Io<'a, T> {
        let (before, after) = (self.pauses(), self.pauses());
        if before + after == 0 {
            return operation();
        }
        Io::future(async move {
            for _ in 0..before {
                tokio::task::yield_now().await;
            }
            let result = operation().await;
            for _ in 0..after {
                tokio::task::yield_now().await;
            }
            result
        })
    }
}

impl BlockDevice for Recorder {
    fn name(&self) -> &str {
        "file"
    }

    fn size(&self) -> u64 {
        self.inner.size()
    }

    fn limits(&self) -> Limits {
        self.inner.limits()
    }

    fn read(&self, offset: u64, len: usize) -> Io<'_, Bytes> {
        self.after_pauses(move || self.inner.read(offset, len))
    }

    fn write(&self, offset: u64, data: Bytes, flags: WriteFlags) -> Io<'_, ()> {
        self.after_pauses(move || {
            self.record(Event::Write(offset, data.clone()));
            self.inner.write(offset, data, flags)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Io<'_, ()> {
        self.after_pauses(move || {
            self.record(Event::Punch(offset, len));
            self.inner.write_zeroes(offset, len, flags)
        })
    }

    fn discard(&self, offset: u64, len: u64) -> Io<'_, ()> {
        self.after_pauses(move || {
            self.record(Event::Punch(offset, len));
            self.inner.write_zeroes(offset, len, ZeroFlags::default())
        })
    }

    fn block_status(&self, offset: u64, len: u64) -> Io<'_, BlockStatus> {
        self.inner.block_status(offset, len)
    }

    fn flush(&self, level: FlushLevel) -> Io<'_, ()> {
        self.after_pauses(move || {
            if level == FlushLevel::Durable {
                self.record(Event::Flush);
            }
            self.inner.flush(level)
        })
    }

    fn truncate(&self, size: u64) -> Io<'_, ()> {
        self.after_pauses(move || {
            self.record(Event::Truncate(size));
            self.inner.truncate(size)
        })
    }
}

/// The contents of a file while events are applied to it.
#[derive(Debug, Clone, Default)]
pub struct Replay(Vec<u8>);

impl Replay {
    pub fn apply(&mut self, event: &Event) {
        match event {
            Event::Write(offset, data) => {
                let end = *offset as usize + data.len();
                if self.0.len() < end {
                    self.0.resize(end, 0);
                }
                self.0[*offset as usize..end].copy_from_slice(data);
            }
            Event::Punch(offset, len) => {
                let end = (*offset + *len).min(self.0.len() as u64) as usize;
                if (*offset as usize) < end {
                    self.0[*offset as usize..end].fill(0);
                }
            }
            Event::Truncate(size) => self.0.resize(*size as usize, 0),
            Event::Flush => {}
        }
    }

    /// A file with these contents.
    pub async fn file(&self) -> Arc<dyn BlockDevice> {
        let file = Memory::new_growable("file", 0);
        let data = Bytes::copy_from_slice(&self.0);
        file.write(0, data, WriteFlags::default()).await.unwrap();
        file
    }
}
