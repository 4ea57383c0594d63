use std::sync::Arc;

use brep_block::{
    BlockDevice, Error as BlockError, ErrorKind, FlushLevel, RawFileOptions, storage,
};
use brep_qcow2::{OpenOptions, Qcow2};
use futures_util::FutureExt;

use crate::config::{DiskConfig, DiskFormat};
use crate::{Error, Result};

/// A disk image that is open for writing, whatever its format.
#[derive(Debug, Clone)]
pub(crate) struct Image {
    device: Arc<dyn BlockDevice>,
    file: Arc<dyn BlockDevice>,
    qcow2: Option<Arc<Qcow2>>,
}

impl Image {
    /// Opens the file under the format that was named; locks it.
    ///
    /// # Errors
    /// With the path, and what to do.
    pub(crate) async fn open(config: &DiskConfig) -> Result<Self> {
        let options = RawFileOptions {
            name: Some(config.name.clone()),
            cache: config.cache,
            // Of a raw disk too: by command, and by nobody's write.
            growable: true,
            lock: true,
            ..RawFileOptions::default()
        };
        let file = storage::open_disk(&config.path, options)?;
        #[cfg(test)]
        let file = faults::over(&config.path, file);
        match config.format {
            DiskFormat::Raw => Ok(Image { device: Arc::clone(&file), file, qcow2: None }),
            DiskFormat::Qcow2 => {
                let options = OpenOptions { name: config.name.clone(), ..OpenOptions::default() };
                let image = Qcow2::open(Arc::clone(&file), options).await.map_err(|e| {
                    Error::from(brep_block::Error::from(e)).context(config.path.display())
                })?;
                Ok(Image { device: Arc::clone(&image) as _, file, qcow2: Some(image) })
            }
        }
    }

    /// Whether it can be made larger; a block device cannot.
    pub(crate) fn is_growable(&self) -> bool {
        self.qcow2.is_some() || self.device.limits().growable
    }

    pub(crate) fn device(&self) -> &Arc<dyn BlockDevice> {
        &self.device
    }

    /// Why it takes no writes any more until it is opened again, if it does not.
    pub(crate) fn failure(&self) -> Option<BlockError> {
        self.qcow2.as_ref()?.failure()
    }

    /// Why no flush of it succeeds any more, if none does.
    pub(crate) fn failed_flush(&self) -> Option<BlockError> {
        failed_flush(&*self.file)
    }

    /// Writes everything out; the image is not to be used afterwards.
    pub(crate) async fn close(&self) -> Result<()> {
        self.device.flush(FlushLevel::Durable).await?;
        if let Some(image) = &self.qcow2 {
            image.close().await?;
        }
        Ok(())
    }
}

/// Why no flush of a file succeeds any more, if none does.
pub(crate) fn failed_flush(file: &dyn BlockDevice) -> Option<BlockError> {
    let error = file.flush(FlushLevel::Process).now_or_never()?.err()?;
    (error.kind() == ErrorKind::Sticky).then_some(error)
}

/// Lets tests put faults below a disk that a side opens by its path.
#[cfg(test)]
pub(crate) mod faults {
    use std::collections::HashMap;
    use std::path::{Path, PathBuf};
    use std::sync::{Arc, LazyLock, Mutex, Weak};

    use brep_block::{BlockDevice, Fault};

    /// Two, one over the other: what hangs in the upper may fail in the lower.
    #[derive(Debug, Clone)]
    pub(crate) struct Faults {
        pub(crate) upper: Arc<Fault>,
        pub(crate) lower: Arc<Fault>,
    }

    type Known = (Weak<Fault>, Weak<Fault>);

    /// A disk that is closed gives its file back, so nobody is kept alive here.
    static DISKS: LazyLock<Mutex<HashMap<PathBuf, Known>>> = LazyLock::new(Mutex::default);

    pub(crate) fn over(path: &Path, device: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        let lower = Fault::new(device);
        let upper = Fault::new(Arc::clone(&lower) as _);
        let known = (Arc::downgrade(&upper), Arc::downgrade(&lower));
        DISKS.lock().unwrap().insert(path.to_owned(), known);
        upper
    }

    /// The faults below the disk that was last opened under this path, if it is open still.
    pub(crate) fn find(path: &Path) -> Option<Faults> {
        let (upper, lower) = DISKS.lock().unwrap().get(path)?.clone();
        Some(Faults { upper: upper.upgrade()?, lower: lower.upgrade()? })
    }

    /// The same of one that is open.
    pub(crate) fn of(path: &Path) -> Faults {
        find(path).unwrap()
    }
}
