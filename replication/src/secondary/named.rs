//! Buffers that the operator has named: images of his own making, used for the first epoch.

use std::path::Path;
use std::sync::Arc;

use brep_block::{BlockDevice, CacheMode, RawFileOptions, storage};
use brep_qcow2::{OpenOptions, Qcow2};

use super::tag::{TAG_EXTENSION, Tag};
use crate::config::{BufferFiles, DiskConfig, Durability};
use crate::{Error, Result, SetId};

/// The largest piece that copy-before-write writes with one call. An image that allocates more at
/// a time would have clusters that are found after a kill although their second half is missing.
const CLUSTER_BYTES_MAX: u64 = 1 << 20;

/// What a named file was named for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum BufferUse {
    /// Pre-images.
    Hidden,
    /// What this side's guest writes.
    Active,
}

impl BufferUse {
    fn as_str(self) -> &'static str {
        match self {
            BufferUse::Hidden => "hidden disk",
            BufferUse::Active => "active disk",
        }
    }
}

impl BufferFiles {
    pub(super) fn each(&self) -> [(BufferUse, &Path); 2] {
        [(BufferUse::Hidden, &self.hidden), (BufferUse::Active, &self.active)]
    }

    /// Looks whether the hidden disk can be used. Changes nothing, and leaves nothing open.
    ///
    /// # Errors
    /// It cannot be opened, is no qcow2 image, names a backing file in its header, has internal
    /// snapshots, or allocates too much at a time.
    pub async fn check_hidden(&self, disk_size: u64) -> Result<()> {
        let image = look(BufferUse::Hidden, &self.hidden, disk_size).await?;
        check_image(BufferUse::Hidden, &self.hidden, &image, disk_size)
    }

    /// The same for the active disk.
    ///
    /// # Errors
    /// As [`check_hidden`](Self::check_hidden).
    pub async fn check_active(&self, disk_size: u64) -> Result<()> {
        let image = look(BufferUse::Active, &self.active, disk_size).await?;
        check_image(BufferUse::Active, &self.active, &image, disk_size)
    }

    /// Looks whether the files are as long as the disk, and empty, before anything is made. A
    /// state directory with a record in it knows more: then what is not empty is left to the start
    /// itself, which changes nothing either if it refuses.
    ///
    /// # Errors
    /// Refused, with what to do.
    pub async fn check_ready(&self, disk: &DiskConfig, size: u64, state_dir: &Path) -> Result<()> {
        let mut lengths = Vec::new();
        for (used_as, path) in self.each() {
            lengths.push(look(used_as, path, size).await?.size());
        }
        check_lengths(self, disk, size, &lengths)?;
        if storage::exists(state_dir.join("state")) {
            return Ok(());
        }
        for (used_as, path) in self.each() {
            let image = look(used_as, path, size).await?;
            check_free(used_as, path, &image, None, &disk.name).await?;
        }
        Ok(())
    }
}

async fn look(used_as: BufferUse, path: &Path, disk_size: u64) -> Result<Arc<Qcow2>> {
    let options = RawFileOptions { read_only: true, ..file_options(path) };
    let file = open_file(used_as, path, options, disk_size)?;
    let options = OpenOptions {
        name: path.display().to_string(),
        read_only: true,
        ignore_backing_name: true,
        ..OpenOptions::default()
    };
    let opened = Qcow2::open(file, options).await;
    opened.map_err(|e| {
        Error::from(brep_block::Error::from(e)).context(format!(
            "{} {}",
            used_as.as_str(),
            path.display()
        ))
    })
}

fn file_options(path: &Path) -> RawFileOptions {
    RawFileOptions {
        name: Some(path.display().to_string()),
        cache: CacheMode::Writeback,
        lock: true,
        ..RawFileOptions::default()
    }
}

fn open_file(
    used_as: BufferUse,
    path: &Path,
    options: RawFileOptions,
    disk_size: u64,
) -> Result<Arc<dyn BlockDevice>> {
    if !storage::exists(path) {
        return Err(Error::failed(format!(
            "{} {} does not exist; make it with {}",
            used_as.as_str(),
            path.display(),
            how_to_make(path, disk_size)
        )));
    }
    let file = storage::open_disk(path, options)
        .map_err(|e| Error::from(e).context(format!("{} {}", used_as.as_str(), path.display())))?;
    Ok(file)
}

