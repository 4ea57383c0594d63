use std::path::Path;
use std::sync::Arc;

use brep_block::{BlockDevice, RawFile, RawFileOptions};
use brep_qcow2::{OpenOptions, Qcow2};
use brep_replication::config::{BufferFiles, DiskConfig, DiskFormat};

use super::image::ImageNode;
use super::secondary::{Hidden, SecondaryDisk};
use crate::args::disk::check_name;
use crate::cmd::runtime::current_thread;
use crate::exit::Failure;

/// Looks at the files of a disk in the order in which the original opens them (spec: series v3,
/// sections 8 and 11). Nothing is changed, and nothing stays open.
pub(super) fn check(disk: SecondaryDisk, state_dir: &Path) -> Result<DiskConfig, Failure> {
    let runtime = current_thread()?;
    let label = disk.label.clone();
    runtime.block_on(check_disk(disk, state_dir)).map_err(|failure| failure.context(label))
}

async fn check_disk(disk: SecondaryDisk, state_dir: &Path) -> Result<DiskConfig, Failure> {
    let size = target_size(&disk.target, disk.target_format).await?;
    let files = BufferFiles { active: disk.active, hidden: disk.hidden.file.clone() };
    check_hidden(&disk.hidden, &files, size).await?;
    files.check_active(size).await?;
    let Some(export) = disk.export else {
        return Err(Failure::usage(
            "Missing the option export: the name of the disk, equal on both sides",
        ));
    };
    check_name(&export).map_err(|why| Failure::usage(format!("export: {why}")))?;
    let config = DiskConfig {
        name: export,
        path: disk.target.file,
        format: disk.target_format,
        cache: disk.target.cache,
        buffers: Some(files.clone()),
    };
    files.check_ready(&config, size, state_dir).await?;
    Ok(config)
}

async fn target_size(image: &ImageNode, format: DiskFormat) -> Result<u64, Failure> {
    let file = open_read_only(&image.file)?;
    match format {
        DiskFormat::Raw => Ok(file.size()),
        DiskFormat::Qcow2 => {
            let name = image.file.display().to_string();
            let options = OpenOptions { name, read_only: true, ..OpenOptions::default() };
            let image = Qcow2::open(file, options).await.map_err(brep_block::Error::from)?;
            Ok(image.size())
        }
    }
}

fn open_read_only(path: &Path) -> Result<Arc<dyn BlockDevice>, Failure> {
    let options = RawFileOptions { read_only: true, ..RawFileOptions::default() };
    Ok(RawFile::open(path, options)?)
}

async fn check_hidden(hidden: &Hidden, files: &BufferFiles, size: u64) -> Result<(), Failure> {
    match hidden.driver.as_str() {
        "qcow2" => files.check_hidden(size).await?,
        "raw" => {
            open_read_only(&hidden.file)?;
            return Err(Failure::usage("Hidden disk's driver doesn't support backing files: raw"));
        }
        driver => {
            return Err(Failure::usage(format!(
                "hidden-disk.driver={driver}: Unknown driver; a hidden disk is qcow2"
            )));
        }
    }
    if !hidden.writable {
        return Err(Failure::usage(
            "the backup job cannot start: the hidden disk is read-only without \
             backing_reference.hidden-disk.allow-write-backing-file=on",
        ));
    }
    Ok(())
}
