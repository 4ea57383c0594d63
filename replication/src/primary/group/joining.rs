//! Disks whose first copy to the secondary has not ended: the others' checkpoints go on without them.

use std::collections::BTreeMap;
use std::sync::Arc;

use brep_hbitmap::{MapSet, Role};

use super::{Core, DiskPart, Group};

/// The disks of a session that its checkpoints do not hold yet, by their numbers, and whether a write
/// of theirs has failed in it.
#[derive(Debug, Default)]
pub(super) struct Joining(BTreeMap<usize, bool>);

impl Joining {
    /// A session of all these disks begins, of which some join. If all do there are no others for
    /// which a checkpoint could be taken: then it waits for them.
    pub(super) fn begin(all: &[Arc<DiskPart>], joins: impl Fn(&DiskPart) -> bool) -> Self {
        let joining = all.iter().filter(|disk| joins(disk)).map(|disk| (disk.number, false));
        let joining: BTreeMap<_, _> = joining.collect();
        Joining(if joining.len() == all.len() { BTreeMap::new() } else { joining })
    }

    pub(super) fn has(&self, disk: usize) -> bool {
        self.0.contains_key(&disk)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn numbers(&self) -> Vec<usize> {
        self.0.keys().copied().collect()
    }

    /// Whether a write whose end was this leaves its epoch fit for a checkpoint. What fails of a disk
    /// that joins differs, and its copy does not end before it has been sent again.
    pub(super) fn ended_well(&mut self, disk: usize, is_ok: bool) -> bool {
        match self.0.get_mut(&disk) {
            Some(has_failed) => {
                *has_failed |= !is_ok;
                true
            }
            None => is_ok,
        }
    }

    pub(super) fn has_failed(&self, disk: usize) -> bool {
        self.0.get(&disk).is_some_and(|has_failed| *has_failed)
    }
}

impl Core {
    /// Whether anything is being copied to the peer, but for what one checkpoint repairs.
    pub(crate) fn is_copying(&self) -> bool {
        self.copying || !self.joining.is_empty()
    }

    /// Whether a disk is copied that no checkpoint holds before that has ended.
    pub(crate) fn is_joining(&self, disk: usize) -> bool {
        self.joining.has(disk)
    }

    /// The maps of the disks that a cut is of.
    pub(super) fn maps_to_cut(&mut self) -> impl Iterator<Item = &mut MapSet> {
        let joining = &self.joining;
        self.maps.iter_mut().filter(|(disk, _)| !joining.has(**disk)).map(|(_, maps)| maps)
    }

    /// The numbers of the disks that join.
    pub(crate) fn joining_disks(&self) -> Vec<usize> {
        self.joining.numbers()
    }

    /// Ends what joins with the session.
    pub(super) fn end_joining(&mut self) {
        self.joining = Joining::default();
    }
}

impl Group {
    /// The disks whose first copy has not ended, or all others.
    pub(crate) fn disks_that_join(&self, join: bool) -> Vec<Arc<DiskPart>> {
        let (disks, core) = (self.disks(), self.core());
        disks.into_iter().filter(|disk| core.is_joining(disk.number) == join).collect()
    }

    /// The first copy of a disk has ended if nothing of it differs any more: then the next checkpoint
    /// holds it. Returns whether that is so.
    pub(crate) fn try_join(&self, disk: usize) -> bool {
        let mut core = self.core();
        let is_equal = core.maps.get(&disk).is_none_or(|maps| maps.map(Role::Differs).is_empty());
        if is_equal && core.joining.0.remove(&disk).is_some() {
            core.settling = true;
        }
        is_equal
    }
}
