use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use brep_block::{BlockDevice, CacheMode, RawFile, RawFileOptions};
use brep_qcow2::{CreateOptions, MakeEmpty, OpenOptions, Qcow2};
use bytes::Bytes;

use crate::layer::{Below, cropped};
use crate::state::BufferRef;
use crate::{Error, Result, SetId};

/// The qcow2 header extension that carries a buffer's tag.
///
/// | offset | size | field |
/// |---|---|---|
/// | 0 | 4 | version, 1 |
/// | 4 | 4 | 1: in use, 0: retired |
/// | 8 | 8 | sequence number |
/// | 16 | 16 | identity of the set |
/// | 32 | 64 | name of the disk, padded with zero bytes |
pub(crate) const TAG_EXTENSION: u32 = 0x4252_4550;
const TAG_VERSION: u32 = 1;
const TAG_LEN: usize = 96;
const NAME_LEN_MAX: usize = 64;

/// The end of the name of a file that is still being made.
const UNFINISHED: &str = "qcow2.new";

/// Epochs whose needs decide how much space a spare keeps.
const RECENT_EPOCHS: usize = 16;

/// A single unit may occupy a whole cluster.
const UNITS_A_CLUSTER: u64 = 32;

/// Space that a spare keeps in any case.
const SPACE_MARGIN_BYTES: u64 = 16 << 20;

/// What a buffer says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Tag {
    in_use: bool,
    seq: u64,
    set: SetId,
    disk: String,
}

impl Tag {
    fn encode(&self) -> Bytes {
        let mut out = Vec::with_capacity(TAG_LEN);
        out.extend_from_slice(&TAG_VERSION.to_be_bytes());
        out.extend_from_slice(&u32::from(self.in_use).to_be_bytes());
        out.extend_from_slice(&self.seq.to_be_bytes());
        out.extend_from_slice(self.set.0.as_bytes());
        out.extend_from_slice(
            self.disk.as_bytes().get(..NAME_LEN_MAX).unwrap_or(self.disk.as_bytes()),
        );
        out.resize(TAG_LEN, 0);
        out.into()
    }

    fn decode(data: &[u8]) -> Option<Self> {
        let data: &[u8; TAG_LEN] = data.try_into().ok()?;
        let (version, rest) = data.split_first_chunk::<4>()?;
        let (in_use, rest) = rest.split_first_chunk::<4>()?;
        let (seq, rest) = rest.split_first_chunk::<8>()?;
        let (set, name) = rest.split_first_chunk::<16>()?;
        if u32::from_be_bytes(*version) != TAG_VERSION {
            return None;
        }
        let name = name.split(|b| *b == 0).next()?;
        Some(Tag {
            in_use: u32::from_be_bytes(*in_use) == 1,
            seq: u64::from_be_bytes(*seq),
            set: SetId(uuid::Uuid::from_bytes(*set)),
            disk: std::str::from_utf8(name).ok()?.to_owned(),
        })
    }
}

/// A buffer that is in use: a hidden, active or top disk.
#[derive(Debug, Clone)]
pub(crate) struct Buffer {
    pub(crate) seq: u64,
    pub(crate) image: Arc<Qcow2>,
    /// What the image falls through to.
    pub(crate) below: Arc<Below>,
    size: u64,
    path: PathBuf,
}

impl Buffer {
    pub(crate) fn reference(&self) -> BufferRef {
        BufferRef { seq: self.seq }
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
    size: u64,
    state: Mutex<PoolState>,
}

#[derive(Debug, Default)]
struct PoolState {
    /// Retired and empty; at most [`BufferPool::SPARES_MAX`].
    spares: Vec<Buffer>,
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

