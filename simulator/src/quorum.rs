//! A machine whose disks are quorums of three files each, one of which is not to be trusted.

use std::sync::Arc;

use brep_block::BlockDevice;
use brep_quorum::{Child, Quorum, QuorumEvent, QuorumOptions, Settings};

use crate::acts::Lasting;
use crate::file::SECTOR;
use crate::history::History;
use crate::names::File;
use crate::seen::Seen;
use crate::side::disk_name;
use crate::world::{A, Life, Side, World};

/// The files of a quorum, of which two have to agree.
const CHILDREN: usize = 3;

/// The one that fails and lies.
const BAD: usize = 1;

/// Whether a file is a child of a quorum, and which.
pub(crate) fn child_of(name: &str) -> Option<usize> {
    let (_, rest) = name.split_once(".q")?;
    rest.strip_suffix(".raw")?.parse().ok()
}

/// Whether a child may fail by itself.
pub(crate) fn may_fail(child: usize) -> bool {
    child == BAD
}

/// The files that make a disk whose own would be `name`.
pub(crate) fn children(name: &str) -> [String; CHILDREN] {
    let disk = name.strip_suffix(".raw").unwrap_or(name);
    [0, 1, 2].map(|child| format!("{disk}.q{child}.raw"))
}

/// Joins the files of a disk.
pub(crate) fn join(
    world: &Arc<World>,
    life: Life,
    name: String,
    files: Vec<Arc<dyn BlockDevice>>,
) -> Arc<dyn BlockDevice> {
    let world = Arc::clone(world);
    let told = move |event: QuorumEvent| match event {
        _ if !world.is_alive(life) => {}
        QuorumEvent::ReportBad { error: None, .. } => world.saw(Seen::ChildOutvoted),
        QuorumEvent::ReportBad { .. } => world.saw(Seen::ChildFailed),
        QuorumEvent::Failure { .. } => {
            world.violated("I1: a quorum fails, of which two children are good".to_owned());
        }
    };
    let children = files.into_iter().map(Child::new).collect();
    let settings = Settings { rewrite_corrupted: true, ..Settings::new(2) };
    let options = QuorumOptions::new(name, 2, children).settings(settings).events(told);
    Quorum::new(options).expect("three files of one size") as _
}

impl History {
    fn children_of(&self, side: Side, disk: usize) -> Vec<File> {
        let names = &self.world.lock().machines[side].names;
        let files = children(&format!("{}.raw", disk_name(disk)));
        files.iter().filter_map(|name| names.get(name).cloned()).collect()
    }

    /// Before a machine's process starts after any end, its operator makes the children equal: by
    /// sector, what two of them have, or what the first one has.
    pub(crate) fn make_children_equal(&self, side: Side) {
        for disk in 0..self.setup.disks {
            let files = self.children_of(side, disk);
            let mut files: Vec<_> =
                files.iter().map(|file| file.lock().expect("one thread")).collect();
            let [first, second, third] = &mut files[..] else { continue };
            for sector in 0..first.data.len() / SECTOR as usize {
                let at = sector * SECTOR as usize..(sector + 1) * SECTOR as usize;
                let (a, b, c) =
                    (&first.data[at.clone()], &second.data[at.clone()], &third.data[at.clone()]);
                if a == b && b == c {
                    continue;
                }
                let elected = if b == c { b } else { a }.to_vec();
                for file in [&mut *first, &mut *second, &mut *third] {
                    file.write(at.start as u64, &elected);
                }
            }
            for file in &mut files {
                file.sync();
            }
        }
    }

    /// What the good children of a disk hold: the same.
    pub(crate) fn good_child(&self, side: Side, disk: usize) -> Result<Option<File>, String> {
        let files = self.children_of(side, disk);
        let mut good = files.iter().enumerate().filter(|(child, _)| *child != BAD);
        let (Some((_, first)), Some((_, other))) = (good.next(), good.next()) else {
            return Ok(None);
        };
        let (a, b) = (first.lock().expect("one thread"), other.lock().expect("one thread"));
        match a.data == b.data {
            true => Ok(Some(Arc::clone(first))),
            false => Err(format!("the good children of disk {disk} differ")),
        }
    }

    /// One child fails for a while, or lies.
    pub(crate) fn bad_child(&mut self) {
        if self.world.with_rng(|rng| rng.chance(500)) {
            self.fault(Seen::FailingChild);
            let failing = self.world.with_rng(|rng| rng.pick(&[30, 200, 1000]));
            self.world.lock().machines[A].failing_child = failing;
            return self.lasts(Lasting::Child, 800);
        }
        self.fault(Seen::LyingChild);
        for disk in 0..self.setup.disks {
            let Some(file) = self.children_of(A, disk).get(BAD).cloned() else { continue };
            let mut file = file.lock().expect("one thread");
            let sectors = file.data.len() as u64 / SECTOR;
            for _ in 0..4 {
                let (first, count) = self.world.with_rng(|rng| {
                    let count = rng.range(1, 64);
                    let span = if rng.chance(500) { 256 } else { sectors };
                    (rng.below(span - count), count)
                });
                file.write(first * SECTOR, &vec![0x5A; (count * SECTOR) as usize]);
            }
        }
    }
}
