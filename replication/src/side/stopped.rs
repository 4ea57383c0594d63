//! What is done to a side that does not run.

use std::path::Path;

use crate::primary::MapsOf;
use crate::secondary::remove_buffers;
use crate::state::{Record, RecordStore};
use crate::{Error, Result};

/// Takes a disk out of the group of a side that does not run, such as one whose file is lost: the next
/// start does without it. Returns whether it was there. The other side hears of it in the next hello.
///
/// `force`: also out of the last checkpoint of a secondary.
///
/// # Errors
/// Refused, as the side runs, or needs the disk; nothing was changed. Or a file of the state directory
/// cannot be read or written.
pub fn remove_disk_of_stopped(state_dir: &Path, name: &str, force: bool) -> Result<bool> {
    let mut store = RecordStore::open_existing(state_dir)?;
    let record = store.record().clone();
    if !check(&record, name, force)? {
        return Ok(false);
    }
    // What a killed process has saved may be in the page cache only, in the slot that is not written now.
    store.set_durable();
    store.sync()?;
    store.update(|record| record.remove_disk(name))?;
    store.sync()?;
    // Only now: nothing names them any more.
    remove_buffers(state_dir, name)?;
    let maps = MapsOf { state_dir, set: record.set, disk: name, size: 0, granularity_log2: None };
    maps.remove_all()?;
    Ok(true)
}

/// Whether the disk is there; an error: it cannot be removed.
fn check(record: &Record, name: &str, force: bool) -> Result<bool> {
    if !record.is_merged() {
        return Err(Error::refused(
            "this side has been promoted, and that is not merged yet: the disk is a part of it. Bring \
             its file back; or put one of the same size in its place, start this side, and remove the \
             disk when it is merged (see brep status)",
        ));
    }
    // Without those that are just being added: a group is never of such alone.
    let others: Vec<&str> = match record.is_primary() {
        true => record.primary.disks.iter().map(|(name, _)| name.as_str()).collect(),
        false => {
            let held = record.secondary.disks.iter().filter(|disk| disk.joining.is_none());
            held.map(|disk| disk.name.as_str()).collect()
        }
    };
    let is_held = others.contains(&name);
    let is_added = record.added.iter().any(|added| added.name == name)
        || record.secondary.disks.iter().any(|disk| disk.name == name);
    if !is_held && !is_added {
        return match record.has_removed(name) {
            true => Ok(false),
            false => Err(Error::usage(format!("there is no disk {name:?}"))),
        };
    }
    if is_held && others.len() == 1 {
        return Err(Error::refused(format!(
            "disk {name} is the last one of the group that is not just being added; nothing was changed"
        )));
    }
    if is_held && record.is_primary() && record.primary.had_peer && !force {
        return Err(Error::refused(format!(
            "if the file of disk {name} is lost, the other side's last checkpoint is its last copy, and \
             goes with the next one: to keep it, leave this side off and say brep failover there; to \
             take the disk out of both sides: --force. Nothing was changed"
        )));
    }
    if is_held && !record.is_primary() && record.has_checkpoint() && !force {
        return Err(Error::refused(format!(
            "the last checkpoint holds disk {name}; to take it out of that for good: --force. Nothing \
             was changed"
        )));
    }
    Ok(true)
}