    pub(crate) fn new(dir: &Path, disk: &str, size: u64) -> Self {
        BufferPool {
            dir: dir.to_owned(),
            disk: disk.to_owned(),
            size,
            state: Mutex::new(PoolState::default()),
        }
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

    /// Opens what the state directory holds: the buffers that a record names, in its order.
    /// All others become spares.
    ///
    /// # Errors
    /// A named buffer is missing, cannot be opened, or carries another tag: then the disk is
    /// inconsistent, and nothing was changed.
    pub(crate) async fn open(
        &self,
        set: Option<SetId>,
        wanted: &[BufferRef],
        seq_max: u64,
    ) -> Result<Vec<Buffer>> {
        let mut found = Vec::new();
        let mut unusable = String::new();
        let mut number_max = 0;
        for number in self.numbers()? {
            number_max = number_max.max(number.saturating_add(1));
            match self.open_file(&self.path(number)).await {
                Ok(file) => found.push(file),
                // It matters only if it is one of those that are wanted.
                Err(error) => {
                    tracing::warn!(%error, "a file that should be a buffer is left alone");
                    unusable.push_str(&format!(" ({error})"));
                }
            }
        }
        let mut named = Vec::new();
        for reference in wanted {
            let position = found.iter().position(|(tag, _)| {
                tag.as_ref().is_some_and(|t| {
                    t.in_use && t.seq == reference.seq && t.disk == self.disk && Some(t.set) == set
                })
            });
            let Some(position) = position else {
                return Err(Error::refused(format!(
                    "disk {}: the state record names buffer {}, but no file in {} carries its \
                     tag{unusable}; the checkpoint is lost. Nothing was changed. A full copy from the \
                     primary makes the disk whole again: move the state directory away and start \
                     the secondary anew",
                    self.disk,
                    reference.seq,
                    self.dir.display()
                )));
            };
            named.push(found.swap_remove(position).1);
        }
        let seq_seen = found.iter().filter_map(|(tag, _)| tag.as_ref().map(|t| t.seq)).max();
        {
            let mut state = self.state();
            state.file_number = number_max;
            state.seq = seq_max.max(seq_seen.unwrap_or(0));
        }
        for (_, buffer) in found {
            self.recycle(buffer).await?;
        }
        Ok(named)
    }

    /// The numbers of the files of this disk. Removes what a killed process has not finished
    /// making.
    fn numbers(&self) -> Result<Vec<u32>> {
        let fail = |e: std::io::Error| Error::failed(format!("{}: {e}", self.dir.display()));
        let mut numbers = Vec::new();
        for entry in std::fs::read_dir(&self.dir).map_err(fail)? {
            let entry = entry.map_err(fail)?;
            let name = entry.file_name();
            let rest = name.to_str().and_then(|n| n.strip_prefix(&self.disk)?.strip_prefix('.'));
            let Some((number, kind)) = rest.and_then(|r| r.split_once('.')) else { continue };
            match (number.parse::<u32>(), kind) {
                (Ok(number), "qcow2") => numbers.push(number),
                (Ok(_), UNFINISHED) => std::fs::remove_file(entry.path()).map_err(fail)?,
                _ => {}
            }
        }
        numbers.sort_unstable();
        Ok(numbers)
    }

    async fn open_file(&self, path: &Path) -> Result<(Option<Tag>, Buffer)> {
        let options = RawFileOptions { growable: true, ..file_options(path) };
        let file: Arc<dyn BlockDevice> = RawFile::open(path, options)?;
        let below = Below::nothing(self.size);
        let options = OpenOptions {
            name: node_name(path),
            backing: Some(Arc::clone(&below) as Arc<dyn BlockDevice>),
            ordered: false,
            ..OpenOptions::default()
        };
        let image = Qcow2::open(file, options)
            .await
            .map_err(|e| Error::from(brep_block::Error::from(e)).context(path.display()))?;
        let tag = image.header_extension(TAG_EXTENSION).and_then(|data| Tag::decode(&data));
        let seq = tag.as_ref().map_or(0, |t| t.seq);
        Ok((tag, Buffer { seq, image, below, size: self.size, path: path.to_owned() }))
    }

    /// An empty buffer under a new sequence number, ready to be named by a record.
    pub(crate) async fn take(&self, set: SetId) -> Result<Buffer> {
        let (spare, seq) = {
            let mut state = self.state();
            state.seq += 1;
            (state.spares.pop(), state.seq)
        };
        let mut buffer = match spare {
            Some(buffer) => buffer,
            None => self.create().await?,
        };
        buffer.seq = seq;
        let tag = Tag { in_use: true, seq, set, disk: self.disk.clone() };
        buffer.image.set_header_extension(TAG_EXTENSION, tag.encode()).await?;
        Ok(buffer)
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
            std::fs::rename(&unfinished, &path)
                .map_err(|e| Error::failed(format!("{}: {e}", path.display())))
        });
        if let Err(error) = made {
            // Best effort: what stays is removed at the next start.
            let _ = std::fs::remove_file(&unfinished);
            return Err(error);
        }
        Ok(self.open_file(&path).await?.1)
    }

    async fn create_file(&self, path: &Path) -> Result<()> {
        let options = RawFileOptions {
            growable: true,
            create_new: true,
            create: Some(0),
            ..file_options(path)
        };
        let file: Arc<dyn BlockDevice> = RawFile::open(path, options)?;
        let retired =
            Tag { in_use: false, seq: 0, set: SetId(uuid::Uuid::nil()), disk: self.disk.clone() };
        let options = CreateOptions {
            header_extensions: vec![(TAG_EXTENSION, retired.encode())],
            // The format knows multiples of 512 only.
            ..CreateOptions::buffer(self.size.next_multiple_of(512))
        };
        Qcow2::create(&file, &options).await.map_err(brep_block::Error::from)?;
        Ok(())
    }

