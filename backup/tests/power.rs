//! Loss of power at any operation of copies, checkpoints and recycling: the last checkpoint that was
//! recorded is found whole, and goes on being kept.

use std::sync::Arc;

use brep_backup::{CbwOptions, Copied, CopyBeforeWrite};
use brep_block::{BlockDevice, FlushLevel, Memory, Power, Result, WriteFlags, ZeroFlags};
use brep_qcow2::{CreateOptions, MakeEmpty, OpenOptions, Qcow2};
use bytes::Bytes;

/// Not a multiple of a unit.
const SIZE: u64 = (256 << 10) + 512;
/// Requests that are in flight at a time.
const AT_A_TIME: usize = 5;

struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) % limit
    }
}

/// What stays on a machine without power: the disk, two buffers, and what the record says.
struct Machine {
    disk: Arc<Memory>,
    files: [Arc<Memory>; 2],
    record: Record,
    unit_of_cluster: bool,
    ahead_bytes: u64,
}

/// Saved atomically: a save is as good as durable when it has returned.
#[derive(Clone, Debug)]
struct Record {
    /// Buffers of the checkpoint, the oldest first.
    chain: Vec<usize>,
    next: Option<usize>,
    checkpoint: Vec<u8>,
}

async fn open(file: Arc<dyn BlockDevice>, backing: Option<Arc<dyn BlockDevice>>) -> Arc<Qcow2> {
    let options = OpenOptions { backing, ignore_backing_name: true, ..OpenOptions::default() };
    Qcow2::open(file, options).await.unwrap()
}

impl Machine {
    async fn new(unit_of_cluster: bool) -> Self {
        let disk = Memory::new("disk", SIZE);
        let content: Vec<u8> = (0..SIZE).map(|at| (at / 512 + 1) as u8).collect();
        disk.write(0, content.clone().into(), WriteFlags::default()).await.unwrap();
        let files = [Memory::new_growable("h0", 0), Memory::new_growable("h1", 0)];
        for file in &files {
            let file = Arc::clone(file) as Arc<dyn BlockDevice>;
            let create = match unit_of_cluster {
                true => CreateOptions { cluster_bits: 14, ..CreateOptions::new(SIZE) },
                false => CreateOptions::buffer(SIZE),
            };
            Qcow2::create(&file, &create).await.unwrap();
        }
        let record = Record { chain: vec![0], next: Some(1), checkpoint: content };
        Machine { disk, files, record, unit_of_cluster, ahead_bytes: 0 }
    }

    /// What the chain that the record names shows, with a cut that was not committed.
    async fn checkpoint(&self) -> Vec<u8> {
        let mut below = Arc::clone(&self.disk) as Arc<dyn BlockDevice>;
        let newer = self.record.next.iter().chain(self.record.chain.iter().rev());
        for &index in newer {
            let file = Arc::clone(&self.files[index]) as Arc<dyn BlockDevice>;
            below = open(file, Some(below)).await;
        }
        below.read(0, SIZE as usize).await.unwrap().to_vec()
    }

    /// Writes, checkpoints and recycles until the power goes, at the latest after some rounds.
    async fn run(&mut self, power: &Arc<Power>, random: &mut Random) -> Result<()> {
        let disk = power.device(Arc::clone(&self.disk) as _);
        let mut buffers = Vec::new();
        for file in &self.files {
            buffers.push(open(power.device(Arc::clone(file) as _), None).await);
        }
        if let Some(next) = self.record.next
            && !buffers[next].is_empty().await?
        {
            self.record.chain.push(next);
            self.record.next = None;
        }
        let newest = *self.record.chain.last().unwrap();
        let unit_bytes = if self.unit_of_cluster { 16 << 10 } else { 2 << 10 };
        let options = CbwOptions {
            assume: Copied::AllocatedInTarget,
            discard_as_zeroes: true,
            barrier: Some(FlushLevel::Durable),
            unit_bytes,
            ahead_bytes: self.ahead_bytes,
            ..CbwOptions::new("cbw")
        };
        let filter = CopyBeforeWrite::new(disk.clone(), buffers[newest].clone(), options)?;
        for _ in 0..4 {
            for _ in 0..random.below(4) {
                change(&filter, random).await?;
            }
            match self.record.next {
                Some(next) => self.checkpoint_onto(&filter, &*disk, &buffers, next).await?,
                // A chain of two: the next commit needs a buffer more than there is.
                None => return Ok(()),
            }
        }
        Ok(())
    }

