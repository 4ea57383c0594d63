//! Files in memory.

use std::ffi::OsString;
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, MutexGuard};

use brep_block::storage::{PlainFile, Storage};
use brep_block::{BlockDevice, Error, ErrorKind, Operation, RawFileOptions};
use brep_hbitmap::persist::{MapMemory, MapStorage};

use crate::disk::Disk;
use crate::file::{FileData, PAGE};
use crate::names::File;
use crate::quorum;
use crate::seen::Seen;
use crate::world::{Life, Side, World};

/// How a directory is told from a file in it, by those who ask for its failures only.
const DIRECTORY: &str = "/.";

/// A file that a process has open.
#[derive(Debug)]
pub(crate) struct Handle {
    pub(crate) world: Arc<World>,
    pub(crate) life: Life,
    pub(crate) name: String,
    pub(crate) file: File,
    number: u64,
}

impl Handle {
    pub(crate) fn file(&self) -> MutexGuard<'_, FileData> {
        self.file.lock().expect("one thread")
    }

    fn dead() -> io::Error {
        io::Error::other("the process is dead")
    }

    /// Whether an operation of this process happens at all, and whether the disk refuses it.
    pub(crate) fn operate(&self, kind: u64) -> io::Result<()> {
        operate(&self.world, self.life, &self.name, kind)
    }

    /// Whether the file may grow.
    pub(crate) fn admit_len(&self, end: u64) -> io::Result<()> {
        if end <= self.file().data.len() as u64 {
            return Ok(());
        }
        if self.world.lock().machines[self.life.side].faults.full {
            self.world.saw(Seen::NoSpace);
            return Err(io::Error::from_raw_os_error(28));
        }
        Ok(())
    }
}

/// The kind of operation that opens a disk.
const OPEN: u64 = 10;

fn operate(world: &World, life: Life, name: &str, kind: u64) -> io::Result<()> {
    if !world.operate(life, kind) {
        return Err(Handle::dead());
    }
    let mut inner = world.lock();
    let crate::world::Inner { rng, machines, .. } = &mut *inner;
    let machine = &machines[life.side];
    let failing = match quorum::child_of(name) {
        // A quorum does not open without one of its children.
        Some(_) if kind == OPEN => machine.faults.failing,
        Some(child) if quorum::may_fail(child) => machine.faults.failing.max(machine.failing_child),
        Some(_) => 0,
        None => machine.faults.failing,
    };
    let concerned = machine.faults.only.is_none_or(|part| name.contains(part));
    if failing > 0 && concerned && rng.chance(failing) {
        inner.note(format!("{life} operation {kind} on {name} fails"));
        drop(inner);
        world.saw(Seen::IoError);
        return Err(io::Error::from_raw_os_error(5));
    }
    Ok(())
}

impl Drop for Handle {
    fn drop(&mut self) {
        let mut file = self.file();
        if file.owner == Some((self.life, self.number)) {
            file.owner = None;
        }
    }
}

/// The file systems of a world's machines. `/a.3/x` is the file `x` of machine a, as the third run
/// of its process sees it.
#[derive(Debug, Clone)]
pub(crate) struct Files(pub(crate) Arc<World>);

impl Files {
    fn place(path: &Path) -> io::Result<(Life, String)> {
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let text = path.to_str().and_then(|p| p.strip_prefix('/')).ok_or_else(missing)?;
        let (host, rest) = text.split_once('/').ok_or_else(missing)?;
        let (side, number) = host.split_once('.').ok_or_else(missing)?;
        let side: Side = usize::from(side == "b");
        Ok((Life { side, number: number.parse().map_err(|_| missing())? }, rest.to_owned()))
    }

    fn find(&self, side: Side, name: &str) -> Option<File> {
        self.0.lock().machines[side].names.get(name).cloned()
    }

    /// Whether a disk of this name is a quorum.
    fn is_joined(&self, life: Life, name: &str) -> bool {
        let is_there = |child: &String| self.find(life.side, child).is_some();
        quorum::children(name).iter().all(is_there)
    }

    fn handle(&self, life: Life, name: String, file: File) -> io::Result<Handle> {
        let number = {
            let mut data = file.lock().expect("one thread");
            if data.owner.is_some_and(|(owner, _)| self.0.is_alive(owner)) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            data.opened += 1;
            data.owner = Some((life, data.opened));
            data.opened
        };
        Ok(Handle { world: Arc::clone(&self.0), life, name, file, number })
    }

