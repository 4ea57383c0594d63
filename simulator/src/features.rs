//! What some histories have, and others have not: each costs time, and none shall hide another.

use crate::rng::Rng;

/// Drawn apart from everything else: a history without them is what it is without this.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Features {
    /// A guest runs on machine B while that is the secondary.
    pub(crate) second_guest: bool,
    /// Some failovers are held first, and some of those undone.
    pub(crate) held: bool,
    /// Views of the last checkpoint are opened on the secondary.
    pub(crate) tests: bool,
    /// The disks of machine A are quorums of three files.
    pub(crate) quorum: bool,
    /// A disk comes and goes.
    pub(crate) disks: bool,
    /// The sides have other options each.
    pub(crate) mixed: bool,
}

impl Features {
    pub(crate) fn of(seed: u64) -> Self {
        let rng = &mut Rng::new(seed ^ 0xfea7);
        let features = Features {
            second_guest: rng.chance(150),
            held: rng.chance(250),
            tests: rng.chance(200),
            quorum: rng.chance(150),
            mixed: rng.chance(150),
            disks: rng.chance(300),
        };
        // A guest and a view each have the disks of their checkpoint, and a quorum's are not made later.
        let alone = !features.second_guest && !features.tests && !features.quorum;
        Features { disks: features.disks && alone, ..features }
    }

    pub(crate) fn any(self) -> bool {
        self.second_guest || self.held || self.tests || self.quorum || self.disks
    }
}
