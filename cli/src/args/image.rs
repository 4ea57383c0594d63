use std::path::PathBuf;

use brep_replication::config::DiskFormat;
use clap::{Args, Subcommand, ValueEnum};

use super::disk::parse_format;
use crate::units::parse_size;

/// Make, describe, check and compare disk images
#[derive(Debug, Args)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    pub(crate) command: ImageCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    Create(CreateArgs),
    Info(InfoArgs),
    Check(CheckArgs),
    Compare(CompareArgs),
}

/// Make an empty image
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  brep image create replica.qcow2 10G")]
pub(crate) struct CreateArgs {
    /// The file; it must not exist
    pub(crate) file: PathBuf,

    /// Size in bytes, with K, M, G, T for powers of 1024
    #[arg(value_parser = parse_size)]
    pub(crate) size: u64,

    /// raw or qcow2 [default: what the file's name says]
    #[arg(short, long, value_parser = parse_format)]
    pub(crate) format: Option<DiskFormat>,

    /// Cluster size of a qcow2 image
    #[arg(long, value_name = "SIZE", default_value = "64K", value_parser = parse_size)]
    pub(crate) cluster_size: u64,

    /// Use extended L2 entries: sub-clusters of a 32nd of a cluster
    #[arg(long)]
    pub(crate) extended_l2: bool,
}

/// Show what an image is
#[derive(Debug, Args)]
pub(crate) struct InfoArgs {
    /// A file, or an NBD URI
    pub(crate) image: String,

    /// raw or qcow2 [default: what the file's name says]
    #[arg(short, long, value_parser = parse_format)]
    pub(crate) format: Option<DiskFormat>,

    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Check the metadata of an image, and repair it if asked to
#[derive(Debug, Args)]
#[command(after_help = "\
Exit codes: 0 clean (or repaired), 1 the check could not be completed, 2 corrupt, 3 leaked
clusters only, 63 the format has nothing to check, 64 usage.")]
pub(crate) struct CheckArgs {
    /// The file
    pub(crate) file: PathBuf,

    /// raw or qcow2 [default: what the file's name says]
    #[arg(short, long, value_parser = parse_format)]
    pub(crate) format: Option<DiskFormat>,

    /// What to repair: leaked clusters, or everything
    #[arg(short, long, value_name = "WHAT")]
    pub(crate) repair: Option<Repair>,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Repair {
    Leaks,
    All,
}

/// Compare what two images hold
#[derive(Debug, Args)]
#[command(after_help = "\
An image is a file or an NBD URI. Beyond the end of the shorter one, zeroes count as equal, unless
--strict is given. Exit codes: 0 equal, 1 different, 2 an image could not be opened, 3 or 4 it
could not be read, 64 usage.

Examples:
  brep image compare disk.raw replica.qcow2
  brep image compare -f raw /dev/sdb nbd://127.0.0.1:10809/vda")]
pub(crate) struct CompareArgs {
    /// The first image
    pub(crate) first: String,

    /// The second image
    pub(crate) second: String,

    /// Format of the first image: raw or qcow2 [default: what the file's name says]
    #[arg(short = 'f', long, value_name = "FORMAT", value_parser = parse_format)]
    pub(crate) format: Option<DiskFormat>,

    /// Format of the second image
    #[arg(short = 'F', long, value_name = "FORMAT", value_parser = parse_format)]
    pub(crate) second_format: Option<DiskFormat>,

    /// Images of different sizes are different
    #[arg(short, long)]
    pub(crate) strict: bool,

    /// Print the result as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
