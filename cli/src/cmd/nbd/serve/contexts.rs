//! What an export tells of its ranges besides `base:allocation`.
use std::path::Path;
use std::sync::Arc;

use brep_block::Io;
use brep_nbd::server::{ContextStatus, Export, MetaContext};
use brep_qcow2::{Bitmap, Qcow2};

use crate::args::ExportArg;
use crate::cmd::image::Source;
use crate::exit::Failure;

/// Most bitmaps that are offered without being named: a client asks for all of them in one request.
const BITMAPS_MAX: usize = 256;

/// Adds what was asked for. `layers`: the image, and what lies below it, from the top down.
pub(super) async fn add(
    mut export: Export,
    args: &ExportArg,
    layers: &[Source],
) -> Result<Export, Failure> {
    if args.allocation_depth {
        let layers = layers.iter().map(|layer| Arc::clone(&layer.device)).collect();
        export = export.allocation_depth(layers);
    }
    if args.bitmaps.is_empty() && !args.all_bitmaps {
        return Ok(export);
    }
    let Some(image) = layers.first().and_then(Source::qcow2) else {
        let file = args.file.display();
        return Err(Failure::usage(format!("{file}: only a qcow2 image can have bitmaps")));
    };
    let names = match args.all_bitmaps {
        true => usable(&args.file, image).await?,
        false => args.bitmaps.clone(),
    };
    let bitmaps = image.open_bitmaps(&names).await?;
    for (name, bitmap) in names.iter().zip(bitmaps) {
        let Some(bitmap) = bitmap else {
            return Err(Failure::failed(missing(&args.file, image, name).await?));
        };
        export = export.dirty_bitmap(name, Arc::new(Dirty(bitmap)));
    }
    Ok(export)
}

/// All but those that nobody can use.
async fn usable(file: &Path, image: &Qcow2) -> Result<Vec<String>, Failure> {
    if image.info().bitmaps_outdated {
        tracing::warn!("{}", outdated(file));
    }
    let bitmaps = image.bitmaps().await?;
    let (unusable, usable): (Vec<_>, Vec<_>) = bitmaps.into_iter().partition(|b| b.in_use);
    if usable.len() > BITMAPS_MAX {
        return Err(Failure::failed(format!(
            "{}: it has {} bitmaps, and at most {BITMAPS_MAX} are served together; name those that \
             are wanted with --bitmap",
            file.display(),
            usable.len()
        )));
    }
    for bitmap in unusable {
        tracing::warn!("bitmap {:?} was left in use by its writer: left out", bitmap.name);
    }
    Ok(usable.into_iter().map(|bitmap| bitmap.name).collect())
}

fn outdated(file: &Path) -> String {
    format!(
        "{}: its bitmaps are outdated, because a program has written to it that does not keep them",
        file.display()
    )
}

async fn missing(file: &Path, image: &Qcow2, name: &str) -> Result<String, Failure> {
    if image.info().bitmaps_outdated {
        return Ok(outdated(file));
    }
    let file = file.display();
    let names: Vec<_> =
        image.bitmaps().await?.into_iter().map(|b| format!("{:?}", b.name)).collect();
    Ok(match names.as_slice() {
        [] => format!("{file}: no bitmap {name:?}: it has none at all"),
        names => format!("{file}: no bitmap {name:?}; it has {}", names.join(", ")),
    })
}

/// `qemu:dirty-bitmap:NAME`.
#[derive(Debug)]
struct Dirty(Arc<Bitmap>);

impl MetaContext for Dirty {
    fn status(&self, offset: u64, len: u64) -> Io<'_, ContextStatus> {
        Io::future(async move {
            let (len, is_dirty) = self.0.status(offset, len).await?;
            Ok(ContextStatus { len, flags: is_dirty.into() })
        })
    }
}
