//! The disks of a group, which come and go while it runs.

use std::ops::Deref;
use std::sync::{Arc, PoisonError, RwLock, Weak};

/// The disks there are.
#[derive(Debug)]
pub(crate) struct DiskTable<T>(RwLock<Disks<T>>);

/// The disks that there were when this was taken, in the order in which they came.
#[derive(Debug)]
pub(crate) struct Disks<T>(Arc<[Arc<T>]>);

/// The same, without keeping one that goes.
#[derive(Debug)]
pub(crate) struct WeakDisks<T>(Vec<Weak<T>>);

impl<T> DiskTable<T> {
    pub(crate) fn new(disks: Vec<Arc<T>>) -> Self {
        DiskTable(RwLock::new(Disks(disks.into())))
    }

    /// Those there are now.
    pub(crate) fn get(&self) -> Disks<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Adds one, the last in order.
    pub(crate) fn add(&self, disk: Arc<T>) {
        let mut disks = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *disks = Disks(disks.iter().cloned().chain([disk]).collect());
    }

    /// Takes one out; the others keep their order.
    pub(crate) fn remove(&self, disk: &Arc<T>) {
        let mut disks = self.0.write().unwrap_or_else(PoisonError::into_inner);
        *disks = Disks(disks.iter().filter(|d| !Arc::ptr_eq(d, disk)).cloned().collect());
    }
}

impl<T> Disks<T> {
    /// Some of them, in their order.
    pub(crate) fn only(&self, mut which: impl FnMut(&T) -> bool) -> Self {
        Disks(self.iter().filter(|disk| which(disk)).cloned().collect())
    }

    /// Whether it is one of them.
    pub(crate) fn has(&self, disk: &Arc<T>) -> bool {
        self.iter().any(|d| Arc::ptr_eq(d, disk))
    }

    /// Those that will still be there.
    pub(crate) fn downgrade(&self) -> WeakDisks<T> {
        WeakDisks(self.iter().map(Arc::downgrade).collect())
    }

    /// Whether both were taken with no change in between.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

impl<T> WeakDisks<T> {
    /// Those that are still there.
    pub(crate) fn upgrade(&self) -> Disks<T> {
        Disks(self.0.iter().filter_map(Weak::upgrade).collect())
    }

    /// The one at this place when they were taken, if it is still there.
    pub(crate) fn get(&self, place: usize) -> Option<Arc<T>> {
        self.0.get(place)?.upgrade()
    }
}

impl<T> Clone for Disks<T> {
    fn clone(&self) -> Self {
        Disks(Arc::clone(&self.0))
    }
}

impl<T> Deref for Disks<T> {
    type Target = [Arc<T>];

    fn deref(&self) -> &[Arc<T>] {
        &self.0
    }
}

impl<T> IntoIterator for Disks<T> {
    type Item = Arc<T>;
    type IntoIter = std::vec::IntoIter<Arc<T>>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.iter().cloned().collect::<Vec<_>>().into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_taken_stays_while_disks_come_and_go() {
        let table = DiskTable::new(vec![Arc::new("vda"), Arc::new("vdb")]);
        let before = table.get();
        assert!(table.get().is_same(&before));
        table.remove(&before[0]);
        table.add(Arc::new("vdc"));
        let names = |disks: Disks<&'static str>| disks.into_iter().map(|d| *d).collect::<Vec<_>>();
        assert!(!table.get().is_same(&before));
        assert_eq!(names(table.get()), ["vdb", "vdc"]);
        let weak = before.downgrade();
        assert_eq!(names(before), ["vda", "vdb"]);
        assert_eq!(names(weak.upgrade()), ["vdb"]);
        assert!(weak.get(0).is_none() && weak.get(1).is_some());
    }
}
