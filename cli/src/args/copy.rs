use std::time::Duration;

use brep_nbd::client::ReconnectPolicy;
use brep_replication::config::DiskFormat;
use clap::Args;

use super::disk::parse_format;
use super::nbd::ClientFlags;
use crate::cmd::image::Connecting;
use crate::exit::Failure;
use crate::units::{parse_duration, parse_size};

/// What stands for standard input, and for standard output.
pub(crate) const STREAM: &str = "-";

/// Most bytes that the requests in flight may hold together.
const IN_FLIGHT_BYTES_MAX: u64 = 1 << 30;

/// Copy a disk: a file, a qcow2 image or an export, to another one
#[derive(Debug, Args)]
#[command(after_help = "\
A file that is copied to is made anew: what it held is gone. An export, a block device, and with
--no-create a file, is written into as it is, and has to be at least as long. Exit code 0 means
that everything has arrived and is on stable storage.

Examples:
  brep nbd copy nbd://127.0.0.1/vda vda.qcow2
  brep nbd copy disk.raw nbd://10.0.0.2/vda --connections 8
  brep nbd copy nbd://127.0.0.1/vda - | zstd > vda.raw.zst")]
pub(crate) struct CopyArgs {
    /// A file, an NBD URI, or - for standard input
    #[arg(value_name = "SOURCE")]
    pub(crate) source: String,

    /// A file, an NBD URI, or - for standard output
    #[arg(value_name = "DESTINATION")]
    pub(crate) target: String,

    /// Format of the source: raw or qcow2 [default: what the file's name says]
    #[arg(short = 'f', long, value_name = "FORMAT", value_parser = parse_format)]
    pub(crate) format: Option<DiskFormat>,

    /// Format of the destination
    #[arg(short = 'O', long = "output-format", value_name = "FORMAT", value_parser = parse_format)]
    pub(crate) target_format: Option<DiskFormat>,

    /// The destination is there: write into it, and leave what lies beyond the source as it is
    #[arg(short = 'n', long)]
    pub(crate) no_create: bool,

    /// Connections to each server, where it offers several
    #[arg(short = 'C', long, value_name = "COUNT", default_value = "4", value_parser = parse_connections)]
    pub(crate) connections: usize,

    /// Requests in flight at a time
    #[arg(short = 'R', long, value_name = "COUNT", default_value = "64", value_parser = parse_requests)]
    pub(crate) requests: usize,

    /// Length of a request
    #[arg(long, value_name = "SIZE", default_value = "256K", value_parser = parse_request_size)]
    pub(crate) request_size: u32,

    /// Zeroes of this length are not written as data; 0: only what the source says of itself
    #[arg(short = 'S', long, value_name = "SIZE", default_value = "4K", value_parser = parse_sparse)]
    pub(crate) sparse: u32,

    /// The destination reads as zeroes all over: do not write zeroes
    #[arg(long, conflicts_with = "allocated")]
    pub(crate) destination_is_zero: bool,

    /// Zeroes occupy space in the destination
    #[arg(long)]
    pub(crate) allocated: bool,

    /// Do not wait until everything is on stable storage
    #[arg(long)]
    pub(crate) no_flush: bool,

    /// How long a server may take for a request
    #[arg(long, value_name = "DURATION", default_value = "60s", value_parser = parse_duration)]
    request_timeout: Duration,

    /// If a connection is lost: how long to try to get another one, and to send again over it what was
    /// not answered [default: not at all]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    reconnect_delay: Option<Duration>,

    #[command(flatten)]
    client: ClientFlags,
}

impl CopyArgs {
    /// Refuses what makes no sense together.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let bytes = self.requests as u64 * u64::from(self.request_size);
        if bytes > IN_FLIGHT_BYTES_MAX {
            return Err(Failure::usage(
                "--requests times --request-size: more than 1 GiB would be in flight",
            ));
        }
        if self.source == STREAM && self.target == STREAM {
            return Err(Failure::usage("from - to -: that is what cat does"));
        }
        let streams = [(&self.source, self.format), (&self.target, self.target_format)];
        for (place, format) in streams {
            if place == STREAM && format == Some(DiskFormat::Qcow2) {
                return Err(Failure::usage("-: what is copied through a pipe is raw"));
            }
        }
        Ok(())
    }

    /// How servers are connected to.
    pub(crate) fn connecting(&self) -> Connecting {
        Connecting {
            tls_dir: self.client.tls_dir.clone(),
            connect_timeout: self.client.timeout,
            request_timeout: self.request_timeout,
            policy: ReconnectPolicy {
                delay: self.reconnect_delay.unwrap_or_default(),
                ..self.client.policy()
            },
            connections: self.connections,
            in_flight_max: self.requests,
            in_flight_bytes_max: self.requests as u64 * u64::from(self.request_size),
        }
    }
}

fn parse_count(text: &str, max: usize) -> Result<usize, String> {
    match text.parse() {
        Ok(count) if (1..=max).contains(&count) => Ok(count),
        _ => Err(format!("a number from 1 to {max}")),
    }
}

fn parse_connections(text: &str) -> Result<usize, String> {
    parse_count(text, 64)
}

fn parse_requests(text: &str) -> Result<usize, String> {
    parse_count(text, 1024)
}

fn parse_request_size(text: &str) -> Result<u32, String> {
    match parse_size(text)? {
        size if size.is_power_of_two() && (4 << 10..=32 << 20).contains(&size) => Ok(size as u32),
        _ => Err("a power of two from 4K to 32M, such as 256K".into()),
    }
}

fn parse_sparse(text: &str) -> Result<u32, String> {
    match parse_size(text)? {
        0 => Ok(0),
        size if size.is_power_of_two() && (512..=32 << 20).contains(&size) => Ok(size as u32),
        _ => Err("a power of two from 512 to 32M, such as 64K, or 0".into()),
    }
}
