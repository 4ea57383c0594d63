//! `brep nbd resize`: another size for an export.
use anyhow::Context;
use brep_block::{BlockDevice, FlushLevel};
use brep_nbd::client::{ConnectOptions, Connection};

use crate::args::{NbdResizeArgs, NewSize};
use crate::cmd::image::take_leave;
use crate::cmd::runtime::current_thread;
use crate::exit::{Failure, OK, Outcome};
use crate::{output, units};

pub(crate) fn run(args: &NbdResizeArgs) -> Outcome {
    let tls = args.client.tls(&args.uri)?;
    let options = ConnectOptions { tls, ..args.client.options(&args.uri) };
    let size = current_thread()?.block_on(async {
        let connect = async || Connection::connect(&options).await;
        let disk = args.client.policy().attempt(connect).await.context("cannot open the export")?;
        let resized = resize(args, &disk).await;
        take_leave(disk.disconnect()).await;
        resized
    })?;
    output::line(&format!("{}: {} ({size} bytes)", args.uri, units::bytes(size)))?;
    Ok(OK)
}

async fn resize(args: &NbdResizeArgs, disk: &Connection) -> Result<u64, Failure> {
    let old = disk.size();
    let size = match args.size {
        NewSize::To(size) => size,
        NewSize::By(more) => old.saturating_add(more),
    };
    if size < old && !args.shrink {
        return Err(Failure::usage(format!(
            "{}: has {old} bytes, and what lies beyond {size} would be lost: give --shrink if \
             that is meant",
            args.uri
        )));
    }
    disk.truncate(size).await?;
    disk.flush(FlushLevel::Durable).await?;
    Ok(size)
}