    /// Gives a buffer up that no record names any more: its tag first, then its contents.
    pub(crate) async fn recycle(&self, buffer: Buffer) -> Result<()> {
        // Its next use may be another: a hidden disk over the view that it is part of would ask
        // itself for ever.
        buffer.below.set(None);
        let retired = Tag {
            in_use: false,
            seq: buffer.seq,
            set: SetId(uuid::Uuid::nil()),
            disk: self.disk.clone(),
        };
        buffer.image.set_header_extension(TAG_EXTENSION, retired.encode()).await?;
        if self.state().spares.len() >= Self::SPARES_MAX {
            buffer.image.close().await?;
            std::fs::remove_file(&buffer.path)
                .map_err(|e| Error::failed(format!("{}: {e}", buffer.path.display())))?;
            return Ok(());
        }
        if !buffer.image.is_empty().await? {
            buffer.image.make_empty(MakeEmpty::Keep).await?;
        }
        // One bounded piece each time: slowly, so that it is not in anybody's way.
        buffer.image.release_space(self.kept_space_bytes()).await?;
        self.state().spares.push(buffer);
        Ok(())
    }

    /// The highest sequence number given out: what the record must remember.
    pub(crate) fn seq(&self) -> u64 {
        self.state().seq
    }

    /// Writes out and closes the spares.
    pub(crate) async fn close(&self) -> Result<()> {
        let spares = std::mem::take(&mut self.state().spares);
        for buffer in spares {
            buffer.image.close().await?;
        }
        Ok(())
    }
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
mod tests {
    use super::*;

    /// A process that is killed while it makes a buffer must not keep the next from its
    /// checkpoint.
    #[tokio::test]
    async fn what_a_killed_process_was_making_does_not_keep_the_others_from_being_opened() {
        let dir = tempfile::tempdir().unwrap();
        let set = SetId::random();
        let seq = {
            let pool = BufferPool::new(dir.path(), "vda", 1 << 20);
            pool.open(Some(set), &[], 0).await.unwrap();
            pool.take(set).await.unwrap().seq
        };
        let unfinished = dir.path().join("vda.1.qcow2.new");
        std::fs::write(&unfinished, b"QFI\xfb").unwrap();
        std::fs::write(dir.path().join("vda.2.qcow2"), b"").unwrap();
        let pool = BufferPool::new(dir.path(), "vda", 1 << 20);
        let named = pool.open(Some(set), &[BufferRef { seq }], seq).await.unwrap();
        assert_eq!(named[0].seq, seq);
        assert!(!unfinished.exists());
        for _ in 0..3 {
            pool.take(set).await.unwrap();
        }
        let missing = pool.open(Some(set), &[BufferRef { seq: 99 }], seq).await.unwrap_err();
        assert!(missing.to_string().contains("vda.2.qcow2"), "{missing}");
    }

    #[tokio::test]
    async fn a_spare_gives_space_back_slowly_when_epochs_have_become_small() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let set = SetId::random();
        let pool = BufferPool::new(dir.path(), "vda", 256 << 20);
        pool.open(Some(set), &[], 0).await.unwrap();
        let epoch = async |bytes: u64| {
            let buffer = pool.take(set).await.unwrap();
            let mut at = 0;
            while at < bytes {
                let len = (bytes - at).min(1 << 20);
                let data = Bytes::from(vec![7; len as usize]);
                buffer.device().write(at, data, Default::default()).await.unwrap();
                at += len;
            }
            pool.note_use(bytes);
            pool.recycle(buffer).await.unwrap();
            let file = std::fs::metadata(dir.path().join("vda.0.qcow2")).unwrap();
            file.blocks() * 512
        };
        let large = epoch(64 << 20).await;
        assert!(large >= 64 << 20, "a spare keeps its space: {large}");
        let mut last = large;
        for _ in 1..RECENT_EPOCHS {
            last = epoch(4096).await;
        }
        assert_eq!(last, large, "a busy epoch is remembered");
        let first = epoch(4096).await;
        assert!(first < large && first >= large - (32 << 20), "piece by piece: {first}");
        for _ in 0..8 {
            last = epoch(4096).await;
        }
        assert!(last <= SPACE_MARGIN_BYTES + (2 << 20), "down to the margin: {last}");
    }

    #[test]
    fn a_tag_is_read_back_and_damage_is_noticed() {
        let tag = Tag { in_use: true, seq: 42, set: SetId::random(), disk: "vda".into() };
        let data = tag.encode();
        assert_eq!(Tag::decode(&data), Some(tag));
        assert_eq!(Tag::decode(&data[1..]), None);
        let mut newer = data.to_vec();
        newer[3] = 2;
        assert_eq!(Tag::decode(&newer), None);
    }
}
