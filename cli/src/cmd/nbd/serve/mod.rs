//! `brep nbd serve`: images as exports.
mod captive;
mod contexts;
mod last_client;
mod pid_file;
mod served;

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use brep_nbd::Endpoint;
use brep_nbd::server::{Exports, Listener, Server, ServerConfig, StaticExports};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use self::last_client::LastClient;
use self::pid_file::PidFile;
use self::served::Served;
use crate::args::{ExportArg, ServeArgs, ServerTls};
use crate::cmd::runtime::{Workers, end_after, until_signal};
use crate::exit::{Failure, OK, Outcome};
use crate::{output, systemd};

/// How much longer than it may a stop may take.
const STOP_SLACK: Duration = Duration::from_secs(2);
/// More do not serve a single file any faster.
const THREADS_MAX: usize = 8;

pub(crate) fn run(args: ServeArgs) -> Outcome {
    let exports = args.exports()?;
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
        let ended = serve_until(args, exports, place, tls, shutdown).await?;
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
    exports: Vec<ExportArg>,
    mut place: Place,
    tls: Option<ServerTls>,
    shutdown: CancellationToken,
) -> Result<u8, Failure> {
    let served = Served::open(exports).await?;
    let listeners = place.listeners().await?;
    for listener in &listeners {
        args.tls.check_open(listener)?;
    }
    let required =
        |listener: &Listener| tls.as_ref().is_some_and(|tls| tls.is_required_at(listener));
    let listeners = listeners.into_iter().map(|listener| match required(&listener) {
        true => listener,
        false => listener.tls_optional(),
    });
    let listeners: Vec<Listener> = listeners.collect();
    let mut uris = Vec::new();
    let allowed = tls.as_ref().and_then(|tls| tls.allowed_clients.as_ref());
    for listener in &listeners {
        let inside_tls = allowed.is_some() || required(listener);
        uris.extend(served.uris(listener.endpoint(), inside_tls));
    }
    let table = served.exports(allowed, args.max_connections > 1).await?;
    let (exports, gone) = ending(&args, table);
    let workers = Workers::start(threads(&args, &served) - 1, "data")?;
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
        for (file, uri) in &uris {
            output::note(&format!("serving {} as {uri}", file.display()))?;
        }
    }
    systemd::notify("READY=1");
    let code = match (&args.run, uris.first()) {
        (Some(command), Some((_, uri))) => captive::run(command, uri, &shutdown).await,
        _ => {
            tokio::select! {
                () = gone.cancelled() => {}
                () = shutdown.cancelled() => {}
            }
            Ok(OK)
        }
    };
    systemd::notify("STOPPING=1");
    let pid_file = args.pid_file.clone();
    end_after(2 * args.stop_timeout + STOP_SLACK, move || {
        pid_file.as_deref().map(PidFile::remove);
    })?;
    server.shutdown(args.stop_timeout).await;
    drop(workers);
    served.close().await?;
    code
}

/// How many threads serve clients: raw files gain by several, an image shares its metadata.
fn threads(args: &ServeArgs, served: &Served) -> usize {
    if served.has_images() {
        return 1;
    }
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    processors.min(args.max_connections).clamp(1, THREADS_MAX)
}

/// What is served, and a token that is cancelled when the last client has gone, if that matters.
fn ending(args: &ServeArgs, table: StaticExports) -> (Arc<dyn Exports>, CancellationToken) {
    let gone = CancellationToken::new();
    match args.exit_with_last_client {
        true => (Arc::new(LastClient::new(table, gone.clone())), gone),
        false => (Arc::new(table), gone),
    }
}
