//! The same maps in a file of another shape: the disk has grown, or a bit is to stand for another
//! number of items.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::create::{create, sync_directory};
use super::file::MapFile;
use super::open::open_as_is;
use super::set::DIFFERS;
use super::{AfterPowerLoss, Options};
use crate::{Error, Result};

/// Makes a second file and puts it in the place of the first: whoever is killed, or loses power,
/// finds the one or the other. A coarser bit is set if one of the finer ones was, and the other way
/// round. What is added to the size differs; in a single map it is set. The file that is given is
/// of no use afterwards, unless this fails.
pub(super) fn rebuild(old: &mut MapFile, size: u64, granularity_log2: u32) -> Result<MapFile> {
    let header = old.header;
    let next = next_name(&old.path);
    let options = Options {
        identity: header.identity,
        size,
        granularity_log2,
        keep_granularity: false,
        keep_size: false,
        after_power_loss: AfterPowerLoss::Refuse,
        boot_id: Some(header.boot_id),
    };
    remove(&next)?;
    create(&next, &options, header.maps, header.entries[0].tag)?;
    let new = open_as_is(&next, &options, header.maps).and_then(|mut new| {
        fill(old, &mut new)?;
        new.sync(0..new.layout.file_len())?;
        rename(&next, &old.path)?;
        // The old file has no name any more: what is set from now on belongs into this one,
        // whatever a loss of power would leave.
        new.flush_failed |= sync_directory(&old.path).is_err();
        new.path.clone_from(&old.path);
        new.in_flight = std::mem::take(&mut old.in_flight);
        Ok(new)
    });
    if new.is_err() {
        // Nobody needs it; the next attempt would remove it too.
        let _ = remove(&next);
    }
    new
}

fn next_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".next");
    name.into()
}

fn fill(old: &mut MapFile, new: &mut MapFile) -> Result<()> {
    let mut header = new.header;
    for (to, from) in header.entries.iter_mut().zip(&old.header.entries) {
        (to.present, to.tag) = (from.present, from.tag);
    }
    (header.logged, header.boot_id) = (old.header.logged, old.header.boot_id);
    new.commit(header);
    for map in 0..old.header.maps {
        let from = old.maps[map].take();
        for area in from.dirty_areas(0..old.header.size.min(new.header.size)) {
            new.set(map, area.start, area.end - area.start);
        }
        old.maps[map] = from;
    }
    let added = old.header.size..new.header.size;
    if !added.is_empty() {
        new.set(
            if old.header.maps > 1 { DIFFERS } else { 0 },
            added.start,
            added.end - added.start,
        );
    }
    new.copy_in_flight(old)?;
    (new.last_stop, new.boot_id) = (old.last_stop, old.boot_id);
    new.flush_failed = old.flush_failed;
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(storage) = super::stand_in::installed() {
        return existing(storage.remove(path)).map_err(Error::io(path, "remove"));
    }
    existing(fs::remove_file(path)).map_err(Error::io(path, "remove"))
}

fn existing(removed: io::Result<()>) -> io::Result<()> {
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

fn rename(from: &Path, to: &Path) -> Result<()> {
    #[cfg(feature = "simulation")]
    if let Some(storage) = super::stand_in::installed() {
        return storage.rename(from, to).map_err(Error::io(to, "replace"));
    }
    fs::rename(from, to).map_err(Error::io(to, "replace"))
}
