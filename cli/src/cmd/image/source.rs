use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use brep_block::{BlockDevice, FlushLevel, RawFile, RawFileOptions};
use brep_nbd::NbdUri;
use brep_nbd::client::{ConnectOptions, Connection};
use brep_qcow2::{OpenError, OpenOptions, Qcow2};
use brep_replication::config::DiskFormat;

use super::format_name;
use crate::args::{format_by_name, tls_failure, unknown_format};
use crate::exit::{self, Failure};

/// An image that is open: a file under a stated format, or an export of an NBD server.
#[derive(Debug)]
pub(crate) struct Source {
    /// What the image holds.
    pub(crate) device: Arc<dyn BlockDevice>,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Raw,
    Qcow2(Arc<Qcow2>),
    Export,
}

impl Source {
    /// Refuses a name that says neither that it is an export nor what its format is.
    pub(super) fn check(image: &str, format: Option<DiskFormat>) -> Result<(), Failure> {
        match nbd_uri(image)? {
            Some(_) => Ok(()),
            None => stated_format(Path::new(image), format).map(drop),
        }
    }

    /// Opens what looks like an NBD URI as one, and anything else as a file.
    pub(crate) async fn open(
        image: &str,
        format: Option<DiskFormat>,
        read_only: bool,
    ) -> Result<Self, Failure> {
        match nbd_uri(image)? {
            Some(_) if format == Some(DiskFormat::Qcow2) => Err(Failure::usage(format!(
                "{image}: an export holds a disk, so its format is raw"
            ))),
            Some(uri) => Self::connect(&uri).await,
            None => Self::open_file(Path::new(image), format, read_only).await,
        }
    }

    /// Opens a file.
    pub(crate) async fn open_file(
        path: &Path,
        format: Option<DiskFormat>,
        read_only: bool,
    ) -> Result<Self, Failure> {
        Self::open_with(path, format, OpenOptions { read_only, ..OpenOptions::default() }).await
    }

    /// Opens an image to say what it is: one that lacks its backing file can be described, though
    /// not read.
    pub(super) async fn describe(image: &str, format: Option<DiskFormat>) -> Result<Self, Failure> {
        if nbd_uri(image)?.is_some() {
            return Self::open(image, format, true).await;
        }
        let options =
            OpenOptions { read_only: true, ignore_backing_name: true, ..OpenOptions::default() };
        Self::open_with(Path::new(image), format, options).await
    }

    async fn open_with(
        path: &Path,
        format: Option<DiskFormat>,
        options: OpenOptions,
    ) -> Result<Self, Failure> {
        let format = stated_format(path, format)?;
        let file = open_raw(path, format, options.read_only)?;
        if format == DiskFormat::Raw {
            return Ok(Source { device: file, kind: Kind::Raw });
        }
        let options = OpenOptions { name: path.display().to_string(), ..options };
        let image = Qcow2::open(file, options).await.map_err(|error| refused(path, error))?;
        Ok(Source { device: Arc::clone(&image) as _, kind: Kind::Qcow2(image) })
    }

    async fn connect(uri: &NbdUri) -> Result<Self, Failure> {
        let options = ConnectOptions::from_uri(uri).map_err(|e| tls_failure("NBD", uri, e))?;
        let connection = Connection::connect(&options).await.with_context(|| uri.to_string())?;
        Ok(Source { device: connection, kind: Kind::Export })
    }

    /// Writes everything out.
    pub(crate) async fn close(&self) -> Result<(), Failure> {
        self.device.flush(FlushLevel::Durable).await?;
        if let Some(image) = self.qcow2() {
            image.close().await?;
        }
        Ok(())
    }

    /// The name of the format; `nbd` for an export.
    pub(super) fn format(&self) -> &'static str {
        match self.kind {
            Kind::Raw => format_name(DiskFormat::Raw),
            Kind::Qcow2(_) => format_name(DiskFormat::Qcow2),
            Kind::Export => "nbd",
        }
    }

    /// The image itself, if it is in qcow2 format.
    pub(super) fn qcow2(&self) -> Option<&Arc<Qcow2>> {
        match &self.kind {
            Kind::Qcow2(image) => Some(image),
            Kind::Raw | Kind::Export => None,
        }
    }

    /// Whether it is served by an NBD server.
    pub(super) fn is_export(&self) -> bool {
        matches!(self.kind, Kind::Export)
    }
}

/// Opens the file itself, whatever it holds.
pub(super) fn open_raw(
    path: &Path,
    format: DiskFormat,
    read_only: bool,
) -> Result<Arc<dyn BlockDevice>, Failure> {
    let growable = format == DiskFormat::Qcow2;
    let options = RawFileOptions { growable, read_only, ..RawFileOptions::default() };
    let file = RawFile::open(path, options).map_err(failed)?;
    Ok(file)
}

/// What is wrong with a file is a failure, not a mistake in the command line.
pub(super) fn failed(error: brep_block::Error) -> Failure {
    let failure = Failure::from(error);
    if failure.code == exit::USAGE { failure.with_code(exit::FAILED) } else { failure }
}

/// The format that was given, or that the file's name states.
pub(super) fn stated_format(path: &Path, given: Option<DiskFormat>) -> Result<DiskFormat, Failure> {
    given
        .or_else(|| format_by_name(path))
        .ok_or_else(|| Failure::usage(unknown_format(path, "--format ")))
}

/// The URI, if this is one. A file whose name begins like a URI is written as `./nbd:...`.
fn nbd_uri(image: &str) -> Result<Option<NbdUri>, Failure> {
    if !["nbd:", "nbds:", "nbd+", "nbds+"].iter().any(|scheme| image.starts_with(scheme)) {
        return Ok(None);
    }
    let uri = image.parse().map_err(|error| Failure::usage(format!("{image}: {error}")))?;
    Ok(Some(uri))
}

pub(super) fn refused(path: &Path, error: OpenError) -> Failure {
    let error = brep_block::Error::from(error);
    let path = path.display().to_string();
    let named = error.node() == path;
    let failure = failed(error);
    if named { failure } else { failure.context(path) }
}
