//! Random histories of a set of maps, and a model that says what each step leads to.

use std::collections::VecDeque;
use std::path::Path;

use crate::{Identity, InFlight, MapSet, Options, Role, Tag};

pub(super) const GRANULARITY_LOG2: u32 = 4;
pub(super) const GROUPS: u64 = 33_000;
/// The last group is partial, and the last chunk too.
pub(super) const SIZE: u64 = (GROUPS << GRANULARITY_LOG2) - 3;
pub(super) const ROLES: [Role; 3] = [Role::Open, Role::Pending, Role::Differs];

pub(super) fn options() -> Options {
    Options::new(Identity([7; 16]), SIZE, GRANULARITY_LOG2).boot_id([1; 16])
}

pub(super) fn tag(number: u64) -> Tag {
    Tag { id: [9; 16], number }
}

/// A directory in memory where there is one: what is tested does not depend on the disk.
pub(super) fn scratch() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap()
}

#[derive(Debug, Clone, Copy)]
pub(super) enum Step {
    Set(Role, u64, u64),
    Reset(Role, u64, u64),
    Transfer(Role, Role, u64, u64),
    ResetAll(Role),
    SetTag(Role, u64),
    Rotate(u64),
    DropPending,
    VoidPending,
    AllToDiffers,
    Flush,
    /// A write begins: it is in open, and in flight.
    Begin(u64, u64),
    /// The oldest write that is in flight ends.
    End,
}

