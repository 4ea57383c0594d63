use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use brep_block::{
    BlockDevice, CacheMode, Error as BlockError, FlushLevel, RawFileOptions, storage,
};
use brep_qcow2::{CreateOptions, MakeEmpty, OpenOptions, Qcow2};

use super::named::{self, BufferUse};
use super::tag::{TAG_EXTENSION, Tag};
use crate::config::{BufferFiles, Durability};
use crate::image::failed_flush;
use crate::layer::{Below, cropped};
use crate::state::BufferRef;
use crate::{Error, Result, SetId};

/// The end of the name of a file that is still being made.
const UNFINISHED: &str = "qcow2.new";

/// Epochs whose needs decide how much space a spare keeps.
const RECENT_EPOCHS: usize = 16;

/// The smallest unit of copy-before-write: a sub-cluster of a buffer of our own making (64 KiB
/// clusters in 32 parts).
pub(crate) const UNIT_BYTES: u64 = 2 << 10;

/// A single unit may occupy a whole cluster.
const UNITS_A_CLUSTER: u64 = 32;

/// Space that a spare keeps in any case.
const SPACE_MARGIN_BYTES: u64 = 16 << 20;

/// A buffer that is in use: a hidden, active or top disk.
#[derive(Debug, Clone)]
pub(crate) struct Buffer {
    pub(crate) seq: u64,
    pub(crate) image: Arc<Qcow2>,
    /// What the image lies in.
    file: Arc<dyn BlockDevice>,
    /// What the image falls through to.
    pub(crate) below: Arc<Below>,
    size: u64,
    path: PathBuf,
    /// The operator's file: used once, and never removed.
    named: Option<BufferUse>,
}

impl Buffer {
    pub(crate) fn reference(&self) -> BufferRef {
        BufferRef { seq: self.seq }
    }

    /// What has to be copied together, so that this image invents nothing around it.
    pub(crate) fn unit_bytes(&self) -> u64 {
        self.image.subcluster_size().max(UNIT_BYTES)
    }

    fn tag(&self) -> Option<Tag> {
        self.image.header_extension(TAG_EXTENSION).and_then(|data| Tag::decode(&data))
    }

    /// Makes it as large as its disk, which has grown.
    pub(crate) async fn grow(&mut self, size: u64) -> Result<()> {
        let whole = size.next_multiple_of(512);
        if self.image.size() < whole {
            // Before what lies below is larger: the image takes care that nothing of that shows up.
            self.image.truncate(whole).await?;
        }
        self.below.grow(size);
        self.size = size;
        Ok(())
    }

    /// Why no flush of it succeeds any more, if none does.
    pub(crate) fn failed_flush(&self) -> Option<BlockError> {
        failed_flush(&*self.file)
    }

    /// Opens it again if a write of its metadata has failed: what the file holds then is what a
    /// kill would have left. Nobody may use it meanwhile. Whether that was done.
    ///
    /// A failed flush is not mended: nobody knows what stable storage has.
    pub(crate) async fn reopen(&mut self, durability: Durability) -> Result<bool> {
        let Some(failure) = self.image.failure() else { return Ok(false) };
        if let Some(error) = self.failed_flush() {
            return Err(error.into());
        }
        let options = image_options(&node_name(&self.path), &self.below, durability);
        let image = Qcow2::open(Arc::clone(&self.file), options)
            .await
            .map_err(|e| Error::from(brep_block::Error::from(e)).context(self.path.display()))?;
        tracing::warn!(buffer = %self.path.display(), %failure, "the buffer was opened again");
        self.image = image;
        Ok(true)
    }

    /// Gives the buffer up: its tag first, then its contents.
    async fn retire(&self, disk: &str) -> Result<()> {
        // Its next use may be another: a hidden disk over the view that it is part of would ask
        // itself for ever.
        self.below.set(None);
        let retired = Tag::retired(disk, self.seq);
        self.image.set_header_extension(TAG_EXTENSION, retired.encode()).await?;
        if !self.image.is_empty().await? {
            let how = if self.named.is_some() { MakeEmpty::Release } else { MakeEmpty::Keep };
            self.image.make_empty(how).await?;
        }
        Ok(())
    }

