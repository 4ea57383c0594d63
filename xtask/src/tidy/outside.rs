//! What takes part in a simulation asks nothing of the outside but through a door that the
//! simulator can close, and leaves nothing to chance.

use super::{Fault, Source};

/// Crates whose code runs under the simulator.
const CRATES: [&str; 5] =
    ["backup/src/", "nbd/src/", "qcow2/src/", "quorum/src/", "replication/src/"];

/// What the pair's code does not use directly, and what it uses instead.
const DOORS: [(&str, &str); 7] = [
    ("std::fs", "brep_block::storage"),
    ("RawFile::open", "brep_block::storage::open_disk"),
    ("SystemTime", "tokio::time"),
    ("std::thread", "a task"),
    ("spawn_blocking", "a task"),
    ("new_v4", "random::uuid"),
    ("use std::time::Instant", "tokio::time::Instant"),
];

/// Where the doors themselves are, and what has a thread of its own that no simulation has.
const EXEMPT: [&str; 4] = [
    "replication/src/control/",
    "replication/src/daemon.rs",
    // The wall clock, for people to read.
    "replication/src/errors.rs",
    "replication/src/random.rs",
];

/// Where a hash map is only asked for its keys: its order is another one each time.
const LOOKED_UP_ONLY: [&str; 5] = [
    "qcow2/src/alloc.rs",
    "qcow2/src/map.rs",
    "qcow2/src/regions.rs",
    "quorum/src/rate_limit.rs",
    "replication/src/primary/link.rs",
];

pub(super) fn check(sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    for source in sources.iter().filter(|source| takes_part(source)) {
        let mut lines = product_lines(source).peekable();
        while let Some((number, line)) = lines.next() {
            if line.contains("select! {") {
                let next = lines.find(|(_, line)| !line.trim_start().starts_with("//"));
                if next.is_none_or(|(_, line)| line.trim() != "biased;") {
                    let what = "select! begins with `biased;`: tokio's choice is not repeatable";
                    faults.push(Fault::new(&source.path, number, what));
                }
            }
            let hashed = line.contains("HashMap") || line.contains("HashSet");
            if hashed && !LOOKED_UP_ONLY.contains(&source.path.as_str()) {
                let what = "a HashMap's order is not repeatable: use a BTreeMap";
                faults.push(Fault::new(&source.path, number, what));
            }
            let doors = DOORS.iter().filter(|_| source.path.starts_with("replication/src/"));
            for (word, instead) in doors.filter(|(word, _)| line.contains(word)) {
                let what = format!("{word} cannot be simulated: use {instead}");
                faults.push(Fault::new(&source.path, number, what));
            }
            if line.contains("std::time::{") && line.contains("Instant") {
                let what = "std's Instant cannot be simulated: use tokio::time::Instant";
                faults.push(Fault::new(&source.path, number, what));
            }
        }
    }
    faults
}

fn takes_part(source: &Source) -> bool {
    let path = &source.path;
    source.has_extension("rs")
        && CRATES.iter().any(|folder| path.starts_with(folder))
        && !EXEMPT.iter().any(|exempt| path.starts_with(exempt))
        && !path.contains("/tests/")
        && !path.ends_with("/tests.rs")
}

/// Up to the tests at the end of a module.
fn product_lines(source: &Source) -> impl Iterator<Item = (usize, &str)> {
    let tests = source.lines().skip(1).find(|(_, line)| {
        line.starts_with("mod tests {") || line.starts_with("pub(crate) mod faults {")
    });
    let end = tests.map_or(usize::MAX, |(number, _)| number);
    source.lines().take_while(move |(number, _)| *number < end)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn faults(path: &str, text: &str) -> Vec<usize> {
        let source = Source { path: path.to_owned(), text: text.to_owned() };
        check(&[source]).into_iter().map(|fault| fault.line).collect()
    }

    #[test]
    fn a_select_without_an_order_is_found() {
        let text =
            "a\ntokio::select! {\n    // why\n    biased;\n}\ntokio::select! {\n    x = y\n}\n";
        assert_eq!(faults("nbd/src/a.rs", text), [6]);
        assert!(faults("cli/src/a.rs", text).is_empty());
    }

    #[test]
    fn a_map_without_an_order_is_found() {
        let text = "use std::collections::HashMap;\n";
        assert_eq!(faults("replication/src/a.rs", text), [1]);
        assert!(faults("qcow2/src/map.rs", text).is_empty());
        assert!(faults("cli/src/a.rs", text).is_empty());
    }

    #[test]
    fn what_cannot_be_simulated_is_found_outside_of_tests() {
        let text = "use std::time::{Duration, Instant};\nstd::fs::read(x);\nmod tests {\nstd::fs\n";
        assert_eq!(faults("replication/src/a.rs", text), [1, 2]);
        assert!(faults("replication/src/control/a.rs", text).is_empty());
        assert!(faults("nbd/src/a.rs", "std::fs").is_empty());
    }
}
