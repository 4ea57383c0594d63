use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, CacheMode, FlushLevel, RawFile, RawFileOptions};
use brep_nbd::NbdUri;
use brep_nbd::client::MultiConnection;
use brep_qcow2::{OpenError, OpenOptions, Qcow2};
use brep_replication::config::DiskFormat;

use super::{Connecting, format_name};
use crate::args::{format_by_name, unknown_format};
use crate::exit::{self, Failure};

const LEAVE_TIMEOUT: Duration = Duration::from_secs(1);

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
    Export(Arc<MultiConnection>),
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
        Self::open_with(image, format, read_only, &Connecting::default()).await
    }

    /// As [`open`](Self::open); `connecting` says how, if it is an export.
    pub(crate) async fn open_with(
        image: &str,
        format: Option<DiskFormat>,
        read_only: bool,
        connecting: &Connecting,
    ) -> Result<Self, Failure> {
        match nbd_uri(image)? {
            Some(_) if format == Some(DiskFormat::Qcow2) => Err(Failure::usage(format!(
                "{image}: an export holds a disk, so its format is raw"
            ))),
            Some(uri) => {
                let connection = connecting.connect(&uri).await?;
                Ok(Source { device: Arc::clone(&connection) as _, kind: Kind::Export(connection) })
            }
            None => {
                Self::open_file(Path::new(image), format, read_only, CacheMode::default()).await
            }
        }
    }

    /// What a raw file holds that is open.
    pub(crate) fn of_raw(file: Arc<dyn BlockDevice>) -> Self {
        Source { device: file, kind: Kind::Raw }
    }

    /// What an image holds that is open.
    pub(crate) fn of_qcow2(image: Arc<Qcow2>) -> Self {
        Source { device: Arc::clone(&image) as _, kind: Kind::Qcow2(image) }
    }

    /// Opens a file.
    pub(crate) async fn open_file(
        path: &Path,
        format: Option<DiskFormat>,
        read_only: bool,
        cache: CacheMode,
    ) -> Result<Self, Failure> {
        Self::open_over(path, format, read_only, cache, None).await
    }

    /// Opens a file; where it has nothing itself, what lies below counts.
    pub(crate) async fn open_over(
        path: &Path,
        format: Option<DiskFormat>,
        read_only: bool,
        cache: CacheMode,
        below: Option<Arc<dyn BlockDevice>>,
    ) -> Result<Self, Failure> {
        let options = OpenOptions { read_only, backing: below, ..OpenOptions::default() };
        Self::open_image(path, format, options, cache).await
    }

    /// Opens an image to say what it is: one that lacks its backing file can be described, though
    /// not read.
    pub(super) async fn describe(image: &str, format: Option<DiskFormat>) -> Result<Self, Failure> {
        if nbd_uri(image)?.is_some() {
            return Self::open(image, format, true).await;
        }
        let options =
            OpenOptions { read_only: true, ignore_backing_name: true, ..OpenOptions::default() };
        Self::open_image(Path::new(image), format, options, CacheMode::default()).await
    }

    async fn open_image(
        path: &Path,
        format: Option<DiskFormat>,
        options: OpenOptions,
        cache: CacheMode,
    ) -> Result<Self, Failure> {
        let format = stated_format(path, format)?;
        let file = open_raw(path, format, options.read_only, cache)?;
        if format == DiskFormat::Raw {
            if options.backing.is_some() {
                let path = path.display();
                return Err(Failure::usage(format!("{path}: nothing can lie below a raw image")));
            }
            return Ok(Self::of_raw(file));
        }
        let options = OpenOptions { name: path.display().to_string(), ..options };
        let image = Qcow2::open(file, options).await.map_err(|error| refused(path, error))?;
        Ok(Self::of_qcow2(image))
    }

    /// Writes everything out, onto stable storage.
    pub(crate) async fn close(&self) -> Result<(), Failure> {
        self.close_to(FlushLevel::Durable).await
    }

    /// Writes everything out, as far as `level` says, and takes leave of a server.
    pub(crate) async fn close_to(&self, level: FlushLevel) -> Result<(), Failure> {
        let flushed = self.device.flush(level).await;
        match &self.kind {
            Kind::Raw => {}
            Kind::Qcow2(image) if flushed.is_ok() => image.close().await?,
            Kind::Qcow2(_) => {}
            Kind::Export(connection) => take_leave(connection.disconnect()).await,
        }
        Ok(flushed?)
    }

    /// The name of the format; `nbd` for an export.
    pub(super) fn format(&self) -> &'static str {
        match self.kind {
            Kind::Raw => format_name(DiskFormat::Raw),
            Kind::Qcow2(_) => format_name(DiskFormat::Qcow2),
            Kind::Export(_) => "nbd",
        }
    }

    /// The image itself, if it is in qcow2 format.
    pub(crate) fn qcow2(&self) -> Option<&Arc<Qcow2>> {
        match &self.kind {
            Kind::Qcow2(image) => Some(image),
            Kind::Raw | Kind::Export(_) => None,
        }
    }

    /// Whether it is served by an NBD server.
    pub(crate) fn is_export(&self) -> bool {
        matches!(self.kind, Kind::Export(_))
    }

    /// Over how many connections it is reached.
    pub(crate) fn connections(&self) -> usize {
        match &self.kind {
            Kind::Export(connection) => connection.connections(),
            Kind::Raw | Kind::Qcow2(_) => 0,
        }
    }
}

/// Lets a server be told that we go. One that takes nothing any more is not waited for.
pub(crate) async fn take_leave(disconnecting: impl Future<Output = ()>) {
    if tokio::time::timeout(LEAVE_TIMEOUT, disconnecting).await.is_err() {
        tracing::debug!("the server does not take our leave");
    }
}

/// Opens the file itself, whatever it holds.
pub(super) fn open_raw(
    path: &Path,
    format: DiskFormat,
    read_only: bool,
    cache: CacheMode,
) -> Result<Arc<dyn BlockDevice>, Failure> {
    let growable = format == DiskFormat::Qcow2;
    let options = RawFileOptions { growable, read_only, cache, ..RawFileOptions::default() };
    let file = RawFile::open(path, options).map_err(failed)?;
    Ok(file)
}

/// What is wrong with a file is a failure, not a mistake in the command line.
pub(crate) fn failed(error: brep_block::Error) -> Failure {
    let failure = Failure::from(error);
    if failure.code == exit::USAGE { failure.with_code(exit::FAILED) } else { failure }
}

/// The format that was given, or that the file's name states.
pub(crate) fn stated_format(path: &Path, given: Option<DiskFormat>) -> Result<DiskFormat, Failure> {
    given
        .or_else(|| format_by_name(path))
        .ok_or_else(|| Failure::usage(unknown_format(path, "--format ")))
}

/// The URI, if this is one. A file whose name begins like a URI is written as `./nbd:...`.
pub(crate) fn nbd_uri(image: &str) -> Result<Option<NbdUri>, Failure> {
    if !["nbd:", "nbds:", "nbd+", "nbds+"].iter().any(|scheme| image.starts_with(scheme)) {
        return Ok(None);
    }
    let uri = image.parse().map_err(|error| Failure::usage(format!("{image}: {error}")))?;
    Ok(Some(uri))
}

pub(crate) fn refused(path: &Path, error: OpenError) -> Failure {
    let error = brep_block::Error::from(error);
    let path = path.display().to_string();
    let named = error.node() == path;
    let failure = failed(error);
    if named { failure } else { failure.context(path) }
}
