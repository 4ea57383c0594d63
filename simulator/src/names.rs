//! The names under which a machine finds its files.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use crate::file::{FileData, KEEPS, Left};
use crate::rng::Rng;
use crate::seen::Seen;

pub(crate) type File = Arc<Mutex<FileData>>;

/// The directories of a machine, and what of them is on stable storage. A directory itself always
/// exists.
#[derive(Debug, Default)]
pub(crate) struct Names {
    now: BTreeMap<String, File>,
    stable: BTreeMap<String, File>,
    /// In the order in which they were made, not on stable storage.
    changes: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Made(String, File),
    Removed(String),
    Renamed(String, String, File),
}

/// What a loss of power has done, by file and by name.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Losses {
    pub(crate) whole: u64,
    pub(crate) nothing: u64,
    pub(crate) torn: u64,
    pub(crate) names_kept: u64,
    pub(crate) names_lost: u64,
}

impl Losses {
    pub(crate) fn counts(self) -> [(Seen, u64); 5] {
        [
            (Seen::FileWhole, self.whole),
            (Seen::FileAsFlushed, self.nothing),
            (Seen::FileTorn, self.torn),
            (Seen::NameKept, self.names_kept),
            (Seen::NameLost, self.names_lost),
        ]
    }
}

impl Change {
    fn folder(&self) -> &str {
        let (Change::Made(name, _) | Change::Removed(name) | Change::Renamed(_, name, _)) = self;
        folder(name)
    }

    fn apply(&self, names: &mut BTreeMap<String, File>) {
        match self {
            Change::Made(name, file) => drop(names.insert(name.clone(), Arc::clone(file))),
            Change::Removed(name) => drop(names.remove(name)),
            Change::Renamed(from, to, file) => {
                if names.get(from).is_some_and(|there| Arc::ptr_eq(there, file)) {
                    names.remove(from);
                }
                names.insert(to.clone(), Arc::clone(file));
            }
        }
    }
}

fn folder(name: &str) -> &str {
    name.rsplit_once('/').map_or("", |(folder, _)| folder)
}

impl Names {
    pub(crate) fn get(&self, name: &str) -> Option<&File> {
        self.now.get(name)
    }

    pub(crate) fn in_folder(&self, wanted: &str) -> impl Iterator<Item = &str> {
        let names = self.now.keys().filter(move |name| folder(name) == wanted);
        names.filter_map(|name| name.rsplit('/').next())
    }

    fn change(&mut self, change: Change) {
        change.apply(&mut self.now);
        self.changes.push(change);
    }

    pub(crate) fn make(&mut self, name: &str, file: &File) {
        self.change(Change::Made(name.to_owned(), Arc::clone(file)));
    }

    /// False: there is none.
    pub(crate) fn remove(&mut self, name: &str) -> bool {
        let is_there = self.now.contains_key(name);
        if is_there {
            self.change(Change::Removed(name.to_owned()));
        }
        is_there
    }

    /// False: there is none.
    pub(crate) fn rename(&mut self, from: &str, to: &str) -> bool {
        let Some(file) = self.now.get(from).cloned() else { return false };
        self.change(Change::Renamed(from.to_owned(), to.to_owned(), file));
        true
    }

    /// What has changed in a directory is on stable storage.
    pub(crate) fn sync(&mut self, folder: &str) {
        for change in self.changes.extract_if(.., |change| change.folder() == folder) {
            change.apply(&mut self.stable);
        }
    }

    /// Each change of a name that is not on stable storage was made or not, and every file has
    /// what it has there.
    pub(crate) fn lose_power(&mut self, rng: &mut Rng) -> Losses {
        let mut losses = Losses::default();
        let all = rng.below(KEEPS);
        for change in std::mem::take(&mut self.changes) {
            if rng.below(4) < all {
                losses.names_kept += 1;
                change.apply(&mut self.stable);
            } else {
                losses.names_lost += 1;
            }
        }
        self.now.clone_from(&self.stable);
        // Each file by itself, or all alike.
        let alike = rng.chance(500).then(|| rng.below(KEEPS));
        for file in self.now.values() {
            let keep = alike.unwrap_or_else(|| rng.below(KEEPS));
            match file.lock().expect("one thread").lose_power(rng, keep) {
                Left::Stable => {}
                Left::Whole => losses.whole += 1,
                Left::Nothing => losses.nothing += 1,
                Left::Torn => losses.torn += 1,
            }
        }
        losses
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn left(make: impl Fn(&mut Names, &File)) -> Vec<Vec<String>> {
        let mut all: Vec<Vec<String>> = (0..200)
            .map(|seed| {
                let mut names = Names::default();
                make(&mut names, &File::default());
                names.lose_power(&mut Rng::new(seed));
                names.now.keys().cloned().collect()
            })
            .collect();
        all.sort();
        all.dedup();
        all
    }

    #[test]
    fn a_name_is_lost_unless_its_directory_was_flushed() {
        assert_eq!(left(|names, file| names.make("d/x", file)), [vec![], vec!["d/x".to_owned()]]);
        let synced = |names: &mut Names, file: &File| {
            names.make("d/x", file);
            names.sync("d");
        };
        assert_eq!(left(synced), [["d/x"]]);
    }

    #[test]
    fn a_rename_is_made_or_not() {
        let renamed = |names: &mut Names, file: &File| {
            names.make("d/x", file);
            names.make("d/y", &File::default());
            names.sync("d");
            assert!(names.rename("d/x", "d/y"));
        };
        assert_eq!(
            left(renamed),
            [vec!["d/x".to_owned(), "d/y".to_owned()], vec!["d/y".to_owned()]]
        );
    }

    #[test]
    fn a_removed_file_may_come_back() {
        let removed = |names: &mut Names, file: &File| {
            names.make("d/x", file);
            names.sync("d");
            assert!(names.remove("d/x"));
        };
        assert_eq!(left(removed), [vec![], vec!["d/x".to_owned()]]);
    }
}
