//! The bitmap of a disk of 1 TiB in granules of 64 KiB, next to the plain vector of words that
//! one would write first, and its form in a file.

use std::hint::black_box;

use brep_hbitmap::{HBitmap, Identity, MapSet, Options, Role, Tag};
use criterion::{BatchSize, Criterion, criterion_group, criterion_main};

const SIZE: u64 = 1 << 40;
const GRANULARITY_LOG2: u32 = 16;
const BITS: u64 = SIZE >> GRANULARITY_LOG2;

/// Granules all over the disk, in no order.
fn scattered(count: u64) -> impl Iterator<Item = u64> {
    (0..count).map(|i| i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % BITS)
}

fn dirty_map(count: u64) -> HBitmap {
    let mut map = HBitmap::new(SIZE, GRANULARITY_LOG2).expect("a possible map");
    for granule in scattered(count) {
        map.set(granule << GRANULARITY_LOG2, 4096);
    }
    map
}

fn dirty_words(count: u64) -> Vec<u64> {
    let mut words = vec![0; BITS as usize / 64];
    for granule in scattered(count) {
        words[granule as usize / 64] |= 1 << (granule % 64);
    }
    words
}

fn scan(words: &[u64]) -> u64 {
    let mut sum = 0;
    for (index, word) in (0..).zip(words) {
        let mut word = *word;
        while word != 0 {
            sum += index * 64 + u64::from(word.trailing_zeros());
            word &= word - 1;
        }
    }
    sum
}

fn iterate(c: &mut Criterion) {
    for count in [100, 10_000, 1_000_000] {
        let mut group = c.benchmark_group(format!("iterate over {count} granules"));
        let map = dirty_map(count);
        group.bench_function("hbitmap", |b| {
            b.iter(|| black_box(&map).iter(0).map(|i| i >> GRANULARITY_LOG2).sum::<u64>());
        });
        let words = dirty_words(count);
        group.bench_function("vector", |b| b.iter(|| scan(black_box(&words))));
        group.finish();
    }
}

fn set(c: &mut Criterion) {
    let mut group = c.benchmark_group("set 10000 granules in an empty map");
    // As in an epoch: the memory is there from the one before.
    let mut map = dirty_map(10_000);
    group.bench_function("hbitmap", |b| {
        b.iter(|| {
            map.reset_all();
            for granule in scattered(10_000) {
                map.set(granule << GRANULARITY_LOG2, 4096);
            }
        });
    });
    let mut words = dirty_words(0);
    group.bench_function("vector", |b| {
        b.iter(|| {
            words.fill(0);
            for granule in scattered(10_000) {
                words[granule as usize / 64] |= 1 << (granule % 64);
            }
            black_box(&words);
        });
    });
    let directory = tempfile::tempdir().expect("a directory");
    let options = Options::new(Identity::default(), SIZE, GRANULARITY_LOG2);
    let mut maps = MapSet::create(directory.path().join("maps"), &options, Tag::default())
        .expect("a new file");
    group.bench_function("file, with cut and commit", |b| {
        b.iter(|| {
            for granule in scattered(10_000) {
                maps.set(Role::Open, granule << GRANULARITY_LOG2, 4096);
            }
            maps.rotate(Tag::default()).expect("no cut is outstanding");
            maps.drop_pending();
        });
    });
    group.finish();
}

fn reset_all(c: &mut Criterion) {
    let mut group = c.benchmark_group("reset_all");
    for count in [1, 1_000_000] {
        let full = dirty_map(count);
        group.bench_function(format!("hbitmap, {count} granules"), |b| {
            b.iter_batched_ref(|| full.clone(), HBitmap::reset_all, BatchSize::LargeInput);
        });
    }
    let full = dirty_words(1_000_000);
    group.bench_function("vector", |b| {
        b.iter_batched_ref(|| full.clone(), |words| words.fill(0), BatchSize::LargeInput);
    });
    group.finish();
}

criterion_group!(benches, iterate, set, reset_all);
criterion_main!(benches);
