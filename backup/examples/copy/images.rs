//! Raw files and qcow2 images as devices.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use brep_block::{BlockDevice, RawFile, RawFileOptions};
use brep_nbd::NbdUri;
use brep_nbd::client::{ConnectOptions, Connection};
use brep_qcow2::{BackingName, CreateOptions, OpenOptions, Qcow2};

use crate::Error;

/// An open image.
pub(crate) struct Image {
    pub(crate) device: Arc<dyn BlockDevice>,
    qcow2: Option<Arc<Qcow2>>,
}

impl Image {
    /// Ends the use of an image: nothing is leaked, and the file is free for others.
    pub(crate) async fn close(self) -> Result<(), Error> {
        match self.qcow2 {
            Some(image) => Ok(image.close().await?),
            None => Ok(()),
        }
    }
}

/// Opens an image for writing over its backing files, which are opened for reading. With a size,
/// an image that does not exist is made. Names in images are not followed. A name with `://` is
/// an NBD URI.
pub(crate) async fn open(
    path: &Path,
    backing: &[PathBuf],
    create: Option<u64>,
) -> Result<Image, Error> {
    let text = path.to_string_lossy();
    if text.contains("://") {
        let uri: NbdUri = text.parse()?;
        let connection = Connection::connect(&ConnectOptions::from_uri(&uri)?).await;
        let device = connection.map_err(|error| format!("{text}: {error}"))?;
        return Ok(Image { device, qcow2: None });
    }
    if !is_qcow2(path) {
        if !backing.is_empty() {
            return Err(format!("{text}: a raw file has no backing file").into());
        }
        let device = RawFile::open(path, RawFileOptions { create, ..Default::default() })?;
        return Ok(Image { device, qcow2: None });
    }
    let backing_device = open_read_only(backing).await?;
    let made = create.filter(|_| !path.exists());
    let options = RawFileOptions { growable: true, create: made.map(|_| 0), ..Default::default() };
    let file: Arc<dyn BlockDevice> = RawFile::open(path, options)?;
    if let Some(size) = made {
        let backing_name = backing.first().map(|path| BackingName {
            name: path.to_string_lossy().into_owned(),
            format: if is_qcow2(path) { "qcow2" } else { "raw" }.to_owned(),
        });
        let size = size.next_multiple_of(512);
        let options = CreateOptions { backing_name, ..CreateOptions::new(size) };
        Qcow2::create(&file, &options).await?;
    }
    let name = text.into_owned();
    let options = OpenOptions { name, backing: backing_device, ..Default::default() };
    let image = Qcow2::open(file, options).await?;
    Ok(Image { device: image.clone(), qcow2: Some(image) })
}

/// Opens the first file over the others.
async fn open_read_only(chain: &[PathBuf]) -> Result<Option<Arc<dyn BlockDevice>>, Error> {
    let mut below: Option<Arc<dyn BlockDevice>> = None;
    for path in chain.iter().rev() {
        let options = RawFileOptions { read_only: true, ..Default::default() };
        let file: Arc<dyn BlockDevice> = RawFile::open(path, options)?;
        below = Some(if is_qcow2(path) {
            let name = path.to_string_lossy().into_owned();
            let options =
                OpenOptions { name, backing: below, read_only: true, ..Default::default() };
            Qcow2::open(file, options).await?
        } else {
            file
        });
    }
    Ok(below)
}

fn is_qcow2(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "qcow2")
}