    /// Its file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn device(&self) -> Arc<dyn BlockDevice> {
        cropped(Arc::clone(&self.image) as Arc<dyn BlockDevice>, self.size)
    }
}

/// The buffers of one disk: files `NAME.N.qcow2` in the state directory, each used again and
/// again.
///
/// Getting fresh blocks from a file system costs more than everything else on the path of a
/// write, so a retired buffer keeps its space for a later epoch.
#[derive(Debug)]
pub(crate) struct BufferPool {
    dir: PathBuf,
    disk: String,
    size: AtomicU64,
    /// What the operator has named for the first epoch.
    files: Option<BufferFiles>,
    durability: Durability,
    state: Mutex<PoolState>,
}

#[derive(Debug, Default)]
struct PoolState {
    /// Retired and empty; at most [`BufferPool::SPARES_MAX`].
    spares: Vec<Buffer>,
    /// The operator's files, empty, until the first epoch takes them.
    named: Vec<Buffer>,
    /// Highest sequence number ever seen.
    seq: u64,
    /// The next number for a file name.
    file_number: u32,
    /// Bytes of pre-images that the last epochs had, the newest last.
    recent_uses: VecDeque<u64>,
}

impl BufferPool {
    /// Spares kept for later; one more is released and its file removed.
    const SPARES_MAX: usize = 4;

    pub(crate) fn new(
        dir: &Path,
        disk: &str,
        size: u64,
        files: Option<BufferFiles>,
        durability: Durability,
    ) -> Self {
        BufferPool {
            dir: dir.to_owned(),
            disk: disk.to_owned(),
            size: AtomicU64::new(size),
            files,
            durability,
            state: Mutex::new(PoolState::default()),
        }
    }

    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// Of the disk, in bytes.
    pub(crate) fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    /// The operator has named files for the first epoch: they have a size of their own.
    pub(crate) fn has_named_files(&self) -> bool {
        self.files.is_some()
    }

    /// The disk has grown: whatever is taken from now on is as large.
    pub(crate) fn grow(&self, size: u64) {
        self.size.store(size, Ordering::Release);
    }

    /// An epoch has ended that had so many bytes of pre-images.
    pub(crate) fn note_use(&self, bytes: u64) {
        let uses = &mut self.state().recent_uses;
        if uses.len() == RECENT_EPOCHS {
            uses.pop_front();
        }
        uses.push_back(bytes);
    }

