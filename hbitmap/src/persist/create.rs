//! Making a new file, so that there is a whole one or none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, RenameFlags};
use rustix::io::Errno;

use super::header::Header;
use super::layout::{Layout, PAGE};
use super::lock::LockedFile;
use super::{Options, Tag};
use crate::{Error, HBitmap, Result};

/// The state of a chunk that was never used.
const NEVER_USED: u64 = 1;

/// Creates a file of empty maps. It is not open and not locked afterwards; it is on stable
/// storage.
pub(super) fn create(path: &Path, options: &Options, maps: usize, tag: Tag) -> Result<()> {
    let bits = HBitmap::new(options.size, options.granularity_log2)?.bits();
    let mut header = Header::new(
        options.identity,
        options.size,
        options.granularity_log2,
        options.current_boot_id(path),
        maps,
        tag,
    );
    let layout = Layout::new(bits, maps, header.in_flight);
    #[cfg(feature = "simulation")]
    if let Some(storage) = super::stand_in::installed() {
        let mut contents = io::Cursor::new(vec![0; layout.file_len() as usize]);
        write_first(&mut contents, layout, &mut header).map_err(Error::io(path, "write"))?;
        return storage.create(path, contents.into_inner()).map_err(Error::io(path, "create"));
    }
    if path.symlink_metadata().is_ok() {
        return Err(Error::io(path, "create")(io::ErrorKind::AlreadyExists.into()));
    }
    let partial = partial_name(path);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&partial)
        .map_err(Error::io(&partial, "create"))?;
    let file = LockedFile::lock(file, &partial)?;
    check_still_named(&file, &partial)?;
    let made = fill(&file, layout, &mut header)
        .map_err(Error::io(&partial, "write"))
        .and_then(|()| rename(&partial, path));
    if made.is_err() {
        // The name may be gone already; what is left of the file is of no use.
        let _ = fs::remove_file(&partial);
    }
    made
}

/// Bytes that such a file takes.
pub(super) fn file_len(options: &Options, maps: usize) -> Result<u64> {
    let bits = HBitmap::new(options.size, options.granularity_log2)?.bits();
    let (boot, tag) = ([0; 16], Tag::default());
    let header =
        Header::new(options.identity, options.size, options.granularity_log2, boot, maps, tag);
    Ok(Layout::new(bits, maps, header.in_flight).file_len())
}

fn partial_name(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    name.into()
}

/// Between opening and locking, somebody else may have finished the same file.
fn check_still_named(file: &File, partial: &Path) -> Result<()> {
    let ours = file.metadata().map_err(Error::io(partial, "stat"))?;
    match fs::metadata(partial) {
        Ok(named) if (named.dev(), named.ino()) == (ours.dev(), ours.ino()) => Ok(()),
        _ => Err(Error::Locked { path: partial.to_owned() }),
    }
}

fn fill(file: &File, layout: Layout, header: &mut Header) -> io::Result<()> {
    // What a kill left of an earlier attempt may be anything.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    file.set_len(0)?;
    allocate(file, layout.file_len())?;
    let mut writer = BufWriter::with_capacity(1 << 16, file);
    write_first(&mut writer, layout, header)?;
    writer.flush()?;
    file.sync_all()
}

/// What an empty file does not read as zeroes.
fn write_first(
    writer: &mut (impl Write + Seek),
    layout: Layout,
    header: &mut Header,
) -> io::Result<()> {
    let tables = layout.tables_bytes();
    writer.seek(SeekFrom::Start(tables.start))?;
    for _ in 0..(tables.end - tables.start) / 16 {
        writer.write_all(&NEVER_USED.to_le_bytes())?;
        writer.write_all(&[0; 8])?;
    }
    header.clean = Some(fresh_tables_crc(&tables));
    for copy in 0..2 {
        writer.seek(SeekFrom::Start(copy * PAGE))?;
        writer.write_all(&header.encode())?;
    }
    Ok(())
}

fn fresh_tables_crc(tables: &std::ops::Range<u64>) -> u32 {
    let mut hash = crc32fast::Hasher::new();
    for _ in 0..(tables.end - tables.start) / 16 {
        hash.update(&NEVER_USED.to_le_bytes());
        hash.update(&[0; 8]);
    }
    hash.finalize()
}

/// Makes sure that every block up to `len` is allocated, without changing any contents.
pub(super) fn allocate(file: &File, len: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return rewrite(file, len),
            Err(error) => return Err(error.into()),
        }
    }
}

/// Allocates by writing every page as it is read, for file systems that cannot do it otherwise.
fn rewrite(file: &File, len: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    if file.metadata()?.len() < len {
        file.set_len(len)?;
    }
    let mut block = vec![0; 1 << 20];
    let mut at = 0;
    while at < len {
        let part = (len - at).min(block.len() as u64) as usize;
        file.read_exact_at(&mut block[..part], at)?;
        file.write_all_at(&block[..part], at)?;
        at += part as u64;
    }
    Ok(())
}

/// Gives the file its name, and does not replace another one.
fn rename(partial: &Path, path: &Path) -> Result<()> {
    let cwd = rustix::fs::CWD;
    match rustix::fs::renameat_with(cwd, partial, cwd, path, RenameFlags::NOREPLACE) {
        // Some file systems know no flags. That there was no such file has been checked.
        Err(Errno::INVAL | Errno::NOSYS) => {
            fs::rename(partial, path).map_err(Error::io(path, "create"))?;
        }
        renamed => renamed.map_err(|error| Error::io(path, "create")(error.into()))?,
    }
    sync_directory(path)
}

/// Puts the name of a file on stable storage.
pub(super) fn sync_directory(path: &Path) -> Result<()> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    #[cfg(feature = "simulation")]
    if let Some(storage) = super::stand_in::installed() {
        let synced = storage.sync_directory(directory);
        return synced.map_err(Error::io(directory, "flush the directory"));
    }
    #[cfg(test)]
    super::crash::directory_flush().map_err(Error::io(directory, "flush the directory"))?;
    File::open(directory)
        .and_then(|directory| directory.sync_all())
        .map_err(Error::io(directory, "flush the directory"))
}
