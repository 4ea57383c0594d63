use std::path::PathBuf;
use std::time::Duration;

use brep_nbd::NbdUri;
use brep_replication::config::DiskFormat;
use clap::{Args, Subcommand};

use super::disk::parse_format;
use super::security::TlsFlags;
use crate::units::parse_duration;

/// Serve an image over NBD, or ask a server what it has
#[derive(Debug, Args)]
pub(crate) struct NbdArgs {
    #[command(subcommand)]
    pub(crate) command: NbdCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NbdCommand {
    Serve(ServeArgs),
    Info(NbdInfoArgs),
}

/// Serve an image until SIGTERM or SIGINT
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  brep nbd serve disk.raw --listen 'nbd+unix:///?socket=disk.sock'
  brep nbd serve disk.qcow2 --listen nbd://127.0.0.1:10809 --export vda --read-only
  brep nbd serve disk.raw --listen nbds://0.0.0.0 --tls-dir /etc/brep/tls")]
pub(crate) struct ServeArgs {
    /// The file
    pub(crate) file: PathBuf,

    /// Where clients connect
    #[arg(long, value_name = "URI")]
    pub(crate) listen: NbdUri,

    /// Name of the export; clients that name none get it too
    #[arg(long, value_name = "NAME", default_value = "")]
    pub(crate) export: String,

    /// Accept no writes
    #[arg(long)]
    pub(crate) read_only: bool,

    /// raw or qcow2 [default: what the file's name says]
    #[arg(short, long, value_parser = parse_format)]
    pub(crate) format: Option<DiskFormat>,

    #[command(flatten)]
    pub(crate) tls: TlsFlags,
}

/// Show what an NBD server offers
#[derive(Debug, Args)]
pub(crate) struct NbdInfoArgs {
    /// The server, and an export
    pub(crate) uri: NbdUri,

    /// Certificates for TLS, where the URI demands it and names no tls-certificates
    #[arg(long, value_name = "DIR")]
    pub(crate) tls_dir: Option<PathBuf>,

    /// How long to wait for the server
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,

    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
