//! What an export tells of its ranges besides `base:allocation`.
use std::path::Path;
use std::sync::Arc;

use brep_block::Io;
use brep_nbd::server::{ContextStatus, Export, MetaContext};
use brep_qcow2::{Bitmap, Qcow2};

use crate::args::ServeArgs;
use crate::cmd::image::Source;
use crate::exit::Failure;

/// Adds what was asked for. `layers`: the image, and what lies below it, from the top down.
pub(super) async fn add(
    mut export: Export,
    args: &ServeArgs,
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
        true => usable(image).await?,
        false => args.bitmaps.clone(),
    };
    for name in names {
        let Some(bitmap) = image.bitmap(&name).await? else {
            return Err(Failure::failed(missing(&args.file, image, &name).await?));
        };
        export = export.dirty_bitmap(&name, Arc::new(Dirty(bitmap)));
    }
    Ok(export)
}

/// All but those that nobody can use.
async fn usable(image: &Qcow2) -> Result<Vec<String>, Failure> {
    let bitmaps = image.bitmaps().await?;
    let (unusable, usable): (Vec<_>, Vec<_>) = bitmaps.into_iter().partition(|b| b.in_use);
    for bitmap in unusable {
        tracing::warn!("bitmap {:?} was left in use by its writer: left out", bitmap.name);
    }
    Ok(usable.into_iter().map(|bitmap| bitmap.name).collect())
}

async fn missing(file: &Path, image: &Qcow2, name: &str) -> Result<String, Failure> {
    let file = file.display();
    if image.info().bitmaps_outdated {
        return Ok(format!(
            "{file}: its bitmaps are outdated, because a program has written to it that does not \
             keep them"
        ));
    }
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
