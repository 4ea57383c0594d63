use std::fs::OpenOptions;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::create::allocate;
use super::lock::LockedFile;
#[cfg(feature = "simulation")]
use super::stand_in::{self, MapMemory};
use super::words::Words;
use crate::{Error, Result};

/// What maps lie on, open and locked.
#[derive(Debug)]
pub(super) enum Backing {
    File(LockedFile),
    #[cfg(feature = "simulation")]
    StandIn(std::sync::Arc<dyn MapMemory>),
}

impl Backing {
    pub(super) fn open(path: &Path) -> Result<Self> {
        #[cfg(feature = "simulation")]
        if let Some(storage) = stand_in::installed() {
            return match storage.open(path) {
                Ok(memory) => Ok(Backing::StandIn(memory)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    Err(Error::Locked { path: path.to_owned() })
                }
                Err(error) => Err(Error::io(path, "open")(error)),
            };
        }
        let file = OpenOptions::new().read(true).write(true).open(path);
        let file = file.map_err(Error::io(path, "open"))?;
        Ok(Backing::File(LockedFile::lock(file, path)?))
    }

    pub(super) fn len_bytes(&self) -> io::Result<u64> {
        match self {
            Backing::File(file) => Ok(file.metadata()?.len()),
            #[cfg(feature = "simulation")]
            Backing::StandIn(memory) => Ok(memory.len_bytes()),
        }
    }

    pub(super) fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        match self {
            Backing::File(file) => file.read_exact_at(buffer, offset),
            #[cfg(feature = "simulation")]
            Backing::StandIn(memory) => {
                if offset + buffer.len() as u64 > memory.len_bytes() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let (words, _) = buffer.as_chunks_mut();
                for (index, word) in (offset / 8..).zip(words) {
                    *word = memory.load(index).to_le_bytes();
                }
                Ok(())
            }
        }
    }

    /// Maps all of it. A copy of a file may have holes, which a full disk would turn into a
    /// signal: they are filled first.
    pub(super) fn map(&self, path: &Path, len: u64) -> Result<Words> {
        match self {
            Backing::File(file) => {
                allocate(file, len).map_err(Error::io(path, "allocate"))?;
                Words::map(file).map_err(Error::io(path, "map"))
            }
            #[cfg(feature = "simulation")]
            Backing::StandIn(memory) => Ok(Words::StandIn(std::sync::Arc::clone(memory))),
        }
    }
}