fn how_to_make(path: &Path, disk_size: u64) -> String {
    let (path, size) = (path.display(), image_size(disk_size));
    format!(
        "`brep image create -f qcow2 --extended-l2 {path} {size}` or `qemu-img create -f qcow2 \
         {path} {size}`"
    )
}

/// The format knows multiples of 512 only.
fn image_size(disk_size: u64) -> u64 {
    disk_size.next_multiple_of(512)
}

/// Opens a named file as a buffer, and checks everything that does not need the record.
pub(super) async fn open(
    used_as: BufferUse,
    path: &Path,
    below: Arc<dyn BlockDevice>,
    durability: Durability,
) -> Result<(Arc<Qcow2>, Arc<dyn BlockDevice>)> {
    let disk_size = below.size();
    let options = RawFileOptions { growable: true, ..file_options(path) };
    let file = open_file(used_as, path, options, disk_size)?;
    let options = OpenOptions {
        name: path.display().to_string(),
        backing: Some(below),
        ordered: durability == Durability::Power,
        ..OpenOptions::default()
    };
    let image = Qcow2::open(Arc::clone(&file), options).await.map_err(|e| {
        Error::from(brep_block::Error::from(e)).context(format!(
            "{} {}",
            used_as.as_str(),
            path.display()
        ))
    })?;
    check_image(used_as, path, &image, disk_size)?;
    if durability == Durability::Power && image.staging().is_none() {
        return Err(Error::refused(format!(
            "the {} {} is a qcow2 image of version 2, which cannot keep pre-images over a loss of \
             power: `qemu-img amend -o compat=1.1` makes it one of version 3; or give \
             --durability process",
            used_as.as_str(),
            path.display()
        )));
    }
    if image.size() != image_size(disk_size) {
        return Err(Error::refused(format!(
            "the {} {} is {} bytes long, and its disk {disk_size}",
            used_as.as_str(),
            path.display(),
            image.size()
        )));
    }
    Ok((image, file))
}

/// What an image has to be, whatever it holds.
fn check_image(used_as: BufferUse, path: &Path, image: &Qcow2, disk_size: u64) -> Result<()> {
    let refuse = |why: String| {
        Err(Error::refused(format!(
            "{why}: {} {}; make an empty image with {}",
            used_as.as_str(),
            path.display(),
            how_to_make(path, disk_size)
        )))
    };
    if !image.snapshots().is_empty() {
        return refuse("qcow2+colo doesn't support snapshot".to_owned());
    }
    if let Some(name) = image.backing_name() {
        return refuse(format!(
            "qcow2+colo doesn't support backing_file in image header (it names {name:?}, and is \
             put over the other disks at run time)"
        ));
    }
    let allocated = image.subcluster_size();
    if allocated > CLUSTER_BYTES_MAX {
        return refuse(format!(
            "clusters of {allocated} bytes are larger than the {CLUSTER_BYTES_MAX} that a buffer \
             may allocate at a time"
        ));
    }
    Ok(())
}

fn check_lengths(files: &BufferFiles, disk: &DiskConfig, size: u64, lengths: &[u64]) -> Result<()> {
    if lengths.iter().all(|length| *length == image_size(size)) {
        return Ok(());
    }
    let (mut told, mut make) = (Vec::new(), Vec::new());
    for ((used_as, path), length) in files.each().into_iter().zip(lengths) {
        told.push(format!("{} {} has {length} bytes", used_as.as_str(), path.display()));
        if *length != image_size(size) {
            make.push(how_to_make(path, size));
        }
    }
    Err(Error::refused(format!(
        "active disk, hidden disk, nbd target's length are not the same: {}, nbd target {} has \
         {size} bytes; make a new image with {}",
        told.join(", "),
        disk.path.display(),
        make.join(", and ")
    )))
}

