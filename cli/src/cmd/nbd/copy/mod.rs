//! `brep nbd copy`: what a disk holds, from one place to another.
mod stream;
mod target;

use std::sync::Arc;

use brep_block::{BlockDevice, CopyOptions, FlushLevel, copy_device};

use self::target::Target;
use crate::args::{CopyArgs, STREAM};
use crate::cmd::image::{Connecting, Source};
use crate::cmd::runtime::current_thread;
use crate::exit::{Failure, OK, Outcome};
use crate::output;

pub(crate) fn run(args: &CopyArgs) -> Outcome {
    args.check()?;
    let connecting = args.connecting();
    current_thread()?.block_on(async {
        match (args.source.as_str(), args.target.as_str()) {
            (STREAM, _) => from_stdin(args, &connecting).await,
            (_, STREAM) => to_stdout(args, &connecting).await,
            _ => between_disks(args, &connecting).await,
        }
    })?;
    Ok(OK)
}

async fn between_disks(args: &CopyArgs, connecting: &Connecting) -> Result<(), Failure> {
    let source = open_source(args, connecting).await?;
    let size = source.device.size();
    let target = Target::open(args, connecting, Some(size)).await?;
    let result = copy(args, &source.device, &target).await;
    let ended = target.end(result, args.no_flush).await;
    leave(&source).await;
    ended
}

async fn open_source(args: &CopyArgs, connecting: &Connecting) -> Result<Source, Failure> {
    let source = Source::open_with(&args.source, args.format, true, connecting).await?;
    note_single_connection(&args.source, &source, args.connections);
    Ok(source)
}

/// What was asked for and is not to be had is no failure, but nobody shall wonder about the speed.
fn note_single_connection(name: &str, source: &Source, wanted: usize) {
    if source.connections() < wanted && source.is_export() {
        tracing::info!("{name}: one connection, since the server does not offer several");
    }
}

async fn copy(
    args: &CopyArgs,
    source: &Arc<dyn BlockDevice>,
    target: &Target,
) -> Result<(), Failure> {
    let options = CopyOptions {
        requests_max: args.requests,
        request_len: args.request_size,
        target_is_zero: target.is_zero,
        allocate: args.allocated,
        sparse_len: args.sparse,
    };
    let bar = output::progress("copying");
    bar.set_length(source.size());
    let told = bar.clone();
    copy_device(source, target.device(), &options, move |len| told.inc(len)).await?;
    bar.finish_and_clear();
    let rest = target.device().size().saturating_sub(source.size());
    if rest > 0 && !target.is_zero {
        tracing::warn!(
            "{} is longer than {}: its last {rest} bytes stay as they were",
            args.target,
            args.source
        );
    }
    Ok(())
}

async fn from_stdin(args: &CopyArgs, connecting: &Connecting) -> Result<(), Failure> {
    let target = Target::open(args, connecting, None).await?;
    let bar = output::progress("copying");
    let result = stream::from_stdin(args, &target, &bar).await;
    bar.finish_and_clear();
    target.end(result, args.no_flush).await
}

async fn to_stdout(args: &CopyArgs, connecting: &Connecting) -> Result<(), Failure> {
    let source = open_source(args, connecting).await?;
    let bar = output::progress("copying");
    bar.set_length(source.device.size());
    let copied = stream::to_stdout(args, &source.device, &bar).await;
    bar.finish_and_clear();
    leave(&source).await;
    copied
}

/// Ends the use of what was only read.
async fn leave(source: &Source) {
    if let Err(failure) = source.close_to(FlushLevel::Process).await {
        tracing::debug!("{failure}");
    }
}
