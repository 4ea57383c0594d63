//! Whether the two sides have the same disks, and which of them the secondary's checkpoint lacks.

use uuid::Uuid;

use super::Refusal;
use crate::link::{DiskInfo, HelloAnswer, Side};

/// A disk that takes part in a session, and that the secondary's checkpoint does not hold yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Join {
    pub(crate) disk: String,
    /// The id under which the secondary has added it.
    pub(crate) id: Uuid,
    /// This side's maps are not of that copy: all of it has to be sent.
    pub(crate) is_new: bool,
}

/// The disks that the secondary's checkpoint lacks.
pub(crate) fn joins(me: &Side, answer: &HelloAnswer) -> Vec<Join> {
    let join = |mine: &DiskInfo| {
        let theirs = answer.side.disks.iter().find(|d| d.name == mine.name)?;
        let id = theirs.joining?;
        Some(Join { disk: mine.name.clone(), id, is_new: mine.joining != Some(id) })
    };
    me.disks.iter().filter_map(join).collect()
}

/// Why the disks do not make a pair, if they do not. The secondary may have more: what is being
/// added there, and what was removed here.
pub(super) fn disks_differ(me: &Side, peer: &Side) -> Option<Refusal> {
    me.disks.iter().find_map(|disk| differs(disk, peer)).or_else(|| {
        let known = |disk: &DiskInfo| {
            let mine = me.disks.iter().any(|d| d.name == disk.name);
            mine || disk.joining.is_some()
                || me.removed.iter().any(|removed| removed.name == disk.name)
        };
        let name = &peer.disks.iter().find(|disk| !known(disk))?.name;
        Some(Refusal::new(
            format!("the disks differ: {name} is on the secondary {} alone", peer.name),
            &format!(
                "brep disk add {name}=FILE on this side, with a copy of the secondary's file, which \
                 is overwritten with it; or, to take it out of the group (its file stays), brep disk \
                 remove {name} --force on the secondary"
            ),
        ))
    })
}

fn differs(disk: &DiskInfo, peer: &Side) -> Option<Refusal> {
    let DiskInfo { name, size, .. } = disk;
    let Some(theirs) = peer.disks.iter().find(|d| d.name == *name) else {
        return Some(Refusal::new(
            format!("the disks differ: {name} is not on the secondary {}", peer.name),
            &format!(
                "brep disk add {name}=FILE on the secondary, with a file of {size} bytes; or, to \
                 take it out of the group, brep disk remove {name} on this side"
            ),
        ));
    };
    let grows = peer.set.is_some() && theirs.growable && theirs.size < *size;
    (theirs.size != *size && !grows).then(|| {
        Refusal::new(
            format!(
                "disk {name}: {size} bytes here, {} on the secondary {}",
                theirs.size, peer.name
            ),
            "give both sides the same disks, with the same names and sizes",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::{disk, sides};
    use super::*;
    use crate::state::RemovedDisk;

    #[test]
    fn a_disk_that_is_on_one_side_alone_is_named_with_what_gets_out_of_it() {
        let (mut me, mut peer) = sides();
        me.disks.push(disk("vdb", 4096));
        let refusal = disks_differ(&me, &peer).unwrap();
        assert!(refusal.reason.contains("vdb is not on the secondary"), "{refusal:?}");
        assert!(refusal.advice.unwrap().contains("brep disk add vdb=FILE on the secondary"));
        peer.disks.push(disk("vdb", 4096));
        assert_eq!(disks_differ(&me, &peer), None);
        me.disks.pop();
        let refusal = disks_differ(&me, &peer).unwrap();
        assert!(refusal.reason.contains("vdb is on the secondary"), "{refusal:?}");
        me.removed.push(RemovedDisk { name: "vdb".to_owned(), joining: None });
        assert_eq!(disks_differ(&me, &peer), None, "it leaves");
    }

    #[test]
    fn a_disk_that_is_being_added_on_the_secondary_is_waited_for() {
        let (mut me, mut peer) = sides();
        let id = Uuid::from_u128(7);
        peer.disks.push(DiskInfo { joining: Some(id), ..disk("vdb", 4096) });
        assert_eq!(disks_differ(&me, &peer), None);
        me.disks.push(disk("vdb", 8192));
        assert_eq!(disks_differ(&me, &peer), None, "it grows");
        me.disks[1].size = 512;
        assert!(disks_differ(&me, &peer).unwrap().reason.contains("512 bytes here, 4096"));
    }

    #[test]
    fn a_joining_disk_is_new_until_the_maps_are_those_of_its_copy() {
        let (mut me, mut answer) = (sides().0, super::super::tests::answer());
        let [old, new] = [1, 2].map(Uuid::from_u128);
        me.disks.push(disk("vdb", 4096));
        answer.side.disks.push(disk("vdb", 4096));
        assert_eq!(joins(&me, &answer), []);
        answer.side.disks.last_mut().unwrap().joining = Some(new);
        let is_new = |me: &Side| joins(me, &answer).iter().map(|j| j.is_new).collect::<Vec<_>>();
        assert_eq!(is_new(&me), [true]);
        me.disks.last_mut().unwrap().joining = Some(old);
        assert_eq!(is_new(&me), [true], "removed there, and added again");
        me.disks.last_mut().unwrap().joining = Some(new);
        assert_eq!(is_new(&me), [false]);
    }
}
