//! Every end-to-end test says with what it was seen to fail, and has its expected output.

use super::{Fault, Source};

/// A test that has never failed may check nothing.
const SEEN: &str = "Seen to fail with";

pub(super) fn check(sources: &[Source]) -> Vec<Fault> {
    let mut faults = Vec::new();
    let folder = "xtask/iotests/";
    let is_script = |source: &&Source| {
        source.has_extension("py")
            && source.path.strip_prefix(folder).is_some_and(|name| !name.contains('/'))
    };
    for script in sources.iter().filter(is_script) {
        if !script.text.contains(SEEN) {
            faults.push(Fault::new(&script.path, 0, format!("its docstring lacks `{SEEN}: ...`")));
        }
        let out = script.path.replace(".py", ".out");
        if !sources.iter().any(|source| source.path == out) {
            faults.push(Fault::new(&out, 0, "missing: cargo xtask iotest --bless NUMBER"));
        }
    }
    faults
}
