use std::path::{Path, PathBuf};
use std::sync::Arc;

use brep_block::{BlockDevice, Part};
use brep_nbd::server::{Export, StaticExports};
use brep_nbd::{Endpoint, NbdUri, TlsParameters};

use super::contexts;
use crate::args::ExportArg;
use crate::cmd::image::Source;
use crate::exit::Failure;

/// Images that are open, each to be one export.
pub(super) struct Served(Vec<Image>);

struct Image {
    args: ExportArg,
    /// The image, and what lies below it, from the top down.
    layers: Vec<Source>,
}

impl Served {
    /// At least one.
    pub(super) async fn open(exports: Vec<ExportArg>) -> Result<Self, Failure> {
        let mut images = Vec::new();
        for args in exports {
            let layers = layers(&args).await?;
            images.push(Image { args, layers });
        }
        Ok(Served(images))
    }

    /// The exports, for everybody who is allowed in, where nothing else is said of one.
    pub(super) async fn exports(
        &self,
        allowed: Option<&Arc<[String]>>,
        multi_conn: bool,
    ) -> Result<StaticExports, Failure> {
        let table = StaticExports::new();
        for Image { args, layers } in &self.0 {
            let export = Export::new(&args.name, part(args, &layers[0])?)
                .read_only(args.read_only)
                .resizable(args.resizable)
                .description(&args.description)
                .multi_conn(multi_conn)
                .tls_required(args.tls_required)
                .allowed_subjects(args.allowed.as_ref().or(allowed).cloned());
            table.add(contexts::add(export, args, layers).await?);
        }
        Ok(table)
    }

    /// Each file, and where it is to be had.
    pub(super) fn uris(&self, endpoint: &Endpoint, tls_required: bool) -> Vec<(PathBuf, NbdUri)> {
        let uri = |Image { args, .. }: &Image| {
            let tls = tls_required || args.is_for_tls_only();
            let uri = NbdUri {
                endpoint: endpoint.clone(),
                export: args.name.clone(),
                tls: tls.then(TlsParameters::default),
            };
            (args.file.clone(), uri)
        };
        self.0.iter().map(uri).collect()
    }

    /// Whether there is one that is not just a file.
    pub(super) fn has_images(&self) -> bool {
        self.0.iter().any(|image| image.layers[0].qcow2().is_some())
    }

    /// Closes all of them. The first failure is what counts, and keeps none of the others open.
    pub(super) async fn close(&self) -> Result<(), Failure> {
        let mut result = Ok(());
        for image in &self.0 {
            let closed = image.layers[0].close().await;
            match &closed {
                Err(failure) if result.is_err() => tracing::error!("{failure}"),
                _ => result = result.and(closed),
            }
        }
        result
    }
}

async fn layers(args: &ExportArg) -> Result<Vec<Source>, Failure> {
    let open = async |file: &Path, format, read_only, above: &[Source]| {
        let below = above.last().map(|layer| Arc::clone(&layer.device));
        Source::open_over(file, format, read_only, args.cache, below).await
    };
    let mut layers: Vec<Source> = Vec::new();
    for file in args.backing.iter().rev() {
        layers.push(open(file, None, true, &layers).await?);
    }
    layers.push(open(&args.file, args.format, args.read_only, &layers).await?);
    layers.reverse();
    Ok(layers)
}

/// The disk, or the part of it that is wanted.
fn part(args: &ExportArg, source: &Source) -> Result<Arc<dyn BlockDevice>, Failure> {
    let device = Arc::clone(&source.device);
    if args.offset == 0 && args.size.is_none() {
        return Ok(device);
    }
    let rest = device.size().saturating_sub(args.offset);
    let size = args.size.unwrap_or(rest);
    match Part::new(device, args.offset, size) {
        Ok(part) => Ok(part),
        Err(error) => Err(Failure::usage(format!("offset, size: {error}"))),
    }
}
