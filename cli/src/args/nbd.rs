use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use brep_block::CacheMode;
use brep_nbd::NbdUri;
use brep_nbd::client::{ConnectOptions, ReconnectPolicy};
use brep_nbd::proto::wire::BASE_ALLOCATION;
use brep_nbd::tls::TlsClient;
use brep_replication::config::DiskFormat;
use clap::{Args, Subcommand};

use super::copy::CopyArgs;
use super::disk::{parse_cache, parse_format};
use super::export::ExportArg;
use super::security::{TlsFlags, tls_failure};
use crate::exit::Failure;
use crate::units::{parse_duration, parse_size};

/// Serve images over NBD, ask a server what it has, copy disks
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

/// Serve images until SIGTERM or SIGINT, or as long as something else says
#[derive(Debug, Args)]
#[command(after_help = "\
Several images are several exports. What a flag says then holds for each of them; what one has alone
stands behind its file, with the names of the flags: format=, cache=, description=, read-only, offset=,
size=, backing=, resizable, allocation-depth, bitmap=, all-bitmaps; and tls-required (not for those who
speak in the clear) and allow= (in the place of --tls-allow). A comma in a value is written twice.

Examples:
  brep nbd serve disk.raw --listen 'nbd+unix:///?socket=disk.sock'
  brep nbd serve disk.qcow2 --listen nbd://127.0.0.1:10809 --export vda --read-only
  brep nbd serve vda=root.qcow2 vdb=data.raw,read-only,description=Data --listen nbd://127.0.0.1
  brep nbd serve disk.raw --listen nbds://0.0.0.0 --tls-dir /etc/brep/tls
  brep nbd serve disk.qcow2 --run 'nbdinfo \"$uri\"'
  brep nbd serve disk.qcow2 --read-only --all-bitmaps --listen 'nbd+unix:///?socket=disk.sock'

A service manager's sockets (LISTEN_FDS) are served in the place of --listen.")]
pub(crate) struct ServeArgs {
    /// The file; or exports, each a name, a file, and what is said of it alone
    #[arg(value_name = "FILE | NAME=FILE[,OPTION]...", required = true)]
    images: Vec<PathBuf>,

    /// Where clients connect; by default, with --run a socket of its own, else the sockets that the
    /// service manager has passed
    #[arg(long, value_name = "URI")]
    pub(crate) listen: Option<NbdUri>,

    /// Name of the export; clients that name none get it too
    #[arg(long, value_name = "NAME", default_value = "")]
    export: String,

    /// A text for people, which clients are shown
    #[arg(short = 'D', long, value_name = "TEXT", default_value = "")]
    description: String,

    /// Accept no writes
    #[arg(short, long)]
    read_only: bool,

    /// Serve only a part of the disk: from here on
    #[arg(short, long, value_name = "SIZE", default_value = "0", value_parser = parse_size)]
    offset: u64,

    /// Length of the part [default: to the end]
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    size: Option<u64>,

    /// What lies below the image, where the image itself has nothing; below that, the next one. A
    /// name inside an image is never followed
    #[arg(long, value_name = "FILE")]
    backing: Vec<PathBuf>,

    /// Let clients change the size; a qcow2 image only grows
    #[arg(long)]
    resizable: bool,

    /// Tell clients in which layer content lies (qemu:allocation-depth)
    #[arg(short = 'A', long)]
    allocation_depth: bool,

    /// Tell clients what this persistent bitmap of the image says (qemu:dirty-bitmap:NAME)
    #[arg(short = 'B', long = "bitmap", value_name = "NAME")]
    bitmaps: Vec<String>,

    /// The same of all bitmaps of the image
    #[arg(long)]
    all_bitmaps: bool,

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

    /// When told to stop: how long requests in flight may take, and after them closing the images
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub(crate) stop_timeout: Duration,

    /// writeback: through the page cache; none: past it
    #[arg(long, value_name = "MODE", default_value = "writeback", value_parser = parse_cache)]
    cache: CacheMode,

