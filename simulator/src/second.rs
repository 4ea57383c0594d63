//! The secondary's own guest: it runs from the last checkpoint, and sees that and what it has written
//! since.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};

use brep_block::{BlockDevice, FlushLevel, WriteFlags, ZeroFlags};
use brep_nbd::client::Connection;
use brep_replication::simulation::control;
use bytes::Bytes;
use serde_json::Map;

use crate::file::SECTOR;
use crate::guest::Guest;
use crate::model::{Model, fill, stamp_of};
use crate::network::{GUEST_PORT, reach};
use crate::pace::Pace;
use crate::seen::Seen;
use crate::side::Setup;
use crate::world::{B, Life, World};

/// Its stamps are larger than those of the other guest.
const FIRST_STAMP: u64 = 1 << 40;

/// Checkpoints that may still be what it runs from: one that was being committed may not have been.
const VIEWS_MAX: usize = 2;

/// A disk and a sector.
pub(crate) type Place = (usize, usize);

/// What was read of a checkpoint, and until when its cut was made at the latest.
#[derive(Debug)]
pub(crate) struct Read {
    pub(crate) epoch: u64,
    pub(crate) until: u64,
    pub(crate) sectors: BTreeMap<Place, u64>,
}

/// A write of its own to a sector. Times are the world's ticks.
#[derive(Debug, Clone, Copy)]
struct Write {
    stamp: u64,
    start: u64,
    /// When it was answered; the end of time while it was not.
    end: u64,
    /// It has happened for sure, unless the power was lost since.
    acked: bool,
    /// It needs no flush.
    through: bool,
}

/// What it sees of one checkpoint.
#[derive(Debug, Default)]
struct View {
    /// When it was there for the first time.
    noticed: u64,
    /// What the checkpoint holds, as far as that was read.
    seen: BTreeMap<Place, u64>,
    own: BTreeMap<Place, Vec<Write>>,
    /// By disk: what had been answered before this time is on stable storage.
    flushed: BTreeMap<usize, u64>,
    /// Written, not flushed, and gone with the power: anything may be there.
    lost: BTreeSet<Place>,
}

impl View {
    /// Whether a read from `start` to `end` may have seen `stamp`; if it is the checkpoint's, that.
    fn fits(
        &self,
        place: Place,
        stamp: u64,
        (start, end): (u64, u64),
    ) -> Result<Option<u64>, String> {
        let own = self.own.get(&place).map_or(&[][..], Vec::as_slice);
        let before = own.iter().filter(|w| w.acked && w.end < start);
        let last = before.map(|w| w.start).max();
        let is_own = |w: &Write| w.stamp == stamp && w.start < end && w.end >= last.unwrap_or(0);
        if self.lost.contains(&place) || own.iter().any(is_own) {
            return Ok(None);
        }
        let (disk, sector) = place;
        match (last, self.seen.get(&place)) {
            (Some(_), _) => Err(format!("disk {disk} sector {sector} has {stamp}; own: {own:?}")),
            (None, Some(seen)) if *seen != stamp => {
                Err(format!("disk {disk} sector {sector} has {stamp}, and had {seen}"))
            }
            (None, _) => Ok(Some(stamp)),
        }
    }

    /// The same of a range; what the checkpoint holds of it.
    fn fits_all(
        &self,
        (disk, first): (usize, u64),
        data: &[u8],
        moments: (u64, u64),
    ) -> Result<Vec<(Place, u64)>, String> {
        let mut seen = Vec::new();
        for (sector, data) in (first..).zip(data.chunks(SECTOR as usize)) {
            let place = (disk, sector as usize);
            if self.lost.contains(&place) {
                continue;
            }
            let stamp = stamp_of(disk, sector, data)
                .ok_or_else(|| format!("disk {disk} sector {sector} is a mixture"))?;
            seen.extend(self.fits(place, stamp, moments)?.map(|stamp| (place, stamp)));
        }
        Ok(seen)
    }
}

#[derive(Debug, Default)]
struct Shared {
    stamp: u64,
    views: BTreeMap<u64, View>,
    /// Of checkpoints that it has left.
    left: Vec<Read>,
}

impl Shared {
    /// What it has of a checkpoint, which it may not have noticed before now.
    fn view_of(&mut self, epoch: u64, now: u64) -> &mut View {
        // What has not been answered may come after the commit, and is not dropped by it then.
        let mut own = BTreeMap::<Place, Vec<Write>>::new();
        if !self.views.contains_key(&epoch) {
            for (place, writes) in self.views.values().flat_map(|view| &view.own) {
                let open = writes.iter().filter(|write| write.end == u64::MAX);
                // Several checkpoints may have come while it waits.
                for write in open {
                    let known = own.entry(*place).or_default();
                    if !known.iter().any(|w| w.stamp == write.stamp && w.start == write.start) {
                        known.push(*write);
                    }
                }
            }
        }
        self.views.entry(epoch).or_insert_with(|| View { noticed: now, own, ..View::default() })
    }
}

