use std::path::{Path, PathBuf};

use anyhow::Context;

use crate::exit::Failure;

/// A file with the number of this process, which is removed when this is dropped.
#[derive(Debug)]
pub(super) struct PidFile(PathBuf);

impl PidFile {
    /// Whoever waits for the file finds it whole: it gets its name last.
    pub(super) fn write(path: &Path) -> Result<Self, Failure> {
        let mut new = path.as_os_str().to_owned();
        new.push(".new");
        let new = PathBuf::from(new);
        let written = std::fs::write(&new, format!("{}\n", std::process::id()))
            .and_then(|()| std::fs::rename(&new, path));
        written.with_context(|| format!("--pid-file {}", path.display()))?;
        Ok(PidFile(path.to_owned()))
    }

    /// For the end of a process that drops nothing any more.
    pub(super) fn remove(path: &Path) {
        if let Err(error) = std::fs::remove_file(path) {
            tracing::warn!("{}: {error}", path.display());
        }
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        PidFile::remove(&self.0);
    }
}
