use brep_block::Error;
use bytes::Bytes;
use sha2::{Digest, Sha256};

/// The most frequent error, by error number; of several the one that was seen first.
pub(crate) fn most_frequent(errors: Vec<Error>) -> Option<Error> {
    let count = |error: &Error| errors.iter().filter(|e| e.errno() == error.errno()).count();
    let mut best: Option<(&Error, usize)> = None;
    for error in &errors {
        let count = count(error);
        if best.is_none_or(|(_, most)| count > most) {
            best = Some((error, count));
        }
    }
    best.map(|(error, _)| error.clone())
}

/// Contents that are equal, and who has them.
pub(crate) struct Version {
    hash: [u8; 32],
    pub(crate) content: Bytes,
    pub(crate) voters: Vec<usize>,
}

/// Groups contents by their hash, in the order in which they were first seen.
pub(crate) fn versions(contents: Vec<(usize, Bytes)>) -> Vec<Version> {
    let mut versions: Vec<Version> = Vec::new();
    for (voter, content) in contents {
        let hash: [u8; 32] = Sha256::digest(&content).into();
        match versions.iter_mut().find(|version| version.hash == hash) {
            Some(version) => version.voters.push(voter),
            None => versions.push(Version { hash, content, voters: vec![voter] }),
        }
    }
    versions
}

/// The version with the most votes; on equal counts the one that was first seen last.
pub(crate) fn winner(versions: &[Version]) -> Option<usize> {
    // `max_by_key` returns the last of several maxima.
    (0..versions.len()).max_by_key(|&i| versions[i].voters.len())
}

#[cfg(test)]
mod tests {
    use brep_block::{ErrorKind, Operation};

    use super::*;

    fn error(kind: ErrorKind, node: &str) -> Error {
        Error::new(Operation::Write, kind, node, "")
    }

    #[test]
    fn the_most_frequent_error_wins_and_then_the_first() {
        let errors = vec![
            error(ErrorKind::Io, "a"),
            error(ErrorKind::NoSpace, "b"),
            error(ErrorKind::NoSpace, "c"),
        ];
        assert_eq!(most_frequent(errors).unwrap().node(), "b");
        let errors = vec![error(ErrorKind::Io, "a"), error(ErrorKind::NoSpace, "b")];
        assert_eq!(most_frequent(errors).unwrap().node(), "a");
        assert!(most_frequent(Vec::new()).is_none());
    }

    #[test]
    fn on_equal_counts_the_version_seen_latest_wins() {
        let contents = ["a", "b", "a", "b"].map(Bytes::from).into_iter().enumerate().collect();
        let versions = versions(contents);
        assert_eq!(versions.len(), 2);
        assert_eq!(versions[winner(&versions).unwrap()].content, "b");
    }
}
