//! `brep demo`: a pair at work on this machine, from the first copy to the failover.
//!
//! The pair is two real processes of this program. What they hold is never asked of them alone:
//! it is read back through NBD and from the files, and compared byte by byte.
mod disk;
mod guest;
mod pair;
mod story;

use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;

use crate::args::DemoArgs;
use crate::cmd::runtime::end_on_signal;
use crate::exit::{Failure, OK, Outcome};
use crate::output;

pub(crate) fn run(args: &DemoArgs) -> Outcome {
    if let Some(directory) = &args.keep {
        let made = DirBuilder::new().mode(0o700).create(directory);
        made.map_err(|error| Failure::failed(format!("{}: {error}", directory.display())))?;
        let directory = std::path::absolute(directory)?;
        story::tell(&directory)?;
        output::line(&format!("everything is kept in {}", directory.display()))?;
        return Ok(OK);
    }
    let directory = tempfile::Builder::new().prefix("brep-demo-").tempdir()?;
    let path = directory.path().to_owned();
    end_on_signal(move || remove(&path))?;
    match story::tell(directory.path()) {
        Ok(()) => Ok(OK),
        Err(failure) => Err(failure.context(logs(directory.path()))),
    }
}

/// Removes the directory although both sides may still be writing to it.
fn remove(directory: &Path) {
    for _ in 0..10 {
        if std::fs::remove_dir_all(directory).is_ok() {
            return;
        }
    }
}

/// The last words of both sides: their files are about to be removed.
fn logs(directory: &Path) -> String {
    let mut text = String::from("the demo has failed (--keep DIR keeps its files)");
    for side in ["primary", "secondary"] {
        let log =
            std::fs::read_to_string(directory.join(format!("{side}.log"))).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(5).collect();
        for line in last.iter().rev() {
            text.push_str(&format!("\n  {side}: {line}"));
        }
    }
    text + "\n"
}