/// Numbers from a seed, the same in every process.
pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ x >> 31) % end
    }

    fn range(&mut self) -> (u64, u64) {
        let first = self.below(GROUPS);
        let most = [1, 3, 200, 20_000][self.below(4) as usize];
        (first, (1 + self.below(most)).min(GROUPS - first))
    }

    /// A step that is allowed while a cut is outstanding, or not.
    pub(super) fn step(&mut self, has_pending: bool) -> Step {
        let (first, count) = self.range();
        let written = if self.below(2) == 0 { Role::Open } else { Role::Differs };
        match self.below(28) {
            20..=24 => Step::Begin(first, count),
            25..=27 => Step::End,
            0..=8 => Step::Set(written, first, count),
            9 => Step::Reset(written, first, count),
            10 => Step::Reset(Role::Pending, first, count),
            11 | 12 => Step::Transfer(Role::Differs, Role::Open, first, count),
            13 => Step::ResetAll(written),
            14 => Step::SetTag(written, first),
            15 => Step::AllToDiffers,
            16 => Step::Flush,
            _ if !has_pending => Step::Rotate(first),
            17 => Step::DropPending,
            18 => Step::VoidPending,
            _ => Step::Set(Role::Pending, first, count),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Model {
    /// One bool per group.
    maps: [Vec<bool>; 3],
    tags: [u64; 3],
    pub(super) has_pending: bool,
    in_flight: VecDeque<(u64, u64)>,
}

fn index(role: Role) -> usize {
    ROLES.iter().position(|r| *r == role).unwrap()
}

impl Model {
    pub(super) fn new() -> Self {
        let maps = std::array::from_fn(|_| vec![false; GROUPS as usize]);
        Model { maps, tags: [0; 3], has_pending: false, in_flight: VecDeque::new() }
    }

    pub(super) fn apply(&mut self, step: Step) {
        let range = |first: u64, count: u64| first as usize..(first + count) as usize;
        match step {
            Step::Set(role, first, count) => {
                self.maps[index(role)][range(first, count)].fill(true);
            }
            Step::Reset(role, first, count) => {
                self.maps[index(role)][range(first, count)].fill(false);
            }
            Step::Transfer(from, to, first, count) => {
                for group in range(first, count) {
                    let moved = std::mem::take(&mut self.maps[index(from)][group]);
                    self.maps[index(to)][group] |= moved;
                }
            }
            Step::ResetAll(role) => self.maps[index(role)].fill(false),
            Step::SetTag(role, number) => self.tags[index(role)] = number,
            Step::Rotate(number) => {
                self.maps.swap(0, 1);
                self.maps[0].fill(false);
                self.tags[1] = self.tags[0];
                self.tags[0] = number;
                self.has_pending = true;
            }
            Step::DropPending => self.end_pending(),
            Step::VoidPending => {
                self.apply(Step::Transfer(Role::Pending, Role::Open, 0, GROUPS));
                self.tags[0] = self.tags[1];
                self.end_pending();
            }
            Step::AllToDiffers => {
                self.apply(Step::Transfer(Role::Open, Role::Differs, 0, GROUPS));
                self.apply(Step::Transfer(Role::Pending, Role::Differs, 0, GROUPS));
                if self.has_pending {
                    self.tags[0] = self.tags[1];
                }
                self.end_pending();
            }
            Step::Flush => {}
            Step::Begin(first, count) => {
                self.apply(Step::Set(Role::Open, first, count));
                self.in_flight.push_back((first, count));
            }
            Step::End => drop(self.in_flight.pop_front()),
        }
    }

    fn end_pending(&mut self) {
        self.maps[1].fill(false);
        self.has_pending = false;
    }

    /// As it is after a kill: what was in flight differs.
    pub(super) fn after_kill(mut self) -> Self {
        for (first, count) in std::mem::take(&mut self.in_flight) {
            for group in first as usize..(first + count) as usize {
                self.maps[2][group] |= self.maps[0][group] || self.maps[1][group];
            }
        }
        self.without_idle_tag()
    }

    pub(super) fn of(maps: &MapSet) -> Self {
        let mut model = Model::new();
        for (index, role) in ROLES.into_iter().enumerate() {
            let map = maps.map(role);
            let mut count = 0;
            for item in map.iter(0) {
                model.maps[index][(item >> GRANULARITY_LOG2) as usize] = true;
                count += 1;
            }
            assert_eq!(map.count(), count << GRANULARITY_LOG2);
            model.tags[index] = maps.tag(role).number;
        }
        model.has_pending = maps.has_pending();
        model
    }

    /// Pending's tag says nothing while there is no pending.
    pub(super) fn without_idle_tag(&self) -> Self {
        let mut this = self.clone();
        if !this.has_pending {
            this.tags[1] = 0;
        }
        this
    }
}

/// A set of maps, and what is in flight.
pub(super) struct Maps(pub(super) MapSet, VecDeque<InFlight>);

impl Maps {
    pub(super) fn open(path: &Path) -> Self {
        Maps(MapSet::open(path, &options()).unwrap(), VecDeque::new())
    }
}

pub(super) fn apply(Maps(maps, in_flight): &mut Maps, step: Step) {
    let items = |first: u64, count: u64| {
        let start = first << GRANULARITY_LOG2;
        (start, (count << GRANULARITY_LOG2).min(SIZE - start))
    };
    match step {
        Step::Set(role, first, count) => {
            let (start, count) = items(first, count);
            maps.set(role, start, count);
        }
        Step::Reset(role, first, count) => {
            let (start, count) = items(first, count);
            maps.reset(role, start, count);
        }
        Step::Transfer(from, to, first, count) => {
            let (start, count) = items(first, count);
            maps.transfer(from, to, start, count);
        }
        Step::ResetAll(role) => maps.reset_all(role),
        Step::SetTag(role, number) => maps.set_tag(role, tag(number)),
        Step::Rotate(number) => maps.rotate(tag(number)).unwrap(),
        Step::DropPending => maps.drop_pending(),
        Step::VoidPending => maps.void_pending(),
        Step::AllToDiffers => maps.all_to_differs(),
        Step::Flush => maps.flush().unwrap(),
        Step::Begin(first, count) => {
            let (start, count) = items(first, count);
            maps.set(Role::Open, start, count);
            in_flight.extend(maps.begin_in_flight(start, count, 1));
        }
        Step::End => {
            if let Some(oldest) = in_flight.pop_front() {
                maps.end_in_flight(oldest);
            }
        }
    }
}

/// Opens the file that a kill left behind while it did `step`, and checks that it says what was
/// true `before` the step, or after it, or (where the step is not atomic) something between.
pub(super) fn check_after_kill(path: &Path, before: &Model, step: Option<Step>) {
    let maps = MapSet::open(path, &options()).unwrap();
    assert_eq!(maps.last_stop(), crate::LastStop::Killed);
    let found = Model::of(&maps).without_idle_tag();
    let mut after = before.clone();
    if let Some(step) = step {
        after.apply(step);
    }
    let (before, after) = (before.clone().after_kill(), after.after_kill());
    if found == before || found == after {
        return;
    }
    let atomic = !matches!(
        step,
        Some(
            Step::Set(..)
                | Step::Reset(..)
                | Step::Transfer(..)
                | Step::VoidPending
                | Step::AllToDiffers
                | Step::Begin(..)
        )
    );
    assert!(!atomic, "{step:?} must be done or not");
    assert!(found.has_pending == before.has_pending || found.has_pending == after.has_pending);
    let only_clears = matches!(step, Some(Step::Reset(..)));
    for group in 0..GROUPS as usize {
        let at = |model: &Model| model.maps.each_ref().map(|map| map[group]);
        let (old, new, found) = (at(&before), at(&after), at(&found));
        for map in 0..3 {
            let between = found[map] == old[map] || found[map] == new[map];
            assert!(between, "{step:?}: group {group} of map {map}");
        }
        let forgotten = old.contains(&true) && !found.contains(&true);
        assert!(only_clears || !forgotten, "{step:?}: group {group} is in no map at all");
    }
}
