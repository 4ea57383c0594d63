//! `brep image`: what files and exports hold, without a pair around them.
pub(crate) mod check;
pub(crate) mod compare;
mod connecting;
pub(crate) mod create;
pub(crate) mod info;
mod source;

pub(crate) use connecting::Connecting;
pub(crate) use source::{Source, failed, nbd_uri, refused, stated_format, take_leave};

use brep_replication::config::DiskFormat;

/// The exit code of `image check` and `image compare` for a command line that makes no sense:
/// their other codes are taken by results.
pub(crate) const USAGE: u8 = 64;

fn format_name(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}
