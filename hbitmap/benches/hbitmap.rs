//! The bitmap of a disk of 1 TiB in granules of 64 KiB, next to the plain vector of words that
//! one would write first, to the `roaring` crate, and to its own form in a file.

use std::hint::black_box;
use std::time::Duration;

use brep_hbitmap::{HBitmap, Identity, MapSet, Options, Role, Tag};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use roaring::RoaringBitmap;

const SIZE: u64 = 1 << 40;
const GRANULARITY_LOG2: u32 = 16;
const BITS: u64 = SIZE >> GRANULARITY_LOG2;

/// A set of granules, for dirty tracking.
trait Map: Clone {
    const NAME: &'static str;

    fn empty() -> Self;
    fn set(&mut self, granule: u64);
    /// The number of dirty runs, and of granules in them.
    fn areas(&self) -> (u64, u64);
    fn merge(&mut self, other: &Self);
    fn count(&self) -> u64;
    fn clear(&mut self);
    fn memory_bytes(&self) -> usize;
}

impl Map for HBitmap {
    const NAME: &'static str = "hbitmap";

    fn empty() -> Self {
        HBitmap::new(SIZE, GRANULARITY_LOG2).expect("a possible map")
    }

    fn set(&mut self, granule: u64) {
        HBitmap::set(self, granule << GRANULARITY_LOG2, 4096);
    }

    fn areas(&self) -> (u64, u64) {
        let areas = self.dirty_areas(0..u64::MAX);
        let lens = areas.map(|area| (area.end - area.start) >> GRANULARITY_LOG2);
        lens.fold((0, 0), |(areas, granules), len| (areas + 1, granules + len))
    }

    fn merge(&mut self, other: &Self) {
        self.or_assign(other).expect("equal sizes");
    }

    fn count(&self) -> u64 {
        HBitmap::count(self) >> GRANULARITY_LOG2
    }

    fn clear(&mut self) {
        self.reset_all();
    }

    fn memory_bytes(&self) -> usize {
        HBitmap::memory_bytes(self)
    }
}

impl Map for Vec<u64> {
    const NAME: &'static str = "vector";

    fn empty() -> Self {
        vec![0; BITS as usize / 64]
    }

    fn set(&mut self, granule: u64) {
        self[granule as usize / 64] |= 1 << (granule % 64);
    }

    fn areas(&self) -> (u64, u64) {
        let (mut areas, mut granules, mut at) = (0, 0, 0);
        while let Some(start) = next(self, at, 0) {
            let end = next(self, start, !0).unwrap_or(BITS);
            (areas, granules, at) = (areas + 1, granules + end - start, end);
        }
        (areas, granules)
    }

    fn merge(&mut self, other: &Self) {
        self.iter_mut().zip(other).for_each(|(word, other)| *word |= other);
    }

    fn count(&self) -> u64 {
        self.iter().map(|word| u64::from(word.count_ones())).sum()
    }

    fn clear(&mut self) {
        self.fill(0);
    }

    fn memory_bytes(&self) -> usize {
        self.len() * 8
    }
}

/// The first bit from `from` on that is not as those of `skipped`.
fn next(words: &[u64], from: u64, skipped: u64) -> Option<u64> {
    let first = from as usize / 64;
    let mut mask = !0 << (from % 64);
    for (index, word) in words.iter().enumerate().skip(first) {
        let left = (word ^ skipped) & mask;
        if left != 0 {
            return Some(index as u64 * 64 + u64::from(left.trailing_zeros()));
        }
        mask = !0;
    }
    None
}

impl Map for RoaringBitmap {
    const NAME: &'static str = "roaring";

    fn empty() -> Self {
        RoaringBitmap::new()
    }

    fn set(&mut self, granule: u64) {
        self.insert(granule as u32);
    }

    fn areas(&self) -> (u64, u64) {
        let mut iter = self.iter();
        let (mut areas, mut granules) = (0, 0);
        while let Some(range) = iter.next_range() {
            let len = u64::from(range.end() - range.start()) + 1;
            (areas, granules) = (areas + 1, granules + len);
        }
        (areas, granules)
    }