    /// raw or qcow2 [default: what the file's name says]
    #[arg(short, long, value_parser = parse_format)]
    format: Option<DiskFormat>,

    #[command(flatten)]
    pub(crate) tls: TlsFlags,
}

impl ServeArgs {
    /// The images and how each is served: at least one, each with a name of its own.
    pub(crate) fn exports(&self) -> Result<Vec<ExportArg>, Failure> {
        let all = ExportArg {
            format: self.format,
            cache: self.cache,
            read_only: self.read_only,
            resizable: self.resizable,
            allocation_depth: self.allocation_depth,
            all_bitmaps: self.all_bitmaps,
            ..ExportArg::default()
        };
        let exports = match self.images.as_slice() {
            [file] if as_export(file).is_none() => vec![ExportArg {
                name: self.export.clone(),
                file: file.clone(),
                description: self.description.clone(),
                offset: self.offset,
                size: self.size,
                backing: self.backing.clone(),
                bitmaps: self.bitmaps.clone(),
                ..all
            }],
            images => self.named(images, &all)?,
        };
        let mut names = BTreeSet::new();
        for export in &exports {
            export.check().map_err(Failure::usage)?;
            if export.is_for_tls_only() && !self.tls.is_on() {
                let file = export.file.display();
                return Err(Failure::usage(format!(
                    "{file}: tls-required and allow= need --tls-dir DIR"
                )));
            }
            if !names.insert(&export.name) {
                return Err(Failure::usage(format!("two exports have the name {:?}", export.name)));
            }
        }
        Ok(exports)
    }

    fn named(&self, images: &[PathBuf], all: &ExportArg) -> Result<Vec<ExportArg>, Failure> {
        let of_one = [
            ("--export", !self.export.is_empty()),
            ("--description", !self.description.is_empty()),
            ("--offset", self.offset > 0),
            ("--size", self.size.is_some()),
            ("--backing", !self.backing.is_empty()),
            ("--bitmap", !self.bitmaps.is_empty()),
        ];
        if let Some((flag, _)) = of_one.iter().find(|(_, given)| *given) {
            return Err(Failure::usage(format!(
                "{flag}: which of the exports is meant? Write it behind the file: \
                 NAME=FILE,size=1G,description=TEXT"
            )));
        }
        let parse = |image: &PathBuf| {
            let Some(text) = as_export(image) else {
                let file = image.display();
                return Err(Failure::usage(format!(
                    "{file}: several exports need names: NAME={file}"
                )));
            };
            ExportArg::parse(text, all).map_err(|why| Failure::usage(format!("{text}: {why}")))
        };
        images.iter().map(parse).collect()
    }
}

/// `NAME=FILE`, if it is that.
fn as_export(image: &Path) -> Option<&str> {
    image.to_str().filter(|text| ExportArg::is_named(text))
}

/// How a client connects.
#[derive(Debug, Args)]
pub(crate) struct ClientFlags {
    /// Use TLS, with the certificates in this directory where the URI names no tls-certificates
    #[arg(long, value_name = "DIR")]
    pub(super) tls_dir: Option<PathBuf>,

    /// How long an attempt to connect may take
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = parse_duration)]
    pub(crate) timeout: Duration,

    /// How long to go on trying to connect [default: one attempt]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    open_timeout: Option<Duration>,
}

impl ClientFlags {
    /// Reads what a client of this URI needs.
    pub(crate) fn tls(&self, uri: &NbdUri) -> Result<Option<TlsClient>, Failure> {
        let tls = TlsClient::for_uri(uri, self.tls_dir.as_deref());
        tls.map_err(|error| tls_failure("URI", uri, error))
    }

    /// How often to try.
    pub(crate) fn policy(&self) -> ReconnectPolicy {
        let open_timeout = self.open_timeout.unwrap_or_default();
        ReconnectPolicy { open_timeout, ..ReconnectPolicy::default() }
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
