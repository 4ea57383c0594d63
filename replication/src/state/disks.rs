//! The disks of a group, as commands have changed what the command line says.

use std::path::PathBuf;

use brep_block::CacheMode;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Record;
use crate::config::{DiskConfig, DiskFormat};

/// A disk that was added by command: a start that does not name it opens it all the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct AddedDisk {
    /// Its name.
    pub name: String,
    /// Its file, with an absolute path.
    pub file: PathBuf,
    /// The format of that.
    pub format: DiskFormat,
    /// It is read and written past the page cache.
    pub direct: bool,
}

/// A disk that was taken out of the group.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct RemovedDisk {
    /// Its name.
    pub name: String,
    /// The last id under which the secondary had added it, as far as this side knows: one that it
    /// adds later under the same name is another.
    pub joining: Option<Uuid>,
}

impl AddedDisk {
    pub(super) fn of(disk: &DiskConfig) -> Self {
        AddedDisk {
            name: disk.name.clone(),
            file: disk.path.clone(),
            format: disk.format,
            direct: disk.cache == CacheMode::None,
        }
    }

    pub(crate) fn config(&self) -> DiskConfig {
        DiskConfig {
            name: self.name.clone(),
            path: self.file.clone(),
            format: self.format,
            cache: if self.direct { CacheMode::None } else { CacheMode::Writeback },
            buffers: None,
        }
    }
}

impl Record {
    /// Most names of removed disks that are remembered; the oldest is forgotten.
    const REMOVED_MAX: usize = 256;

    /// A disk is added by command.
    pub fn add_disk(&mut self, disk: &DiskConfig) {
        self.add(AddedDisk::of(disk));
    }

    pub(super) fn add(&mut self, disk: AddedDisk) {
        self.added.retain(|added| added.name != disk.name);
        self.removed.retain(|removed| removed.name != disk.name);
        self.added.push(disk);
    }

    /// A disk is not part of the group any more, whatever a command line says.
    pub fn remove_disk(&mut self, name: &str) {
        let join = self.primary.joins.iter().find(|(known, _)| known == name);
        let removed = RemovedDisk { name: name.to_owned(), joining: join.map(|(_, id)| *id) };
        self.added.retain(|added| added.name != name);
        self.primary.disks.retain(|(known, _)| known != name);
        self.primary.joins.retain(|(known, _)| known != name);
        self.secondary.disks.retain(|known| known.name != name);
        self.removed.retain(|known| known.name != name);
        self.removed.push(removed);
        let too_many = self.removed.len().saturating_sub(Self::REMOVED_MAX);
        self.removed.drain(..too_many);
    }

    /// Whether a disk was taken out of the group.
    #[must_use]
    pub fn has_removed(&self, name: &str) -> bool {
        self.removed.iter().any(|removed| removed.name == name)
    }

    /// The disks of a start whose command line names `given`.
    #[must_use]
    pub fn disks_at_start(&self, given: &[DiskConfig]) -> Vec<DiskConfig> {
        let mut disks = Vec::new();
        for disk in given {
            if self.has_removed(&disk.name) {
                tracing::warn!(
                    disk = disk.name,
                    "the disk was taken out of the group, and is not used: leave it out of the \
                     command line; to have it back: brep disk add"
                );
                continue;
            }
            disks.push(disk.clone());
        }
        for added in &self.added {
            let Some(disk) = given.iter().find(|disk| disk.name == added.name) else {
                let (disk, file) = (&added.name, added.file.display());
                tracing::warn!(
                    disk,
                    %file,
                    "the disk was added by command, and is used; put it into the command line too"
                );
                disks.push(added.config());
                continue;
            };
            if disk.path != added.file {
                let (name, file) = (&disk.name, added.file.display());
                tracing::warn!(disk = name, added = %file, "the command line names another file");
            }
        }
        disks
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Role;

    fn disk(name: &str, file: &str) -> DiskConfig {
        DiskConfig {
            name: name.to_owned(),
            path: file.into(),
            format: DiskFormat::Qcow2,
            cache: CacheMode::None,
            buffers: None,
        }
    }

    fn at_start(record: &Record, given: &[DiskConfig]) -> Vec<String> {
        let disks = record.disks_at_start(given);
        disks.iter().map(|d| format!("{}={}", d.name, d.path.display())).collect()
    }

    #[test]
    fn a_start_has_the_disks_that_commands_left_whatever_it_is_told() {
        let mut record = Record::blank("p", Role::Primary);
        let (vda, vdb) = (disk("vda", "/a"), disk("vdb", "/b"));
        record.add_disk(&vdb);
        assert_eq!(at_start(&record, std::slice::from_ref(&vda)), ["vda=/a", "vdb=/b"]);
        let kept = &record.disks_at_start(&[])[0];
        assert_eq!((kept.format, kept.cache), (DiskFormat::Qcow2, CacheMode::None));
        let moved = [vda.clone(), disk("vdb", "/c")];
        assert_eq!(at_start(&record, &moved), ["vda=/a", "vdb=/c"], "the operator moved it");
        record.remove_disk("vdb");
        assert_eq!(at_start(&record, &[vda, vdb.clone()]), ["vda=/a"]);
        record.add_disk(&vdb);
        assert_eq!(at_start(&record, &[]), ["vdb=/b"]);
    }

    #[test]
    fn the_names_of_removed_disks_are_bounded() {
        let mut record = Record::blank("p", Role::Primary);
        (0..300).for_each(|n| record.remove_disk(&format!("vd{n}")));
        assert_eq!(record.removed.len(), Record::REMOVED_MAX);
        assert_eq!(record.removed.last().unwrap().name, "vd299");
    }
}