    fn merge(&mut self, other: &Self) {
        *self |= other;
    }

    fn count(&self) -> u64 {
        self.len()
    }

    fn clear(&mut self) {
        RoaringBitmap::clear(self);
    }

    /// What it takes in a file; in memory it is a little more.
    fn memory_bytes(&self) -> usize {
        self.serialized_size()
    }
}

/// Runs all over the disk, in no order: how many, and how long.
#[derive(Clone, Copy)]
struct Load(u64, u64);

const LOADS: [Load; 4] = [Load(100, 1), Load(10_000, 1), Load(1_000_000, 1), Load(10_000, 100)];

impl Load {
    fn name(self) -> String {
        format!("{} runs of {}", self.0, self.1)
    }

    fn granules(self) -> impl Iterator<Item = u64> {
        let starts = (0..self.0).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % BITS);
        starts.flat_map(move |start| start..(start + self.1).min(BITS))
    }

    fn map<M: Map>(self) -> M {
        let mut map = M::empty();
        self.granules().for_each(|granule| map.set(granule));
        map
    }
}

fn set<M: Map>(c: &mut Criterion) {
    let load = LOADS[1];
    // As in an epoch: the memory is there from the one before.
    let mut map: M = load.map();
    c.benchmark_group(format!("clear, and set {}", load.name())).bench_function(M::NAME, |b| {
        b.iter(|| {
            map.clear();
            load.granules().for_each(|granule| map.set(granule));
            black_box(&map);
        });
    });
}

fn areas<M: Map>(c: &mut Criterion) {
    for load in LOADS {
        let map: M = load.map();
        c.benchmark_group(format!("iterate over {}", load.name()))
            .bench_function(M::NAME, |b| b.iter(|| black_box(&map).areas()));
    }
}

fn merge<M: Map>(c: &mut Criterion) {
    for load in [LOADS[1], LOADS[2]] {
        let other: M = load.map();
        c.benchmark_group(format!("merge {}", load.name())).bench_function(M::NAME, |b| {
            b.iter_batched_ref(|| other.clone(), |map| map.merge(&other), BatchSize::LargeInput);
        });
    }
}

fn count<M: Map>(c: &mut Criterion) {
    let map: M = LOADS[2].map();
    c.benchmark_group(format!("count {}", LOADS[2].name()))
        .bench_function(M::NAME, |b| b.iter(|| black_box(&map).count()));
}

fn clear<M: Map>(c: &mut Criterion) {
    for load in [LOADS[0], LOADS[2]] {
        let full: M = load.map();
        c.benchmark_group(format!("clear {}", load.name())).bench_function(M::NAME, |b| {
            b.iter_batched_ref(|| full.clone(), M::clear, BatchSize::LargeInput);
        });
    }
}

fn all<M: Map>(c: &mut Criterion) {
    for load in LOADS {
        let map: M = load.map();
        println!("memory of {} in {}: {} bytes", load.name(), M::NAME, map.memory_bytes());
        assert_eq!(map.areas(), load.map::<Vec<u64>>().areas(), "the same work is done");
    }
    set::<M>(c);
    areas::<M>(c);
    merge::<M>(c);
    count::<M>(c);
    clear::<M>(c);
}

fn file(c: &mut Criterion) {
    let directory = tempfile::tempdir().expect("a directory");
    let options = Options::new(Identity::default(), SIZE, GRANULARITY_LOG2);
    let mut maps = MapSet::create(directory.path().join("maps"), &options, Tag::default())
        .expect("a new file");
    let load = LOADS[1];
    c.benchmark_group(format!("clear, and set {}", load.name())).bench_function("file", |b| {
        b.iter(|| {
            for granule in load.granules() {
                maps.set(Role::Open, granule << GRANULARITY_LOG2, 4096);
            }
            maps.rotate(Tag::default()).expect("no cut is outstanding");
            maps.drop_pending();
        });
    });
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = all::<HBitmap>, all::<Vec<u64>>, all::<RoaringBitmap>, file
}
criterion_main!(benches);