/// Whether a file that the record does not name may be taken: it is empty, or it is one that this
/// side has used before and given up. `set` is the record's.
pub(super) async fn check_free(
    used_as: BufferUse,
    path: &Path,
    image: &Qcow2,
    set: Option<SetId>,
    disk: &str,
) -> Result<()> {
    let refuse = |why: &str| {
        Err(Error::refused(format!(
            "the {} {} {why}. Nothing was changed. It has to start empty: name another file, or \
             move this one away and make an empty one with {}",
            used_as.as_str(),
            path.display(),
            how_to_make(path, image.size())
        )))
    };
    let tag = image.header_extension(TAG_EXTENSION).map(|data| Tag::decode(&data));
    match tag {
        None if image.is_empty().await? => Ok(()),
        None => refuse("is not empty, and the state record knows nothing of what it holds"),
        Some(None) => refuse("carries the tag of another version of brep"),
        Some(Some(tag)) if tag.in_use && !(Some(tag.set) == set && tag.disk == disk) => refuse(
            "is in use: it may hold a part of the checkpoint of another secondary, or of this one \
             if its state directory was moved (give that with --state-dir)",
        ),
        // A record that named it was followed by one that does not.
        Some(Some(_)) => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use brep_block::RawFile;
    use brep_qcow2::{BackingName, CreateOptions};
    use bytes::Bytes;
    use tempfile::TempDir;

    use super::*;
    use crate::config::DiskFormat;
    use crate::secondary::buffers::{Buffer, BufferPool};

    const SIZE: u64 = 1 << 20;

    /// A disk's files, as an operator makes them.
    struct Scratch {
        dir: TempDir,
        files: BufferFiles,
    }

    impl Scratch {
        async fn new() -> Self {
            Self::made(&CreateOptions::new(SIZE)).await
        }

        async fn made(options: &CreateOptions) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let path = |name: &str| dir.path().join(name);
            let files = BufferFiles { active: path("active"), hidden: path("hidden") };
            for (_, path) in files.each() {
                create(path, options).await;
            }
            Scratch { files, dir }
        }

        fn pool(&self) -> BufferPool {
            let dir = self.dir.path().join("state");
            std::fs::create_dir_all(&dir).unwrap();
            BufferPool::new(&dir, "vda", SIZE, Some(self.files.clone()), Durability::Power)
        }

        fn disk(&self) -> DiskConfig {
            DiskConfig {
                name: "vda".into(),
                path: "disk.raw".into(),
                format: DiskFormat::Raw,
                cache: CacheMode::Writeback,
                buffers: Some(self.files.clone()),
            }
        }

        fn contents(&self) -> [Vec<u8>; 2] {
            self.files.each().map(|(_, path)| std::fs::read(path).unwrap())
        }

        /// Waits until the files of a pool that was dropped are closed: their last requests may
        /// end in other threads.
        async fn released(&self) {
            let locked = |dir: &Path| {
                let files = std::fs::read_dir(dir).into_iter().flatten().flatten();
                let images = files.filter(|f| f.file_type().unwrap().is_file());
                images
                    .map(|f| RawFile::open(f.path(), RawFileOptions::default()))
                    .any(|f| f.is_err())
            };
            let limit = std::time::Instant::now() + std::time::Duration::from_secs(10);
            while locked(self.dir.path()) || locked(&self.dir.path().join("state")) {
                assert!(std::time::Instant::now() < limit, "a file stays locked");
                tokio::time::sleep(std::time::Duration::from_millis(1)).await;
            }
        }

        /// What all three checks say before a first start, which is also what the start says.
        async fn refusal(&self) -> String {
            let before = self.contents();
            let state_dir = self.dir.path().join("missing");
            let checked = async {
                self.files.check_hidden(SIZE).await?;
                self.files.check_active(SIZE).await?;
                self.files.check_ready(&self.disk(), SIZE, &state_dir).await
            };
            let checked = checked.await.unwrap_err();
            let started =
                self.pool().open(Some(SetId::random()), &[], 0, false, false).await.unwrap_err();
            assert_eq!(started.exit_code(), checked.exit_code(), "{started}; {checked}");
            assert!(self.contents() == before, "a refused file was changed");
            assert!(!state_dir.exists());
            checked.to_string()
        }
    }

    async fn create(path: &Path, options: &CreateOptions) {
        let raw = RawFileOptions { create: Some(0), growable: true, ..RawFileOptions::default() };
        let file = RawFile::open(path, raw).unwrap() as Arc<dyn BlockDevice>;
        Qcow2::create(&file, options).await.unwrap();
    }

    async fn write(image: &Qcow2, byte: u8) {
        let data = Bytes::from(vec![byte; 512]);
        image.write(4096, data, Default::default()).await.unwrap();
    }

    fn is_file(buffer: &Buffer, path: &Path) -> bool {
        buffer.image.name() == path.display().to_string()
    }

    #[tokio::test]
    async fn the_first_epoch_takes_the_named_files_and_the_next_ones_do_not() {
        let scratch = Scratch::new().await;
        let (pool, set) = (scratch.pool(), SetId::random());
        pool.open(None, &[], 0, false, false).await.unwrap();
        let hidden = pool.take_first(set, BufferUse::Hidden).await.unwrap();
        let active = pool.take_first(set, BufferUse::Active).await.unwrap();
        assert!(is_file(&hidden, &scratch.files.hidden) && is_file(&active, &scratch.files.active));
        assert_eq!(hidden.unit_bytes(), 65536, "plain images allocate whole clusters");
        write(&hidden.image, 1).await;
        pool.recycle(hidden).await.unwrap();
        for used_as in [BufferUse::Hidden, BufferUse::Hidden] {
            let next = pool.take_first(set, used_as).await.unwrap();
            assert!(!is_file(&next, &scratch.files.hidden));
            assert_eq!(next.unit_bytes(), 2048);
        }
        // It is the operator's again: nobody has it locked, and it is empty.
        let image = look(BufferUse::Hidden, &scratch.files.hidden, SIZE).await.unwrap();
        assert!(image.is_empty().await.unwrap());
    }

    /// Every moment between two writes to file or record, and the process is killed there.
    #[tokio::test]
    async fn a_named_file_is_found_again_after_a_kill_at_any_step() {
        let scratch = Scratch::new().await;
        let set = SetId::random();
        let first = async |wanted: &[_], seq_max| {
            scratch.released().await;
            let pool = scratch.pool();
            let found = pool.open(Some(set), wanted, seq_max, false, false).await?;
            Ok::<_, Error>((pool, found))
        };
        // Tagged, and no record names it yet.
        let (pool, _) = first(&[], 0).await.unwrap();
        drop(pool.take_first(set, BufferUse::Hidden).await.unwrap());
        drop(pool);
        let (pool, _) = first(&[], 0).await.unwrap();
        let hidden = pool.take_first(set, BufferUse::Hidden).await.unwrap();
        assert!(is_file(&hidden, &scratch.files.hidden));
        // Named, and written to.
        let (reference, seq) = (hidden.reference(), hidden.seq);
        write(&hidden.image, 7).await;
        drop((pool, hidden));
        let (pool, found) = first(&[reference], seq).await.unwrap();
        assert!(is_file(&found[0], &scratch.files.hidden));
        assert_eq!(found[0].image.read(4096, 512).await.unwrap(), vec![7; 512]);
        // A record names it no more, and it still says so itself.
        drop((pool, found));
        let (pool, _) = first(&[], seq).await.unwrap();
        let again = pool.take_first(set, BufferUse::Hidden).await.unwrap();
        assert!(is_file(&again, &scratch.files.hidden) && again.seq > seq);
        assert!(again.image.is_empty().await.unwrap());
        // Retired, and not emptied yet.
        write(&again.image, 8).await;
        let retired = Tag::retired("vda", again.seq).encode();
        again.image.set_header_extension(TAG_EXTENSION, retired).await.unwrap();
        drop((pool, again));
        let (pool, _) = first(&[], seq).await.unwrap();
        let last = pool.take_first(set, BufferUse::Hidden).await.unwrap();
        assert!(is_file(&last, &scratch.files.hidden));
        assert!(last.image.is_empty().await.unwrap());
    }

    #[tokio::test]
    async fn a_record_that_names_other_buffers_leaves_the_named_files_alone() {
        let scratch = Scratch::new().await;
        let (set, untouched) = (SetId::random(), scratch.contents());
        let (pool, dir) = (scratch.pool(), scratch.dir.path().join("state"));
        let other = BufferPool::new(&dir, "vda", SIZE, None, Durability::Power);
        other.open(None, &[], 0, false, false).await.unwrap();
        let own = other.take(set).await.unwrap().reference();
        drop(other);
        scratch.released().await;
        pool.open(Some(set), &[own], own.seq, false, false).await.unwrap();
        let next = pool.take_first(set, BufferUse::Hidden).await.unwrap();
        assert!(!is_file(&next, &scratch.files.hidden));
        assert!(scratch.contents() == untouched);
    }

    #[tokio::test]
    async fn a_start_without_the_named_files_that_the_record_needs_says_which_option_is_missing() {
        let scratch = Scratch::new().await;
        let (pool, set) = (scratch.pool(), SetId::random());
        pool.open(None, &[], 0, false, false).await.unwrap();
        let wanted = [pool.take_first(set, BufferUse::Hidden).await.unwrap().reference()];
        drop(pool);
        scratch.released().await;
        let dir = scratch.dir.path().join("state");
        let plain = BufferPool::new(&dir, "vda", SIZE, None, Durability::Power);
        let error = plain.open(Some(set), &wanted, 9, false, false).await.unwrap_err();
        assert_eq!(error.exit_code(), 3);
        assert!(error.to_string().contains("--drive"), "{error}");
    }

    #[tokio::test]
    async fn files_that_are_not_empty_and_not_ours_are_refused() {
        let scratch = Scratch::new().await;
        let image = open(
            BufferUse::Hidden,
            &scratch.files.hidden,
            crate::layer::Below::nothing(SIZE) as Arc<dyn BlockDevice>,
            Durability::Power,
        );
        let (image, file) = image.await.unwrap();
        write(&image, 1).await;
        drop((image, file));
        scratch.released().await;
        let said = scratch.refusal().await;
        assert!(said.contains("is not empty") && said.contains("Nothing was changed"), "{said}");
        assert!(said.contains("qemu-img create -f qcow2"), "{said}");
    }

    #[tokio::test]
    async fn a_file_of_another_pair_is_refused_although_it_is_empty() {
        let scratch = Scratch::new().await;
        let pool = scratch.pool();
        pool.open(None, &[], 0, false, false).await.unwrap();
        drop(pool.take_first(SetId::random(), BufferUse::Active).await.unwrap());
        drop(pool);
        scratch.released().await;
        let said = scratch.refusal().await;
        assert!(said.contains("another secondary"), "{said}");
    }

    #[tokio::test]
    async fn series_s11_start_lengths_must_be_equal() {
        let scratch = Scratch::made(&CreateOptions::new(SIZE + 512)).await;
        let said = scratch.refusal().await;
        assert!(
            said.contains("active disk, hidden disk, nbd target's length are not the same"),
            "{said}"
        );
        assert!(said.contains("1049088") && said.contains("1048576"), "{said}");
    }

    #[tokio::test]
    async fn series_s11_open_a_backing_name_in_the_header_is_refused() {
        let backing = BackingName { name: "base.qcow2".into(), format: "qcow2".into() };
        let options = CreateOptions { backing_name: Some(backing), ..CreateOptions::new(SIZE) };
        let said = Scratch::made(&options).await.refusal().await;
        assert!(said.contains("qcow2+colo doesn't support backing_file in image header"), "{said}");
    }

    #[tokio::test]
    async fn series_s11_open_snapshots_in_the_image_are_refused() {
        let scratch = Scratch::new().await;
        let mut qemu_img = std::process::Command::new("qemu-img");
        qemu_img.args(["snapshot", "-c", "one"]).arg(&scratch.files.active);
        let Ok(done) = qemu_img.status() else {
            eprintln!(
                "SKIP: series_s11_open_snapshots_in_the_image_are_refused: qemu-img not found"
            );
            return;
        };
        assert!(done.success());
        let said = scratch.refusal().await;
        assert!(said.contains("qcow2+colo doesn't support snapshot: active disk"), "{said}");
    }

    #[tokio::test]
    async fn clusters_that_cannot_be_copied_with_one_call_are_refused() {
        let options = CreateOptions { cluster_bits: 21, ..CreateOptions::new(SIZE) };
        let said = Scratch::made(&options).await.refusal().await;
        assert!(said.contains("clusters of 2097152 bytes"), "{said}");
    }

    #[tokio::test]
    async fn a_file_that_does_not_exist_is_asked_for_with_the_command_that_makes_it() {
        let scratch = Scratch::new().await;
        let files = BufferFiles { hidden: "no/hidden.qcow2".into(), ..scratch.files.clone() };
        let error = files.check_hidden(1000).await.unwrap_err();
        assert_eq!(error.exit_code(), 1);
        let command = "qemu-img create -f qcow2 no/hidden.qcow2 1024";
        assert!(error.to_string().contains(command), "{error}");
    }
}
