//! Children in memory that fail on demand, and an ear for events.
#![allow(dead_code, unreachable_pub)]

use std::sync::{Arc, Mutex};

use brep_block::{BlockDevice, Fault, Memory, Operation, Rule, WriteFlags};
use brep_quorum::{Child, Quorum, QuorumEvent, QuorumOperation, QuorumOptions, ReadPattern};
use bytes::Bytes;

pub const SIZE: u64 = 64 << 10;

pub struct Rig {
    pub memory: Vec<Arc<Memory>>,
    pub fault: Vec<Arc<Fault>>,
    pub quorum: Arc<Quorum>,
    pub events: Arc<Mutex<Vec<QuorumEvent>>>,
}

pub fn memory(i: usize) -> (Arc<Memory>, Arc<Fault>) {
    let memory = Memory::new(format!("node{i}"), SIZE);
    let fault = Fault::new(memory.clone());
    (memory, fault)
}

/// A quorum over `count` children; `edit` changes its options.
pub fn rig(count: usize, threshold: usize, edit: impl FnOnce(&mut QuorumOptions)) -> Rig {
    let (memory, fault): (Vec<_>, Vec<_>) = (0..count).map(memory).unzip();
    let children = fault.iter().map(|f| Child::new(f.clone() as _)).collect();
    let events = Arc::new(Mutex::new(Vec::new()));
    let sink = events.clone();
    let mut options = QuorumOptions::new("quorum", threshold, children)
        .events(move |event| sink.lock().unwrap().push(event));
    edit(&mut options);
    let quorum = Quorum::new(options).unwrap();
    Rig { memory, fault, quorum, events }
}

pub fn fifo(count: usize, threshold: usize) -> Rig {
    rig(count, threshold, |options| options.settings.read_pattern = ReadPattern::Fifo)
}

pub fn failing(operation: Operation, errno: i32) -> Rule {
    Rule::new(operation).forever().errno(errno)
}

impl Rig {
    pub async fn put(&self, child: usize, offset: u64, byte: u8) {
        let data = Bytes::from(vec![byte; 512]);
        self.memory[child].write(offset, data, WriteFlags::default()).await.unwrap();
    }

    pub async fn get(&self, child: usize, offset: u64) -> u8 {
        self.memory[child].read(offset, 1).await.unwrap()[0]
    }

    pub async fn write(&self, offset: u64, byte: u8) -> brep_block::Result<()> {
        self.quorum.write(offset, Bytes::from(vec![byte; 512]), WriteFlags::default()).await
    }

    pub async fn read(&self, offset: u64) -> brep_block::Result<u8> {
        let data = self.quorum.read(offset, 512).await?;
        assert!(data.iter().all(|b| *b == data[0]));
        Ok(data[0])
    }

    pub fn events(&self) -> Vec<QuorumEvent> {
        std::mem::take(&mut *self.events.lock().unwrap())
    }
}

pub fn failure(sector_num: u64, sectors_count: u64) -> QuorumEvent {
    QuorumEvent::Failure { reference: "quorum".into(), sector_num, sectors_count }
}

/// A `ReportBad` without a check of its text.
pub fn is_bad(event: &QuorumEvent, wanted: QuorumOperation, node: &str, with_error: bool) -> bool {
    matches!(event, QuorumEvent::ReportBad { operation, error, node_name, .. }
        if *operation == wanted && node_name == node && error.is_some() == with_error)
}