    fn sync_folder_of(&self, life: Life, name: &str) {
        let folder = name.rsplit_once('/').map_or("", |(folder, _)| folder);
        self.0.lock().machines[life.side].names.sync(folder);
    }

    fn operate(&self, life: Life, name: &str, kind: u64) -> io::Result<()> {
        operate(&self.0, life, name, kind)
    }

    fn create(&self, life: Life, name: &str) -> io::Result<File> {
        let mut world = self.0.lock();
        let machine = &mut world.machines[life.side];
        if machine.faults.full {
            return Err(io::Error::from_raw_os_error(28));
        }
        let file = File::default();
        machine.names.make(name, &file);
        Ok(file)
    }
}

impl Storage for Files {
    fn open_disk(
        &self,
        path: &Path,
        options: RawFileOptions,
    ) -> brep_block::Result<Arc<dyn BlockDevice>> {
        let failed = |error: io::Error| {
            let kind = match error.kind() {
                io::ErrorKind::WouldBlock => ErrorKind::Locked,
                io::ErrorKind::AlreadyExists => ErrorKind::InvalidInput,
                io::ErrorKind::StorageFull => ErrorKind::NoSpace,
                _ => ErrorKind::Io,
            };
            let node = path.display().to_string();
            Error::new(Operation::Open, kind, node, error.to_string())
        };
        let joined = Self::place(path).ok().filter(|(life, name)| self.is_joined(*life, name));
        if let Some((life, name)) = joined {
            let open = |child: &String| {
                let options = RawFileOptions { name: None, ..options.clone() };
                self.open_disk(&path.with_file_name(child), options)
            };
            let files = quorum::children(&name).iter().map(open).collect::<Result<_, _>>()?;
            return Ok(quorum::join(&self.0, life, name, files));
        }
        let open = || {
            let (life, name) = Self::place(path)?;
            self.operate(life, &name, OPEN)?;
            let file = match (self.find(life.side, &name), options.create) {
                (Some(_), _) if options.create_new => {
                    return Err(io::ErrorKind::AlreadyExists.into());
                }
                (Some(file), _) => file,
                (None, None) => return Err(io::ErrorKind::NotFound.into()),
                (None, Some(size)) => {
                    let file = self.create(life, &name)?;
                    file.lock().expect("one thread").truncate(size);
                    file
                }
            };
            self.handle(life, name, file)
        };
        let handle = open().map_err(failed)?;
        let name = options.name.unwrap_or_else(|| path.display().to_string());
        Ok(Disk::over(handle, name, options.growable, options.read_only))
    }

    fn open_file(&self, path: &Path) -> io::Result<Arc<dyn PlainFile>> {
        let (life, name) = Self::place(path)?;
        self.operate(life, &name, 11)?;
        let file = match self.find(life.side, &name) {
            Some(file) => file,
            None => {
                let file = self.create(life, &name)?;
                self.sync_folder_of(life, &name);
                file
            }
        };
        Ok(Arc::new(self.handle(life, name, file)?))
    }

    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let (life, folder) = Self::place(path)?;
        self.operate(life, &format!("{folder}{DIRECTORY}"), 15)?;
        self.0.lock().machines[life.side].names.sync(&folder);
        Ok(())
    }

    fn list(&self, directory: &Path) -> io::Result<Vec<OsString>> {
        let (life, folder) = Self::place(directory)?;
        self.operate(life, &folder, 12)?;
        let world = self.0.lock();
        let names = world.machines[life.side].names.in_folder(&folder);
        Ok(names.map(OsString::from).collect())
    }

    fn exists(&self, path: &Path) -> bool {
        let place = Self::place(path);
        place.is_ok_and(|(life, name)| self.find(life.side, &name).is_some())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let (life, from) = Self::place(from)?;
        let (_, to) = Self::place(to)?;
        self.operate(life, &from, 13)?;
        let renamed = self.0.lock().machines[life.side].names.rename(&from, &to);
        renamed.then_some(()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        let (life, name) = Self::place(path)?;
        self.operate(life, &name, 14)?;
        let removed = self.0.lock().machines[life.side].names.remove(&name);
        removed.then_some(()).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn boot_id(&self, path: &Path) -> Option<String> {
        let (life, _) = Self::place(path).ok()?;
        Some(format!("boot-{}-{}", life.side, self.0.lock().machines[life.side].boot))
    }
}

impl PlainFile for Handle {
    fn len(&self) -> io::Result<u64> {
        self.operate(20)?;
        Ok(self.file().data.len() as u64)
    }

    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.operate(21)?;
        let file = self.file();
        let end = offset as usize + buffer.len();
        let data = file.data.get(offset as usize..end).ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(data);
        Ok(())
    }

    fn write_all_at(&self, data: &[u8], offset: u64) -> io::Result<()> {
        self.world.mix_bytes(data);
        self.operate(22)?;
        self.admit_len(offset + data.len() as u64)?;
        self.file().write(offset, data);
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.operate(23)?;
        self.file().sync();
        Ok(())
    }
}

