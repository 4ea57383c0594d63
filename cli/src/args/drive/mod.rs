//! `--drive`: the disks of a side as QEMU's block replication writes them (spec: series v3).
mod files;
mod image;
mod primary;
mod secondary;
#[cfg(test)]
mod tests;
mod text;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use brep_nbd::Endpoint;
use brep_replication::config::DiskConfig;

use self::text::Options;
use crate::exit::Failure;

/// What the `--drive` options of a side say together.
#[derive(Debug)]
pub(crate) struct Drives {
    pub(crate) disks: Vec<DiskConfig>,
    /// Where the secondary listens; on a primary only.
    pub(crate) peer: Option<Endpoint>,
    pub(crate) state_dir: PathBuf,
}

/// The drives of a primary: each a quorum of a local image and the secondary's export.
pub(crate) fn primary(texts: &[String], state_dir: Option<PathBuf>) -> Result<Drives, Failure> {
    let disks = parse_each(texts)?.into_iter().map(primary::disk).collect::<Result<Vec<_>, _>>()?;
    let peer = primary::common_peer(&disks)?;
    let disks: Vec<_> = disks.into_iter().map(|(disk, _)| disk).collect();
    check_names(&disks)?;
    let state_dir = state_dir.unwrap_or_else(|| beside(&disks[0].path));
    Ok(Drives { disks, peer: Some(peer), state_dir })
}

/// The drives of a secondary: active disks, and the disks that they refer to. Their files are
/// looked at, and nothing is changed.
pub(crate) fn secondary(texts: &[String], state_dir: Option<PathBuf>) -> Result<Drives, Failure> {
    let disks = secondary::disks(parse_each(texts)?)?;
    let state_dir = match state_dir {
        Some(dir) => dir,
        None => beside(&disks[0].active),
    };
    let mut configs = Vec::new();
    for disk in disks {
        configs.push(files::check(disk, &state_dir)?);
    }
    check_names(&configs)?;
    Ok(Drives { disks: configs, peer: None, state_dir })
}

fn parse_each(texts: &[String]) -> Result<Vec<Options>, Failure> {
    texts.iter().enumerate().map(|(index, text)| Options::parse(index, text)).collect()
}

fn check_names(disks: &[DiskConfig]) -> Result<(), Failure> {
    for (index, disk) in disks.iter().enumerate() {
        if disks[..index].iter().any(|other| other.name == disk.name) {
            return Err(Failure::usage(format!(
                "--drive: export {:?} is the name of two disks; each needs its own",
                disk.name
            )));
        }
    }
    Ok(())
}

/// The state directory that lies next to a file.
fn beside(file: &Path) -> PathBuf {
    let mut path = OsString::from(file);
    path.push(".brep");
    path.into()
}

/// Two names of one file.
fn same_file(one: &Path, other: &Path) -> bool {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    real(one) == real(other)
}
