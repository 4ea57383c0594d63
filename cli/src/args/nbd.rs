use std::path::PathBuf;
use std::time::Duration;

use brep_nbd::NbdUri;
use brep_nbd::proto::client::BASE_ALLOCATION;
use brep_nbd::tls::TlsClient;
use brep_replication::config::DiskFormat;
use clap::{Args, Subcommand};

use super::disk::parse_format;
use super::security::{TlsFlags, tls_failure};
use crate::exit::Failure;
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
    List(NbdListArgs),
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

/// How a client connects.
#[derive(Debug, Args)]
pub(crate) struct ClientFlags {
    /// Certificates for TLS, where the URI demands it and names no tls-certificates
    #[arg(long, value_name = "DIR")]
    tls_dir: Option<PathBuf>,

    /// How long to wait for the server
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,
}

impl ClientFlags {
    /// Reads what a client of this URI needs.
    pub(crate) fn tls(&self, uri: &NbdUri) -> Result<Option<TlsClient>, Failure> {
        let tls = TlsClient::for_uri(uri, self.tls_dir.as_deref());
        tls.map_err(|error| tls_failure("URI", uri, error))
    }
}

/// List the exports of an NBD server
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  brep nbd list nbd://127.0.0.1")]
pub(crate) struct NbdListArgs {
    /// The server; an export that the URI names does not matter
    pub(crate) uri: NbdUri,

    #[command(flatten)]
    pub(crate) client: ClientFlags,

    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show what an NBD server offers
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  brep nbd info nbd://127.0.0.1
  brep nbd info nbd://127.0.0.1/vda --map --totals
  brep nbd info nbd://127.0.0.1/vda --map=qemu:dirty-bitmap:nightly --json")]
pub(crate) struct NbdInfoArgs {
    /// The server, and an export; without one, all that the server lists
    pub(crate) uri: NbdUri,

    #[command(flatten)]
    pub(crate) client: ClientFlags,

    /// Print the size of the export in bytes, and nothing else
    #[arg(long, conflicts_with_all = ["map", "json"])]
    pub(crate) size: bool,

    /// Print the state of every range of the export in a meta context
    #[arg(
        long,
        value_name = "CONTEXT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = BASE_ALLOCATION
    )]
    pub(crate) map: Option<String>,

    /// Together with --map: add the ranges up
    #[arg(long, requires = "map")]
    pub(crate) totals: bool,

    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
}