impl MapStorage for Files {
    fn create(&self, path: &Path, contents: Vec<u8>) -> io::Result<()> {
        let (life, name) = Self::place(path)?;
        self.operate(life, &name, 30)?;
        if self.find(life.side, &name).is_some() {
            return Err(io::ErrorKind::AlreadyExists.into());
        }
        let file = Files::create(self, life, &name)?;
        {
            let mut file = file.lock().expect("one thread");
            file.write(0, &contents);
            file.sync();
        }
        self.sync_folder_of(life, &name);
        Ok(())
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        Storage::rename(self, from, to)
    }

    fn sync_directory(&self, directory: &Path) -> io::Result<()> {
        self.sync_dir(directory)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        Storage::remove(self, path)
    }

    fn open(&self, path: &Path) -> io::Result<Arc<dyn MapMemory>> {
        let (life, name) = Self::place(path)?;
        self.operate(life, &name, 31)?;
        let file = self.find(life.side, &name).ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(self.handle(life, name, file)?))
    }

    fn boot_id(&self, path: &Path) -> [u8; 16] {
        let mut id = [0; 16];
        if let Some(text) = Storage::boot_id(self, path) {
            let len = text.len().min(16);
            id[..len].copy_from_slice(&text.as_bytes()[..len]);
        }
        id
    }
}

impl MapMemory for Handle {
    fn len_bytes(&self) -> u64 {
        self.file().data.len() as u64
    }

    fn load(&self, index: u64) -> u64 {
        let file = self.file();
        let mut word = [0; 8];
        word.copy_from_slice(&file.data[index as usize * 8..][..8]);
        u64::from_le_bytes(word)
    }

    fn store(&self, index: u64, value: u64) {
        self.world.mix(value);
        if self.world.operate(self.life, 40) {
            self.file().write(index * 8, &value.to_le_bytes());
        }
    }

    fn flush(&self, bytes: Range<u64>) -> io::Result<()> {
        self.operate(41)?;
        let pages = bytes.start / PAGE * PAGE..bytes.end.next_multiple_of(PAGE);
        let mut file = self.file();
        let flush = file.begin_flush();
        file.end_flush(flush, pages);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::rc::Rc;

    use brep_hbitmap::{Identity, MapSet, Options, Role, Tag};

    use super::*;
    use crate::side::next_life;
    use crate::world::{A, DiskFaults};

    fn maps_of(life: Life) -> PathBuf {
        PathBuf::from(format!("/{life}/state/d0.maps"))
    }

    fn options(size: u64) -> Options {
        Options::new(Identity([1; 16]), size, 12)
    }

    /// The old file has no name any more: what would be set there would be lost with the process.
    #[test]
    fn grown_maps_keep_what_is_set_although_their_name_may_be_lost() {
        let world = World::new(1, 0);
        brep_hbitmap::persist::install(Some(Rc::new(Files(Arc::clone(&world)))));
        let life = next_life(&world, A);
        let mut maps = MapSet::create(maps_of(life), &options(1 << 20), Tag::default()).unwrap();
        world.lock().machines[A].faults =
            DiskFaults { failing: 1000, only: Some(DIRECTORY), ..DiskFaults::default() };
        maps.grow(2 << 20).unwrap();
        maps.set(Role::Open, 5 << 12, 1);
        maps.flush().unwrap_err();
        maps.flusher().run().unwrap_err();
        world.kill(A);
        drop(maps);
        world.lock().machines[A].faults = DiskFaults::default();
        let life = next_life(&world, A);
        let maps = MapSet::open(maps_of(life), &options(2 << 20)).unwrap();
        assert!(maps.map(Role::Open).get(5 << 12));
        brep_hbitmap::persist::install(None);
    }
}
