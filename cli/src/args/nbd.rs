use std::path::PathBuf;
use std::time::Duration;

use brep_block::CacheMode;
use brep_nbd::NbdUri;
use brep_nbd::client::ConnectOptions;
use brep_nbd::proto::wire::{BASE_ALLOCATION, STRING_LEN_MAX};
use brep_nbd::tls::TlsClient;
use brep_replication::config::DiskFormat;
use clap::{Args, Subcommand};

use super::copy::CopyArgs;
use super::disk::{parse_cache, parse_format};
use super::security::{TlsFlags, tls_failure};
use crate::exit::Failure;
use crate::units::{parse_duration, parse_size};

/// Serve an image over NBD, ask a server what it has, copy disks
#[derive(Debug, Args)]
pub(crate) struct NbdArgs {
    #[command(subcommand)]
    pub(crate) command: NbdCommand,
}

#[derive(Debug, Subcommand)]
pub(crate) enum NbdCommand {
    Serve(Box<ServeArgs>),
    Info(NbdInfoArgs),
    List(NbdListArgs),
    Resize(NbdResizeArgs),
    Copy(CopyArgs),
}

/// Serve an image until SIGTERM or SIGINT, or as long as something else says
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  brep nbd serve disk.raw --listen 'nbd+unix:///?socket=disk.sock'
  brep nbd serve disk.qcow2 --listen nbd://127.0.0.1:10809 --export vda --read-only
  brep nbd serve disk.raw --listen nbds://0.0.0.0 --tls-dir /etc/brep/tls
  brep nbd serve disk.qcow2 --run 'nbdinfo \"$uri\"'
  brep nbd serve disk.qcow2 --read-only --all-bitmaps --listen 'nbd+unix:///?socket=disk.sock'

A service manager's sockets (LISTEN_FDS) are served in the place of --listen.")]
pub(crate) struct ServeArgs {
    /// The file
    pub(crate) file: PathBuf,

    /// Where clients connect; by default, with --run a socket of its own, else the sockets that the
    /// service manager has passed
    #[arg(long, value_name = "URI")]
    pub(crate) listen: Option<NbdUri>,

    /// Name of the export; clients that name none get it too
    #[arg(long, value_name = "NAME", default_value = "", value_parser = parse_string)]
    pub(crate) export: String,

    /// A text for people, which clients are shown
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "", value_parser = parse_string)]
    pub(crate) description: String,

    /// Accept no writes
    #[arg(short, long)]
    pub(crate) read_only: bool,

    /// Serve only a part of the disk: from here on
    #[arg(short, long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    pub(crate) offset: u64,

    /// Length of the part [default: to the end]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub(crate) size: Option<u64>,

    /// What lies below the image, where the image itself has nothing; below that, the next one. A
    /// name inside an image is never followed
    #[arg(long = "backing", value_name = "FILE")]
    pub(crate) backing: Vec<PathBuf>,

    /// Let clients change the size; a qcow2 image only grows
    #[arg(long, conflicts_with_all = ["read_only", "offset", "size"])]
    pub(crate) resizable: bool,

    /// Tell clients in which layer content lies (qemu:allocation-depth)
    #[arg(short = 'A', long, conflicts_with_all = ["offset", "size"])]
    pub(crate) allocation_depth: bool,

    /// Tell clients what this persistent bitmap of the image says (qemu:dirty-bitmap:NAME)
    #[arg(
        short = 'B',
        long = "bitmap",
        value_name = "NAME",
        requires = "read_only",
        conflicts_with_all = ["offset", "size"]
    )]
    pub(crate) bitmaps: Vec<String>,

    /// The same of all bitmaps of the image
    #[arg(long, requires = "read_only", conflicts_with_all = ["offset", "size", "bitmaps"])]
    pub(crate) all_bitmaps: bool,

    /// Connections at a time; further ones wait. With 1 clients are not offered several
    #[arg(
        short = 'e',
        long,
        value_name = "COUNT",
        default_value = "1024",
        value_parser = parse_max_connections
    )]
    pub(crate) max_connections: usize,

    /// End when the last client has gone
    #[arg(long)]
    pub(crate) exit_with_last_client: bool,

    /// Run a command in a shell, end with it, and with its exit code
    ///
    /// In its environment are uri, exportname, and unixsocket or port.
    #[arg(long, value_name = "COMMAND", conflicts_with = "exit_with_last_client")]
    pub(crate) run: Option<String>,

    /// A file that gets the number of the process once clients can connect
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,

    /// writeback: through the page cache; none: past it
    #[arg(long, value_name = "MODE", default_value = "writeback", value_parser = parse_cache)]
    pub(crate) cache: CacheMode,

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
    pub(super) tls_dir: Option<PathBuf>,

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

    /// How to open an export, apart from TLS.
    pub(crate) fn options(&self, uri: &NbdUri) -> ConnectOptions {
        ConnectOptions {
            name: uri.to_string(),
            connect_timeout: self.timeout,
            ..ConnectOptions::new(uri.endpoint.clone(), uri.export.clone())
        }
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
  brep nbd info nbd://127.0.0.1/vda --map --map=qemu:dirty-bitmap:nightly --json")]
pub(crate) struct NbdInfoArgs {
    /// The server, and an export; without one, all that the server lists
    pub(crate) uri: NbdUri,

    #[command(flatten)]
    pub(crate) client: ClientFlags,

    /// Print the size of the export in bytes, and nothing else
    #[arg(long, conflicts_with_all = ["map", "json"])]
    pub(crate) size: bool,

    /// Print the state of every range of the export in a meta context; repeated, in several at once
    #[arg(
        long,
        value_name = "CONTEXT",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = BASE_ALLOCATION,
        action = clap::ArgAction::Append
    )]
    pub(crate) map: Vec<String>,

    /// Together with --map: add the ranges up
    #[arg(long, requires = "map")]
    pub(crate) totals: bool,

    /// Print it as JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Change the size of an export, where the server lets clients do that
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  brep nbd resize nbd://127.0.0.1/vda 20G")]
pub(crate) struct NbdResizeArgs {
    /// The export
    pub(crate) uri: NbdUri,

    /// Its new size; with a + before it, by how much it grows
    #[arg(value_parser = parse_new_size)]
    pub(crate) size: NewSize,

    /// Let it become smaller: what lies beyond its new end is lost
    #[arg(long)]
    pub(crate) shrink: bool,

    #[command(flatten)]
    pub(crate) client: ClientFlags,
}

/// In bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NewSize {
    To(u64),
    By(u64),
}

fn parse_new_size(text: &str) -> Result<NewSize, String> {
    match text.strip_prefix('+') {
        Some(more) => parse_size(more).map(NewSize::By),
        None => parse_size(text).map(NewSize::To),
    }
}

fn parse_max_connections(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=65_536).contains(&count) => Ok(count),
        _ => Err("a number from 1 to 65536".into()),
    }
}

fn parse_string(text: &str) -> Result<String, String> {
    match text.len() {
        0..=STRING_LEN_MAX => Ok(text.to_owned()),
        len => Err(format!("{len} bytes; at most {STRING_LEN_MAX} can be sent")),
    }
}
