//! The disks that a side has: those of its command line, and what commands have made of them.

use std::sync::PoisonError;

use super::Side;
use crate::config::DiskConfig;

impl Side {
    /// The disks of the group, as they are opened.
    pub(crate) fn disk_configs(&self) -> Vec<DiskConfig> {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// A disk was added; the record knows it.
    pub(crate) fn note_added(&self, disk: &DiskConfig) {
        self.disks.lock().unwrap_or_else(PoisonError::into_inner).push(disk.clone());
    }

    /// A disk was removed; the record knows that.
    pub(crate) fn note_removed(&self, name: &str) {
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        disks.retain(|disk| disk.name != name);
    }
}
