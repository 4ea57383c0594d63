use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use brep_block::{BlockDevice, FlushLevel, RawFile, RawFileOptions};
use brep_qcow2::{CreateOptions, OpenOptions, Qcow2};
use brep_replication::config::DiskFormat;
use rustix::io::Errno;

use crate::args::CopyArgs;
use crate::cmd::image::{Connecting, Source, failed, nbd_uri, refused, stated_format};
use crate::cmd::runtime::end_on_signal;
use crate::exit::Failure;

/// qcow2 images consist of whole sectors.
const SECTOR_LEN: u64 = 512;

/// Where a copy goes.
#[derive(Debug)]
pub(super) struct Target {
    source: Source,
    /// It reads as zeroes all over.
    pub(super) is_zero: bool,
    /// It was made for this copy.
    created: bool,
    name: String,
}

impl Target {
    /// Opens what is to be written. A file is made anew, with this size if it is known; what it
    /// held before is gone. Exports, block devices, and with `--no-create` files too, are written
    /// into as they are.
    pub(super) async fn open(
        args: &CopyArgs,
        connecting: &Connecting,
        size: Option<u64>,
    ) -> Result<Self, Failure> {
        let name = args.target.clone();
        let path = Path::new(&name);
        let is_device = std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device());
        let made = nbd_uri(&name)?.is_none() && !args.no_create && !is_device;
        if !made {
            let format = args.target_format;
            let source = Source::open_with(&name, format, false, connecting).await?;
            if source.device.limits().read_only {
                return Err(Failure::failed(format!("{name} is read-only: nothing is copied")));
            }
            let is_zero = args.destination_is_zero;
            return Ok(Target { source, is_zero, created: false, name });
        }
        let format = stated_format(path, args.target_format)?;
        let qcow2_size = match format {
            DiskFormat::Raw => None,
            DiskFormat::Qcow2 => Some(qcow2_size(path, size)?),
        };
        let growable = qcow2_size.is_some() || size.is_none();
        let (file, created) = open_file(path, growable)?;
        if created {
            let name = name.clone();
            end_on_signal(move || remove_if(true, &name))?;
        }
        let made = match qcow2_size {
            None => make_raw(file, size).await,
            Some(size) => make_qcow2(path, file, size).await,
        };
        match made {
            Ok(source) => Ok(Target { source, is_zero: true, created, name }),
            Err(failure) => {
                remove_if(created, &name);
                Err(failure)
            }
        }
    }

    pub(super) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.source.device
    }

    /// Whether it becomes as long as what is copied there.
    pub(super) fn grows(&self) -> bool {
        self.device().limits().growable
    }

    /// Writes everything out, if the copy has succeeded. Half a file that was made for it is
    /// removed.
    pub(super) async fn end(
        self,
        copied: Result<(), Failure>,
        no_flush: bool,
    ) -> Result<(), Failure> {
        let level = if no_flush { FlushLevel::Process } else { FlushLevel::Durable };
        let ended = match copied {
            Ok(()) => self.source.close_to(level).await,
            Err(failure) => {
                // What is left of it is not to be used; the first failure is what counts.
                let _ = self.source.close_to(FlushLevel::Process).await;
                Err(failure)
            }
        };
        if ended.is_err() {
            remove_if(self.created, &self.name);
        }
        ended
    }
}

fn remove_if(created: bool, name: &str) {
    if created
        && let Err(error) = std::fs::remove_file(name)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        tracing::warn!("{name}: what is left of the copy cannot be removed: {error}");
    }
}

/// Opens a file, and takes its lock, before anything of it is given up; says whether it is new.
fn open_file(path: &Path, growable: bool) -> Result<(Arc<dyn BlockDevice>, bool), Failure> {
    let new =
        RawFileOptions { create: Some(0), create_new: true, growable, ..RawFileOptions::default() };
    let there = RawFileOptions { create_new: false, ..new.clone() };
    // In this order: another copy may make the file at the same time, and it is its file then.
    match RawFile::open(path, new) {
        Ok(file) => Ok((file, true)),
        Err(error) if error.errno() == Errno::EXIST.raw_os_error() => {
            Ok((RawFile::open(path, there).map_err(failed)?, false))
        }
        Err(error) => Err(failed(error)),
    }
}

async fn make_raw(file: Arc<dyn BlockDevice>, size: Option<u64>) -> Result<Source, Failure> {
    file.truncate(0).await.map_err(failed)?;
    if let Some(size) = size {
        file.truncate(size).await.map_err(failed)?;
    }
    Ok(Source::of_raw(file))
}

fn qcow2_size(path: &Path, size: Option<u64>) -> Result<u64, Failure> {
    let Some(size) = size else {
        return Err(Failure::usage(format!(
            "{}: a qcow2 image has to be as long as what comes: make it with `brep image create`, \
             and give --no-create",
            path.display()
        )));
    };
    size.checked_next_multiple_of(SECTOR_LEN)
        .ok_or_else(|| Failure::failed(format!("{size} bytes are too long for a qcow2 image")))
}

async fn make_qcow2(path: &Path, file: Arc<dyn BlockDevice>, size: u64) -> Result<Source, Failure> {
    file.truncate(0).await.map_err(failed)?;
    let options = CreateOptions::new(size);
    Qcow2::create(&file, &options).await.map_err(|error| refused(path, error))?;
    let options = OpenOptions { name: path.display().to_string(), ..OpenOptions::default() };
    let image = Qcow2::open(file, options).await.map_err(|error| refused(path, error))?;
    Ok(Source::of_qcow2(image))
}