    /// The space that a spare keeps: what the busiest of the recent epochs may have needed.
    fn kept_space_bytes(&self) -> u64 {
        let busiest = self.state().recent_uses.iter().copied().max();
        // Without a measure nothing is given back.
        busiest.map_or(u64::MAX, |bytes| bytes.saturating_mul(UNITS_A_CLUSTER) + SPACE_MARGIN_BYTES)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, PoolState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn path(&self, number: u32) -> PathBuf {
        self.dir.join(format!("{}.{number}.qcow2", self.disk))
    }

    /// Opens what the state directory holds, and what the operator has named: the buffers that a
    /// record names, in its order. Of the others those in the directory become spares, and the
    /// operator's are there for the first epoch if the record names no buffer at all.
    ///
    /// After a power loss nobody knows what the others are: those in the directory are removed.
    ///
    /// # Errors
    /// A buffer of the record is missing, cannot be opened, or carries another tag: then the disk
    /// is inconsistent. Or a file of the operator's cannot be used. Nothing was changed.
    pub(crate) async fn open(
        &self,
        set: Option<SetId>,
        wanted: &[BufferRef],
        seq_max: u64,
        power_lost: bool,
        is_disk: bool,
    ) -> Result<Vec<Buffer>> {
        let mut found = Vec::new();
        let mut unusable = Vec::new();
        let mut why_unusable = String::new();
        let mut number_max = 0;
        for number in self.numbers()? {
            number_max = number_max.max(number.saturating_add(1));
            match self.open_file(&self.path(number)).await {
                Ok(file) => found.push(file),
                // It matters only if it is one of those that are wanted.
                Err(error) => {
                    tracing::warn!(%error, "a file that should be a buffer cannot be used");
                    why_unusable.push_str(&format!(" ({error})"));
                    unusable.push(self.path(number));
                }
            }
        }
        for (used_as, path) in self.files.iter().flat_map(BufferFiles::each) {
            found.push(self.open_named(used_as, path).await?);
        }
        let mut taken = Vec::new();
        for reference in wanted {
            let position = found.iter().position(|buffer| {
                buffer.tag().is_some_and(|t| {
                    t.in_use && t.seq == reference.seq && t.disk == self.disk && Some(t.set) == set
                })
            });
            let position =
                position.ok_or_else(|| self.missing(*reference, &why_unusable, is_disk))?;
            taken.push(found.swap_remove(position));
        }
        for buffer in &found {
            if let Some(used_as) = buffer.named {
                let (path, image) = (&buffer.path, &buffer.image);
                named::check_free(used_as, path, image, set, &self.disk).await?;
            }
        }
        let seq_seen = found.iter().map(|buffer| buffer.seq).max();
        {
            let mut state = self.state();
            state.file_number = number_max;
            state.seq = seq_max.max(seq_seen.unwrap_or(0));
        }
        if power_lost {
            // Made just before, most likely: nobody needs them.
            unusable.iter().try_for_each(|path| remove(path))?;
        }
        for buffer in found {
            if power_lost && buffer.named.is_none() {
                remove(&buffer.path)?;
                continue;
            }
            if buffer.named.is_none() || !wanted.is_empty() {
                self.recycle(buffer).await?;
                continue;
            }
            if buffer.tag().is_some() {
                buffer.retire(&self.disk).await?;
            }
            self.state().named.push(buffer);
        }
        Ok(taken)
    }

    fn missing(&self, reference: BufferRef, unusable: &str, is_disk: bool) -> Error {
        if is_disk {
            return Error::refused(format!(
                "disk {}: the state record names buffer {}, but no file in {} carries its \
                 tag{unusable}. This side was promoted, and its disk is made of these files: put the \
                 missing one back. Nothing was changed. Do not remove the state directory: it holds \
                 what was written since the failover",
                self.disk,
                reference.seq,
                self.dir.display()
            ));
        }
        let named = match &self.files {
            Some(_) => "",
            None => {
                " If this secondary was started with --drive before, start it with the same \
                 active and hidden disk."
            }
        };
        Error::refused(format!(
            "disk {}: the state record names buffer {}, but no file in {} carries its \
             tag{unusable}; the checkpoint is lost. Nothing was changed.{named} A full copy from \
             the primary makes the disk whole again: move the state directory away and start the \
             secondary anew",
            self.disk,
            reference.seq,
            self.dir.display()
        ))
    }

    /// The numbers of the files of this disk. Removes what a killed process has not finished
    /// making.
    fn numbers(&self) -> Result<Vec<u32>> {
        let fail = |e: std::io::Error| Error::failed(format!("{}: {e}", self.dir.display()));
        let mut numbers = Vec::new();
        for name in storage::list(&self.dir).map_err(fail)? {
            let rest = name.to_str().and_then(|n| n.strip_prefix(&self.disk)?.strip_prefix('.'));
            let Some((number, kind)) = rest.and_then(|r| r.split_once('.')) else { continue };
            match (number.parse::<u32>(), kind) {
                (Ok(number), "qcow2") => numbers.push(number),
                (Ok(_), UNFINISHED) => storage::remove(self.dir.join(&name)).map_err(fail)?,
                _ => {}
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    /// Removes the files of a disk that is closed for good.
    pub(crate) fn remove_files(&self) -> Result<()> {
        self.numbers()?.into_iter().try_for_each(|number| remove(&self.path(number)))
    }

    async fn open_file(&self, path: &Path) -> Result<Buffer> {
        let options = RawFileOptions { growable: true, ..file_options(path) };
        let file = storage::open_disk(path, options)?;
        let below = Below::nothing(0);
        #[cfg(test)]
        let file = crate::image::faults::over(path, file);
        let options = image_options(&node_name(path), &below, self.durability);
        let image = Qcow2::open(Arc::clone(&file), options)
            .await
            .map_err(|e| Error::from(brep_block::Error::from(e)).context(path.display()))?;
        // Its disk may have grown while nobody needed it, as the disk of a primary does.
        below.grow(self.size().min(image.size()));
        let mut buffer = self.buffer(path, (image, file), below, None);
        buffer.grow(self.size()).await?;
        Ok(buffer)
    }

    async fn open_named(&self, used_as: BufferUse, path: &Path) -> Result<Buffer> {
        let below = Below::nothing(self.size());
        let opened = named::open(used_as, path, Arc::clone(&below) as _, self.durability).await?;
        Ok(self.buffer(path, opened, below, Some(used_as)))
    }

    fn buffer(
        &self,
        path: &Path,
        (image, file): (Arc<Qcow2>, Arc<dyn BlockDevice>),
        below: Arc<Below>,
        named: Option<BufferUse>,
    ) -> Buffer {
        let (size, path) = (self.size(), path.to_owned());
        let mut buffer = Buffer { seq: 0, image, file, below, size, path, named };
        buffer.seq = buffer.tag().map_or(0, |tag| tag.seq);
        buffer
    }

    /// The operator's file for this use, if the first epoch is still to begin; else as
    /// [`take`](Self::take).
    pub(crate) async fn take_first(&self, set: SetId, used_as: BufferUse) -> Result<Buffer> {
        let named = {
            let named = &mut self.state().named;
            let position = named.iter().position(|buffer| buffer.named == Some(used_as));
            position.map(|position| named.swap_remove(position))
        };
        match named {
            Some(buffer) => self.tagged(buffer, set).await,
            None => self.take(set).await,
        }
    }

    /// An empty buffer under a new sequence number, ready to be named by a record.
    pub(crate) async fn take(&self, set: SetId) -> Result<Buffer> {
        let spare = self.state().spares.pop();
        let mut buffer = match spare {
            Some(buffer) => buffer,
            None => self.create().await?,
        };
        // The disk may have grown since it was one of the disk's buffers.
        buffer.grow(self.size()).await?;
        self.tagged(buffer, set).await
    }

    async fn tagged(&self, mut buffer: Buffer, set: SetId) -> Result<Buffer> {
        buffer.seq = {
            let mut state = self.state();
            state.seq += 1;
            state.seq
        };
        let tag = Tag { in_use: true, seq: buffer.seq, set, disk: self.disk.clone() };
        buffer.image.set_header_extension(TAG_EXTENSION, tag.encode()).await?;
        // Found empty, and as what it is, whenever a record names it.
        self.flush(&buffer).await?;
        Ok(buffer)
    }

    /// Puts a buffer on stable storage, if that is promised.
    pub(crate) async fn flush(&self, buffer: &Buffer) -> Result<()> {
        match self.durability {
            Durability::Power => Ok(buffer.image.flush(FlushLevel::Durable).await?),
            Durability::Process => Ok(()),
        }
    }

    async fn create(&self) -> Result<Buffer> {
        let number = {
            let mut state = self.state();
            state.file_number += 1;
            state.file_number - 1
        };
        let path = self.path(number);
        // It gets its name when it is a buffer: a process that is killed on the way leaves no
        // file that cannot be opened.
        let unfinished = self.dir.join(format!("{}.{number}.{UNFINISHED}", self.disk));
        let made = self.create_file(&unfinished).await.and_then(|()| {
            storage::rename(&unfinished, &path)
                .map_err(|e| Error::failed(format!("{}: {e}", path.display())))
        });
        if let Err(error) = made {
            // Best effort: what stays is removed at the next start.
            let _ = storage::remove(&unfinished);
            return Err(error);
        }
        if self.durability == Durability::Power {
            storage::sync_dir(&self.dir)
                .await
                .map_err(|e| Error::failed(format!("{}: {e}", self.dir.display())))?;
        }
        self.open_file(&path).await
    }

    async fn create_file(&self, path: &Path) -> Result<()> {
        let options = RawFileOptions {
            growable: true,
            create_new: true,
            create: Some(0),
            ..file_options(path)
        };
        let file = storage::open_disk(path, options)?;
        let options = CreateOptions {
            header_extensions: vec![(TAG_EXTENSION, Tag::retired(&self.disk, 0).encode())],
            // The format knows multiples of 512 only.
            ..CreateOptions::buffer(self.size().next_multiple_of(512))
        };
        Qcow2::create(&file, &options).await.map_err(brep_block::Error::from)?;
        Ok(())
    }

    /// Gives a buffer up that no record names any more, and keeps it as a spare.
    pub(crate) async fn recycle(&self, buffer: Buffer) -> Result<()> {
        let is_named = buffer.named.is_some();
        // An operator's file that was never taken is none of ours.
        if !is_named || buffer.tag().is_some() {
            buffer.retire(&self.disk).await?;
        }
        if is_named {
            return Ok(buffer.image.close().await?);
        }
        if self.state().spares.len() >= Self::SPARES_MAX {
            return self.remove(buffer).await;
        }
        // One bounded piece each time: slowly, so that it is not in anybody's way.
        buffer.image.release_space(self.kept_space_bytes()).await?;
        self.state().spares.push(buffer);
        Ok(())
    }

    /// Gives a buffer up together with its room. No record names it.
    pub(crate) async fn remove(&self, buffer: Buffer) -> Result<()> {
        buffer.below.set(None);
        buffer.image.close().await?;
        remove(&buffer.path)
    }

    /// The highest sequence number given out: what the record must remember.
    pub(crate) fn seq(&self) -> u64 {
        self.state().seq
    }

    /// Writes out and closes what nobody uses.
    pub(crate) async fn close(&self) -> Result<()> {
        let unused = {
            let mut state = self.state();
            let mut unused = std::mem::take(&mut state.spares);
            unused.append(&mut state.named);
            unused
        };
        for buffer in unused {
            buffer.image.close().await?;
        }
        Ok(())
    }
}

/// How the image of a buffer is opened.
fn image_options(name: &str, below: &Arc<Below>, durability: Durability) -> OpenOptions {
    OpenOptions {
        name: name.to_owned(),
        backing: Some(Arc::clone(below) as Arc<dyn BlockDevice>),
        ordered: durability == Durability::Power,
        ..OpenOptions::default()
    }
}

/// Removes the buffers of a disk that nobody has open any more.
pub(crate) fn remove_buffers(dir: &Path, disk: &str) -> Result<()> {
    BufferPool::new(dir, disk, 0, None, Durability::default()).remove_files()
}

fn remove(path: &Path) -> Result<()> {
    storage::remove(path).map_err(|e| Error::failed(format!("{}: {e}", path.display())))
}

fn node_name(path: &Path) -> String {
    path.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned())
}

fn file_options(path: &Path) -> RawFileOptions {
    RawFileOptions {
        name: Some(node_name(path)),
        cache: CacheMode::Writeback,
        lock: true,
        ..RawFileOptions::default()
    }
}

#[cfg(test)]
mod tests;
