//! Losses of power: of everything that was stored since the last flush any sectors are kept, as
//! they were at any moment since. The maps, with the log's hot extents, hold every difference, and
//! nothing that neither was in them at some time nor is hot.

use std::fs;
use std::path::{Path, PathBuf};

use super::history::{Random, scratch};
use crate::{
    ActivityLog, AfterPowerLoss, Identity, LastStop, LogWrite, MapFlush, MapSet, Options, Role, Tag,
};

const LOG2: u32 = 12;
const GROUP: u64 = 1 << LOG2;
const GROUPS: u64 = 33_000;
const SIZE: u64 = GROUPS * GROUP;
const EXTENT_GROUPS: u64 = (4 << 20) / GROUP;
const IDENTITY: Identity = Identity([7; 16]);
const SECTOR: usize = 512;

fn options(boot: u8) -> Options {
    let options = Options::new(IDENTITY, SIZE, LOG2).boot_id([boot; 16]);
    options.after_power_loss(AfterPowerLoss::Accept)
}

/// A primary's maps and log, and what they have to hold.
struct Owner {
    path: PathBuf,
    maps: MapSet,
    log: ActivityLog,
    log_file: Vec<u8>,
    /// The maps' file as it was on stable storage, and at moments since.
    since_flush: Vec<Vec<u8>>,
    /// Groups that the peer may lack, by map.
    model: [Vec<bool>; 3],
    /// Those that were in a map at any time: a page that is used again may show what it held.
    ever: Vec<bool>,
}

impl Owner {
    fn new(path: &Path) -> Self {
        drop(MapSet::create(path, &options(1), Tag::default()).unwrap());
        let mut maps = MapSet::open(path, &options(1)).unwrap();
        maps.set_logged(true).unwrap();
        let log = ActivityLog::new(IDENTITY, SIZE);
        let mut this = Owner {
            path: path.to_owned(),
            maps,
            log,
            log_file: vec![0; ActivityLog::FILE_LEN as usize],
            since_flush: vec![fs::read(path).unwrap()],
            model: std::array::from_fn(|_| vec![false; GROUPS as usize]),
            ever: vec![false; GROUPS as usize],
        };
        this.cool();
        this
    }

    /// All bits are durable: every extent leaves, although its place is not needed.
    fn cool(&mut self) {
        let write = self.log.clear();
        self.put(&write);
    }

    fn put(&mut self, write: &LogWrite) {
        self.log_file[write.offset as usize..][..write.bytes.len()].copy_from_slice(&write.bytes);
        self.log.written();
    }

    fn heat(&mut self, first: u64, count: u64) {
        while !self.log.heat(first * GROUP, count * GROUP) {
            let write = self.log.next_write().expect("few extents");
            self.put(&write);
        }
    }

    /// The power may be lost just before.
    fn flush(&mut self, random: &mut Random) {
        self.lose_power(random);
        let sync = self.log.begin_sync();
        self.maps.flusher().run().unwrap();
        self.log.synced(sync);
        self.cool();
        self.since_flush = vec![fs::read(&self.path).unwrap()];
    }

    fn union(&self) -> Vec<bool> {
        let [open, pending, differs] = &self.model;
        let groups = open.iter().zip(pending).zip(differs);
        groups.map(|((open, pending), differs)| *open || *pending || *differs).collect()
    }

    fn unite(&mut self, to: usize, from: usize) {
        for group in 0..GROUPS as usize {
            let moved = std::mem::take(&mut self.model[from][group]);
            self.model[to][group] |= moved;
        }
    }

    fn step(&mut self, random: &mut Random) {
        let first = random.below(GROUPS - 300);
        let (start, count) = (first * GROUP, 1 + random.below(300));
        let range = first as usize..(first + count) as usize;
        match random.below(12) {
            role @ 0..=3 => {
                let (index, role) = if role < 3 { (0, Role::Open) } else { (2, Role::Differs) };
                self.heat(first, count);
                self.maps.set(role, start, count * GROUP);
                self.model[index][range].fill(true);
            }
            4 => {
                self.heat(first, count);
                self.maps.transfer(Role::Differs, Role::Open, start, count * GROUP);
                for group in range {
                    let moved = std::mem::take(&mut self.model[2][group]);
                    self.model[0][group] |= moved;
                }
            }
            5 | 6 if !self.maps.has_pending() => {
                self.maps.rotate(Tag::default()).unwrap();
                self.unite(1, 0);
            }
            5 | 7 => {
                self.maps.drop_pending();
                self.model[1].fill(false);
                // So that no chunk is newer than every header that may be found.
                self.flush(random);
            }
            6 | 8 if self.maps.has_pending() => {
                self.maps.unite(Role::Open, Role::Pending);
                self.flush(random);
                self.maps.void_pending();
                self.unite(0, 1);
                self.flush(random);
            }
            9 => {
                self.maps.unite(Role::Differs, Role::Open);
                self.maps.unite(Role::Differs, Role::Pending);
                self.flush(random);
                self.maps.all_to_differs();
                self.unite(2, 0);
                self.unite(2, 1);
                self.flush(random);
            }
            10 => self.flush(random),
            _ => {}
        }
        self.lose_power(random);
        if random.below(3) == 0 && self.since_flush.len() < 5 {
            self.since_flush.push(fs::read(&self.path).unwrap());
        }
    }