/// What its workers share.
pub(crate) struct SecondGuest {
    world: Arc<World>,
    disks: usize,
    /// Where it connects.
    link: Arc<Guest>,
    pub(crate) pace: Pace,
    shared: Mutex<Shared>,
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Read,
    Write,
    WriteFua,
    Zeroes,
    Flush,
}

const KINDS: [Kind; 10] = [
    Kind::Read,
    Kind::Read,
    Kind::Read,
    Kind::Read,
    Kind::Read,
    Kind::Write,
    Kind::Write,
    Kind::WriteFua,
    Kind::Zeroes,
    Kind::Flush,
];

impl SecondGuest {
    pub(crate) fn new(world: &Arc<World>, setup: &Setup) -> Arc<Self> {
        let link = Guest::new(world, setup.disks, Model::blank(setup.disks, SECTOR), 0);
        link.plug(reach(B, None, GUEST_PORT));
        let shared = Shared { stamp: FIRST_STAMP, ..Shared::default() };
        Arc::new(SecondGuest {
            world: Arc::clone(world),
            disks: setup.disks,
            link,
            pace: Pace::new(world),
            shared: Mutex::new(shared),
        })
    }

    fn shared(&self) -> MutexGuard<'_, Shared> {
        self.shared.lock().expect("one thread")
    }

    /// The checkpoint from which it runs, if its machine is a secondary that has one.
    async fn epoch(&self) -> Option<u64> {
        let life = {
            let machine = &self.world.lock().machines[B];
            machine.alive.then_some(Life { side: B, number: machine.life })?
        };
        let control = control(&PathBuf::from(format!("/{life}/state/control.sock")))?;
        let status = control.handler.execute("query-status", Map::new()).await.ok()?;
        if status["role"] != "secondary" || !self.world.is_alive(life) {
            return None;
        }
        let epoch = status["checkpoint"].as_u64()?;
        self.notice(epoch);
        Some(epoch)
    }

    /// It runs from this checkpoint.
    fn notice(&self, epoch: u64) {
        let noticed = self.world.tick();
        let mut shared = self.shared();
        if shared.views.contains_key(&epoch) {
            return;
        }
        let wrote = shared.views.values().any(|view| !view.own.is_empty());
        shared.view_of(epoch, noticed);
        while shared.views.len() > VIEWS_MAX {
            let Some((epoch, view)) = shared.views.pop_first() else { break };
            shared.left.push(Read { epoch, until: view.noticed, sectors: view.seen });
        }
        drop(shared);
        self.world.note(|| format!("the secondary's guest runs from {epoch}"));
        if wrote {
            self.world.saw(Seen::SecondGuestMoved);
        }
    }

    /// What it has read of checkpoints that it has left.
    pub(crate) fn take_left(&self) -> Vec<Read> {
        std::mem::take(&mut self.shared().left)
    }

    /// What it has read of all checkpoints that were not told yet.
    pub(crate) fn reads(&self) -> Vec<Read> {
        let mut shared = self.shared();
        let mut reads = std::mem::take(&mut shared.left);
        let read = |(epoch, view): (&u64, &View)| Read {
            epoch: *epoch,
            until: view.noticed,
            sectors: view.seen.clone(),
        };
        reads.extend(shared.views.iter().map(read));
        reads
    }

    /// Its disks are others from now on.
    pub(crate) fn forget(&self) {
        let mut shared = self.shared();
        shared.views.clear();
        shared.left.clear();
    }

    /// Its machine has lost its power.
    pub(crate) fn power_lost(&self) {
        let mut shared = self.shared();
        for view in shared.views.values_mut() {
            let flushed = &view.flushed;
            let is_lost = |(place, writes): (&Place, &Vec<Write>)| {
                let flushed = flushed.get(&place.0).copied().unwrap_or(0);
                let safe = |w: &Write| w.acked && (w.through || w.end < flushed);
                (!writes.iter().all(safe)).then_some(*place)
            };
            let lost: Vec<_> = view.own.iter().filter_map(is_lost).collect();
            if !lost.is_empty() {
                self.world.saw(Seen::SecondGuestLost);
            }
            view.lost.extend(lost);
        }
    }

    /// Runs a worker until the guest ends.
    pub(crate) async fn work(self: Arc<Self>, pause_ms_max: u64) {
        while self.pace.wait(pause_ms_max).await {
            let _busy = self.pace.begin();
            self.request().await;
        }
    }

    async fn request(&self) {
        let disk = self.world.with_rng(|rng| rng.below(self.disks as u64)) as usize;
        let Some(connection) = self.link.connection(disk).await else { return };
        let Some(epoch) = self.epoch().await else { return };
        let sectors = connection.size() / SECTOR;
        let (kind, first, count) = self.world.with_rng(|rng| {
            let kind = rng.pick(&KINDS);
            // Mostly where the other guest writes too.
            let span = if rng.chance(700) { 256 } else { sectors };
            let most = rng.pick(&[1, 8, 64, 256]);
            let count = rng.range(1, most);
            (kind, rng.below(span - count + 1), count)
        });
        match kind {
            Kind::Read => self.read((disk, first), count, &connection, epoch).await,
            Kind::Flush => {
                let start = self.world.tick();
                let flushed = connection.flush(FlushLevel::Durable).await;
                if flushed.is_ok()
                    && self.epoch().await == Some(epoch)
                    && let Some(view) = self.shared().views.get_mut(&epoch)
                {
                    view.flushed.insert(disk, start);
                }
            }
            _ => self.change((disk, first), count, &connection, kind, epoch).await,
        }
    }

    async fn change(
        &self,
        (disk, first): (usize, u64),
        count: u64,
        connection: &Arc<Connection>,
        kind: Kind,
        epoch: u64,
    ) {
        let start = self.world.tick();
        let through = matches!(kind, Kind::WriteFua);
        let stamp = {
            let mut shared = self.shared();
            shared.stamp += 1;
            let stamp = if matches!(kind, Kind::Zeroes) { 0 } else { shared.stamp };
            let write = Write { stamp, start, end: u64::MAX, acked: false, through };
            let view = shared.view_of(epoch, start);
            for sector in first..first + count {
                view.own.entry((disk, sector as usize)).or_default().push(write);
            }
            stamp
        };
        let (offset, len) = (first * SECTOR, count * SECTOR);
        let outcome = match kind {
            Kind::Zeroes => connection.write_zeroes(offset, len, ZeroFlags::default()).await,
            _ => {
                let data = Bytes::from(fill(disk, first, count, stamp));
                connection.write(offset, data, WriteFlags { fua: through }).await
            }
        };
        let after = self.epoch().await;
        let end = self.world.tick();
        self.world.note(|| {
            let told = outcome.as_ref().map_err(|error| format!("{:?}", error.kind()));
            format!(
                "second guest {kind:?} d{disk} {first}+{count} = {stamp} on {epoch}-{after:?}: \
                 {start}-{end} {told:?}"
            )
        });
        // One that was answered after the next commit was dropped by it, or came after it.
        if after == Some(epoch)
            && let Some(view) = self.shared().views.get_mut(&epoch)
        {
            for sector in first..first + count {
                let own = view.own.entry((disk, sector as usize)).or_default();
                if let Some(write) = own.iter_mut().find(|write| write.start == start) {
                    (write.end, write.acked) = (end, outcome.is_ok());
                }
            }
            // What was lost before is there again.
            if outcome.is_ok() {
                let is_written = |place: &Place| {
                    place.0 == disk && (first..first + count).contains(&(place.1 as u64))
                };
                view.lost.retain(|place| !is_written(place));
                self.world.saw(Seen::SecondGuestWrote);
            }
        }
    }

    async fn read(
        &self,
        (disk, first): (usize, u64),
        count: u64,
        connection: &Arc<Connection>,
        epoch: u64,
    ) {
        let start = self.world.tick();
        let outcome = connection.read(first * SECTOR, (count * SECTOR) as usize).await;
        let end = self.world.tick();
        let (Ok(data), Some(after)) = (outcome, self.epoch().await) else { return };
        let mut shared = self.shared();
        let mut fits = Err("it has left that checkpoint".to_owned());
        // A read beside a commit sees what was there before it, or what is there after it.
        for seen_at in [epoch, after] {
            if fits.is_err()
                && let Some(view) = shared.views.get_mut(&seen_at)
            {
                fits = view.fits_all((disk, first), &data, (start, end));
            }
        }
        match fits {
            Err(why) => {
                drop(shared);
                let told = format!("I6: the secondary's guest at {epoch}-{after}: {why}");
                self.world.violated(told);
            }
            Ok(seen) => {
                if epoch == after
                    && let Some(view) = shared.views.get_mut(&epoch)
                {
                    view.seen.extend(seen);
                }
                drop(shared);
                self.world.saw(Seen::SecondGuestRead);
            }
        }
    }

    /// Sectors of a promoted disk that may hold anything.
    pub(crate) fn lost_at(&self, epoch: u64) -> Vec<Place> {
        let shared = self.shared();
        shared.views.get(&epoch).map_or_else(Vec::new, |view| view.lost.iter().copied().collect())
    }

    /// Whether a promoted disk is a checkpoint, or `latest`, and what was written to it here; the
    /// checkpoint's part of it, where that is known.
    pub(crate) fn check_promoted(
        &self,
        (epoch, latest): (u64, bool),
        contents: &[Vec<u64>],
    ) -> Result<BTreeMap<Place, u64>, String> {
        let now = self.world.tick();
        let mut shared = self.shared();
        let view = shared.view_of(epoch, now);
        // What was read of the checkpoint says nothing of what was received since.
        let without_seen = latest.then(|| View {
            own: view.own.clone(),
            lost: view.lost.clone(),
            ..View::default()
        });
        let view = without_seen.as_ref().unwrap_or(view);
        let mut of_checkpoint = BTreeMap::new();
        for (disk, sectors) in contents.iter().enumerate() {
            for (sector, stamp) in sectors.iter().enumerate() {
                let place = (disk, sector);
                let seen = view.fits(place, *stamp, (now, now));
                let seen = seen.map_err(|why| format!("I3, I6: promoted to {epoch}: {why}"))?;
                of_checkpoint.extend(seen.map(|stamp| (place, stamp)));
            }
        }
        let kept = view.own.values().flatten().any(|write| write.acked);
        drop(shared);
        if kept {
            self.world.saw(Seen::SecondGuestKept);
        }
        Ok(of_checkpoint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACE: Place = (0, 7);

    fn view(writes: &[(u64, u64, u64, bool)]) -> View {
        let write = |&(stamp, start, end, acked): &(u64, u64, u64, bool)| Write {
            stamp,
            start,
            end,
            acked,
            through: false,
        };
        let own = BTreeMap::from([(PLACE, writes.iter().map(write).collect())]);
        View { own, ..View::default() }
    }

    #[test]
    fn a_checkpoint_is_the_same_every_time_it_is_read() {
        let mut view = View::default();
        assert_eq!(view.fits(PLACE, 3, (1, 2)), Ok(Some(3)));
        view.seen.insert(PLACE, 3);
        assert_eq!(view.fits(PLACE, 3, (3, 4)), Ok(Some(3)));
        assert!(view.fits(PLACE, 4, (3, 4)).is_err());
    }

    #[test]
    fn own_writes_hide_the_checkpoint_when_they_were_answered() {
        let begun = view(&[(9, 5, u64::MAX, false)]);
        assert_eq!(begun.fits(PLACE, 9, (6, 7)), Ok(None));
        assert_eq!(begun.fits(PLACE, 3, (6, 7)), Ok(Some(3)), "it has not happened yet");
        let answered = view(&[(9, 5, 6, true)]);
        assert_eq!(answered.fits(PLACE, 9, (7, 8)), Ok(None));
        assert!(answered.fits(PLACE, 3, (7, 8)).is_err());
        let failed = view(&[(9, 5, 6, true), (10, 7, 8, false)]);
        assert_eq!(failed.fits(PLACE, 10, (9, 9)), Ok(None));
        assert_eq!(failed.fits(PLACE, 9, (9, 9)), Ok(None));
    }

    #[test]
    fn what_was_not_answered_outlives_a_checkpoint() {
        let world = World::new(1, 0);
        let shared =
            Shared { views: BTreeMap::from([(4, view(&[(9, 5, 6, true)]))]), ..Shared::default() };
        let link = Guest::new(&world, 1, Model::blank(1, SECTOR), 0);
        let pace = Pace::new(&world);
        let guest = SecondGuest { world, disks: 1, link, pace, shared: Mutex::new(shared) };
        guest.notice(5);
        assert!(guest.shared().views[&5].own.is_empty(), "dropped");
        guest.shared().views.insert(5, view(&[(11, 0, u64::MAX, false)]));
        guest.notice(6);
        assert_eq!(guest.shared().views[&6].own[&PLACE][0].stamp, 11);
        assert_eq!(guest.take_left().len(), 1, "two may still be the one");
        // It may have been promoted to one that nobody has noticed.
        let mut contents = vec![vec![0; 8]];
        contents[PLACE.0][PLACE.1] = 11;
        let of_checkpoint = guest.check_promoted((7, false), &contents).unwrap();
        assert!(!of_checkpoint.contains_key(&PLACE), "its own");
    }
}
