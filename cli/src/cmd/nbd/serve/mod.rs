//! `brep nbd serve`: one image as an export.
mod captive;
mod contexts;
mod last_client;
mod pid_file;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use brep_block::{BlockDevice, Part};
use brep_nbd::server::{Export, Exports, Listener, Server, ServerConfig, StaticExports};
use brep_nbd::{Endpoint, NbdUri, TlsParameters};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use self::last_client::LastClient;
use self::pid_file::PidFile;
use crate::args::{ServeArgs, ServerTls};
use crate::cmd::image::Source;
use crate::cmd::runtime::{Workers, until_signal};
use crate::exit::{Failure, OK, Outcome};
use crate::{output, systemd};

/// How long clients may take to get their last answers when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// More do not serve a single file any faster.
const THREADS_MAX: usize = 8;

pub(crate) fn run(args: ServeArgs) -> Outcome {
    let tls = args.tls.server()?;
    let sockets = systemd::listen_fds()?;
    let place = match (&args.listen, &args.run, sockets.is_empty()) {
        (Some(_), _, false) => {
            return Err(Failure::usage(
                "--listen: the service manager has passed sockets already; leave one of the two out",
            ));
        }
        (None, Some(_), false) => {
            return Err(Failure::usage(
                "--run: a service manager that passes sockets has its own clients",
            ));
        }
        (Some(uri), _, true) => Place::At(args.tls.listener("--listen", uri.clone())?),
        (None, Some(_), true) => Place::Captive(captive::Place::new()?),
        (None, None, false) => Place::Passed(sockets),
        (None, None, true) => {
            return Err(Failure::usage(
                "where to listen? --listen URI, --run COMMAND, or a socket of the service manager",
            ));
        }
    };
    let (code, exit_code) = std::sync::mpsc::channel();
    until_signal("data", move |shutdown| async move {
        let ended = serve_until(args, place, tls, shutdown).await?;
        // The receiver lives as long as this function runs.
        let _ = code.send(ended);
        Ok::<_, Failure>(())
    })?;
    Ok(exit_code.try_recv().unwrap_or(OK))
}

/// Where clients connect.
enum Place {
    At(Endpoint),
    /// A socket in a directory of our own.
    Captive(captive::Place),
    /// Sockets that the service manager has opened.
    Passed(Vec<std::os::fd::OwnedFd>),
}

impl Place {
    async fn listeners(&mut self) -> Result<Vec<Listener>, Failure> {
        let endpoint = match self {
            Place::At(endpoint) => endpoint.clone(),
            Place::Captive(place) => place.endpoint(),
            Place::Passed(sockets) => {
                let adopted = sockets.drain(..).map(Listener::adopt);
                let adopted: Result<_, _> = adopted.collect();
                return Ok(adopted.context("LISTEN_FDS")?);
            }
        };
        Ok(vec![Server::bind(&endpoint).await.map_err(Failure::failed)?])
    }
}

/// Serves until something ends it, and returns the exit code.
async fn serve_until(
    args: ServeArgs,
    mut place: Place,
    tls: Option<ServerTls>,
    shutdown: CancellationToken,
) -> Result<u8, Failure> {
    let layers = layers(&args).await?;
    let source = &layers[0];
    let listeners = place.listeners().await?;
    for listener in &listeners {
        args.tls.check_open(listener.endpoint())?;
    }
    let required =
        |endpoint: &Endpoint| tls.as_ref().is_some_and(|tls| tls.is_required_at(endpoint));
    let listeners = listeners.into_iter().map(|listener| match required(listener.endpoint()) {
        true => listener,
        false => listener.tls_optional(),
    });
    let listeners: Vec<Listener> = listeners.collect();
    let uris: Vec<NbdUri> = listeners
        .iter()
        .map(|listener| uri_of(&args, listener, required(listener.endpoint())))
        .collect();
    let allowed = tls.as_ref().and_then(|tls| tls.allowed_clients.clone());
    let export = export(&args, part(&args, source)?).allowed_subjects(allowed);
    let (exports, gone) = exports(&args, contexts::add(export, &args, &layers).await?);
    let workers = Workers::start(threads(&args, source) - 1, "data")?;
    let config = ServerConfig::default()
        .connections_max(args.max_connections)
        .runtimes([Handle::current()].into_iter().chain(workers.runtimes()).collect())
        .tls(tls.map(|tls| tls.server), true);
    let server = Server::new(exports, config);
    let _pid_file = args.pid_file.as_deref().map(PidFile::write).transpose()?;
    for listener in listeners {
        let server = Arc::clone(&server);
        tokio::spawn(async move { server.serve(listener).await });
    }
    if args.run.is_none() {
        for uri in &uris {
            output::note(&format!("serving {} as {uri}", args.file.display()))?;
        }
    }
    systemd::notify("READY=1");
    let code = match (&args.run, uris.first()) {
        (Some(command), Some(uri)) => captive::run(command, uri, &shutdown).await,
        _ => {
            tokio::select! {
                () = gone.cancelled() => {}
                () = shutdown.cancelled() => {}
            }
            Ok(OK)
        }
    };
    systemd::notify("STOPPING=1");
    server.shutdown(STOP_GRACE).await;
    drop(workers);
    source.close().await?;
    code
}

/// How many threads serve clients: a raw file gains by several, an image shares its metadata.
fn threads(args: &ServeArgs, source: &Source) -> usize {
    if source.qcow2().is_some() {
        return 1;
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.min(args.max_connections).clamp(1, THREADS_MAX)
}

/// The image, and what lies below it, from the top down.
async fn layers(args: &ServeArgs) -> Result<Vec<Source>, Failure> {
    let mut layers: Vec<Source> = Vec::new();
    for file in args.backing.iter().rev() {
        let below = layers.last().map(|layer| Arc::clone(&layer.device));
        layers.push(Source::open_over(file, None, true, args.cache, below).await?);
    }
    let below = layers.last().map(|layer| Arc::clone(&layer.device));
    let image = Source::open_over(&args.file, args.format, args.read_only, args.cache, below);
    layers.push(image.await?);
    layers.reverse();
    Ok(layers)
}

/// The disk, or the part of it that is wanted.
fn part(args: &ServeArgs, source: &Source) -> Result<Arc<dyn BlockDevice>, Failure> {
    let device = Arc::clone(&source.device);
    if args.offset == 0 && args.size.is_none() {
        return Ok(device);
    }
    let rest = device.size().saturating_sub(args.offset);
    let size = args.size.unwrap_or(rest);
    match Part::new(device, args.offset, size) {
        Ok(part) => Ok(part),
        Err(error) => Err(Failure::usage(format!("--offset, --size: {error}"))),
    }
}

fn export(args: &ServeArgs, device: Arc<dyn BlockDevice>) -> Export {
    Export::new(&args.export, device)
        .read_only(args.read_only)
        .resizable(args.resizable)
        .description(args.description.clone())
        .multi_conn(args.max_connections > 1)
}

/// What is served, and a token that is cancelled when the last client has gone, if that matters.
fn exports(args: &ServeArgs, export: Export) -> (Arc<dyn Exports>, CancellationToken) {
    let table = StaticExports::new();
    table.add(export);
    let gone = CancellationToken::new();
    match args.exit_with_last_client {
        true => (Arc::new(LastClient::new(table, gone.clone())), gone),
        false => (Arc::new(table), gone),
    }
}

fn uri_of(args: &ServeArgs, listener: &Listener, tls_required: bool) -> NbdUri {
    NbdUri {
        endpoint: listener.endpoint().clone(),
        export: args.export.clone(),
        tls: tls_required.then(TlsParameters::default),
    }
}