    /// Checks what a loss of power would leave now.
    fn lose_power(&mut self, random: &mut Random) {
        let union = self.union();
        self.ever.iter_mut().zip(union).for_each(|(ever, now)| *ever |= now);
        let found = self.path.with_extension("found");
        fs::write(&found, self.after_power_loss(random)).unwrap();
        check(self, &found);
    }

    /// The file that a loss of power leaves.
    fn after_power_loss(&self, random: &mut Random) -> Vec<u8> {
        let mut states = self.since_flush.clone();
        states.push(fs::read(&self.path).unwrap());
        let mut file = states[0].clone();
        // Some kernels write all, some nothing, most something.
        let kept = 1 + random.below(8);
        for at in (0..file.len()).step_by(SECTOR) {
            if random.below(kept) == 0 {
                let state = &states[random.below(states.len() as u64) as usize];
                file[at..at + SECTOR].copy_from_slice(&state[at..at + SECTOR]);
            }
        }
        file
    }
}

fn check(owner: &Owner, found: &Path) {
    let maps = MapSet::open(found, &options(2)).unwrap();
    assert_eq!(maps.last_stop(), LastStop::PowerLost);
    let (_, hot) = ActivityLog::load(found, &owner.log_file, IDENTITY, SIZE).unwrap();
    let mut is_hot = vec![false; GROUPS as usize];
    for range in hot {
        is_hot[(range.start / GROUP) as usize..(range.end / GROUP) as usize].fill(true);
    }
    let mut held = vec![false; GROUPS as usize];
    for map in [Role::Open, Role::Pending, Role::Differs].map(|role| maps.map(role)) {
        for area in map.dirty_areas(0..SIZE) {
            held[(area.start / GROUP) as usize..(area.end / GROUP) as usize].fill(true);
        }
    }
    for (group, needed) in owner.union().into_iter().enumerate() {
        let (held, hot, ever) = (held[group], is_hot[group], owner.ever[group]);
        assert!(!needed || held || hot, "group {group} is lost");
        assert!(!held || ever || hot, "group {group} was never in a map");
    }
}

#[test]
fn a_loss_of_power_at_any_moment_costs_no_more_than_the_hot_extents() {
    assert_eq!(SIZE / (4 << 20), GROUPS / EXTENT_GROUPS);
    let directory = scratch();
    for seed in 0..10 {
        let path = directory.path().join(format!("{seed}"));
        let mut owner = Owner::new(&path);
        let mut random = Random(seed);
        for _ in 0..100 {
            owner.step(&mut random);
        }
    }
}

/// What was on stable storage when the maps were closed is damage if it does not fit; what a loss
/// of power did to a file in use never is, nor does it make whole chunks dirty.
#[test]
fn chunks_that_were_sealed_by_a_clean_stop_are_not_taken_as_damaged_after_a_loss_of_power() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let mut owner = Owner::new(&path);
    owner.maps.set(Role::Differs, 0, GROUP);
    owner.maps.close().unwrap();
    let mut maps = MapSet::open(&path, &options(1)).unwrap();
    maps.set_logged(true).unwrap();
    let before = fs::read(&path).unwrap();
    maps.set(Role::Differs, 5 * GROUP, GROUP);
    // The bits are kept, and the table that says that they have no checksum is not.
    let mut after = fs::read(&path).unwrap();
    let bits = after.len() - 3 * 2 * 4096;
    after[..bits].copy_from_slice(&before[..bits]);
    drop(maps);
    fs::write(&path, after).unwrap();
    let maps = MapSet::open(&path, &options(2)).unwrap();
    let dirty: Vec<_> = maps.map(Role::Differs).iter(0).map(|item| item / GROUP).collect();
    assert_eq!(dirty, [0, 5]);
}

/// Whoever opens maps after a loss of power sets what was hot, and may be killed before: the next
/// one has to do it too.
#[test]
fn a_loss_of_power_is_found_again_until_its_hot_extents_may_have_been_set() {
    let directory = scratch();
    let path = directory.path().join("maps");
    drop(Owner::new(&path));
    let finer = Options::new(IDENTITY, SIZE, LOG2 + 1).boot_id([2; 16]);
    for options in [options(2), finer.after_power_loss(AfterPowerLoss::Accept)] {
        for _ in 0..2 {
            let maps = MapSet::open(&path, &options).unwrap();
            assert_eq!(maps.last_stop(), LastStop::PowerLost);
        }
    }
    let mut maps = MapSet::open(&path, &options(2)).unwrap();
    maps.set_logged(true).unwrap();
    drop(maps);
    assert_eq!(MapSet::open(&path, &options(2)).unwrap().last_stop(), LastStop::Killed);
}

#[test]
fn maps_can_be_flushed_while_they_change() {
    let directory = scratch();
    let path = directory.path().join("maps");
    let mut owner = Owner::new(&path);
    let flush: MapFlush = owner.maps.flusher();
    let thread = std::thread::spawn(move || flush.run());
    owner.maps.set(Role::Open, 0, SIZE);
    thread.join().unwrap().unwrap();
    assert_eq!(owner.maps.map(Role::Open).dirty_bytes(), SIZE);
}