    async fn checkpoint_onto(
        &mut self,
        filter: &CopyBeforeWrite,
        disk: &dyn BlockDevice,
        buffers: &[Arc<Qcow2>],
        next: usize,
    ) -> Result<()> {
        filter.drain().await;
        filter.switch_target(buffers[next].clone())?;
        let cut = self.disk.read(0, SIZE as usize).await?.to_vec();
        disk.flush(FlushLevel::Durable).await?;
        let retired = std::mem::replace(&mut self.record.chain, vec![next]);
        self.record.next = None;
        self.record.checkpoint = cut;
        for index in retired {
            buffers[index].make_empty(MakeEmpty::Keep).await?;
            buffers[index].flush(FlushLevel::Durable).await?;
            self.record.next = Some(index);
        }
        Ok(())
    }
}

/// Some requests at a time, anywhere, all of which end.
async fn change(filter: &CopyBeforeWrite, random: &mut Random) -> Result<()> {
    let mut next = 0;
    let requests: Vec<_> = (0..AT_A_TIME)
        .map(|_| {
            // Often in one cluster.
            let place = random.below(6) * (40 << 10) + random.below(16 << 10);
            let at = if random.below(3) == 0 { next.min(SIZE - 512) } else { place };
            let len = (random.below(9000) + 1).min(SIZE - at);
            next = at + len;
            match random.below(6) {
                0 => filter.write_zeroes(at, len, ZeroFlags::default()),
                1 => filter.discard(at, len),
                2 => filter.write(SIZE - 300, vec![3; 300].into(), WriteFlags::default()),
                byte => {
                    let data = Bytes::from(vec![byte as u8 * 50; len as usize]);
                    filter.write(at, data, WriteFlags::default())
                }
            }
        })
        .collect();
    // They have begun already, and all of them end.
    let mut result = Ok(());
    for request in requests {
        result = result.and(request.await);
    }
    result
}

async fn survives(unit_of_cluster: bool, ahead_bytes: u64, seeds: std::ops::Range<u64>) {
    let mut cuts = 0;
    for seed in seeds {
        let mut random = Random(seed);
        let mut machine = Machine::new(unit_of_cluster).await;
        machine.ahead_bytes = ahead_bytes;
        // Each loss of power is met by what the ones before it have left.
        for life in 0..3 {
            let power = Power::new();
            power.set_flush_yields(random.below(4));
            power.fail_after(random.below(150) + 1);
            let ended = machine.run(&power, &mut random).await;
            // A copy ahead may meet the loss when nobody waits any more.
            let is_met = ended.is_err() || (ahead_bytes > 0 && power.is_off());
            assert_eq!(is_met, power.is_off(), "seed {seed}: {ended:?}");
            power.cut(random.below(u64::MAX >> 33)).await.unwrap();
            cuts += u64::from(ended.is_err());
            let found = machine.checkpoint().await;
            let wrong = (0..SIZE as usize).find(|&at| found[at] != machine.record.checkpoint[at]);
            assert_eq!(wrong, None, "seed {seed}, life {life}: byte of the checkpoint is lost");
        }
    }
    assert!(cuts > 30, "the power went only {cuts} times");
}

#[tokio::test]
async fn a_power_loss_at_any_operation_leaves_the_recorded_checkpoint() {
    survives(false, 0, 0..60).await;
}

#[tokio::test]
async fn in_an_image_without_sub_clusters_too() {
    survives(true, 0, 0..25).await;
}

#[tokio::test]
async fn while_pre_images_are_copied_ahead_too() {
    survives(false, 64 << 10, 0..60).await;
    survives(true, 64 << 10, 0..25).await;
}

/// Copies that go on together share their flushes.
#[tokio::test]
async fn one_flush_serves_many_copies() {
    let machine = Machine::new(false).await;
    let power = Power::new();
    let file = brep_block::Count::new(power.device(Arc::clone(&machine.files[0]) as _));
    let buffer = open(file.clone(), None).await;
    let options = CbwOptions {
        barrier: Some(FlushLevel::Durable),
        ..CbwOptions::new("cbw").unit_of(&*buffer)
    };
    let filter = CopyBeforeWrite::new(machine.disk.clone(), buffer, options).unwrap();
    // The first of all makes tables and takes clusters.
    filter.write(250 << 10, vec![9; 512].into(), WriteFlags::default()).await.unwrap();
    file.reset();
    power.set_flush_yields(20);
    let writes = (0..24).map(|i| filter.write(i << 13, vec![9; 512].into(), Default::default()));
    for write in writes.collect::<Vec<_>>() {
        write.await.unwrap();
    }
    let flushes = file.of(brep_block::Operation::Flush).operations;
    assert!((2..=6).contains(&flushes), "{flushes} flushes for 24 writes");
    filter.write(0, vec![8; 512].into(), WriteFlags::default()).await.unwrap();
    let again = file.of(brep_block::Operation::Flush).operations;
    assert_eq!(again, flushes, "what has been copied waits for no flush");
}
