//! `brep image create`: an empty image.
use std::sync::Arc;

use brep_block::{BlockDevice, FlushLevel, RawFile, RawFileOptions};
use brep_qcow2::{CreateOptions, Qcow2};
use brep_replication::config::DiskFormat;

use super::format_name;
use super::source::{failed, refused, stated_format};
use crate::args::CreateArgs;
use crate::cmd::runtime::current_thread;
use crate::exit::{Failure, OK, Outcome};
use crate::{output, units};

pub(crate) fn run(args: &CreateArgs) -> Outcome {
    let format = stated_format(&args.file, args.format)?;
    let options = match format {
        DiskFormat::Raw if args.extended_l2 => {
            return Err(Failure::usage("--extended-l2: a raw image has no L2 entries"));
        }
        DiskFormat::Raw => None,
        DiskFormat::Qcow2 => Some(qcow2_options(args)?),
    };
    let file_size = if options.is_some() { 0 } else { args.size };
    let raw = RawFileOptions {
        create: Some(file_size),
        create_new: true,
        growable: options.is_some(),
        ..RawFileOptions::default()
    };
    let file: Arc<dyn BlockDevice> = RawFile::open(&args.file, raw).map_err(failed)?;
    if let Some(options) = options {
        let creating = async {
            Qcow2::create(&file, &options).await.map_err(|error| refused(&args.file, error))?;
            Ok::<_, Failure>(file.flush(FlushLevel::Durable).await?)
        };
        if let Err(failure) = current_thread()?.block_on(creating) {
            // Half an image is worse than none; the reason is what counts.
            let _ = std::fs::remove_file(&args.file);
            return Err(failure);
        }
    }
    let (name, size) = (args.file.display(), units::bytes(args.size));
    output::line(&format!("{name}: {}, {size}", format_name(format)))?;
    Ok(OK)
}

fn qcow2_options(args: &CreateArgs) -> Result<CreateOptions, Failure> {
    let cluster = args.cluster_size;
    if !cluster.is_power_of_two() || !(512..=2 << 20).contains(&cluster) {
        return Err(Failure::usage("--cluster-size: a power of two from 512 to 2M"));
    }
    if args.extended_l2 && cluster < 16 << 10 {
        return Err(Failure::usage("--extended-l2: needs clusters of at least 16K"));
    }
    if !args.size.is_multiple_of(512) {
        return Err(Failure::usage("the size of a qcow2 image is a multiple of 512 bytes"));
    }
    Ok(CreateOptions {
        cluster_bits: cluster.trailing_zeros(),
        extended_l2: args.extended_l2,
        ..CreateOptions::new(args.size)
    })
}
