//! `brep nbd serve`: one image as an export.
use std::sync::Arc;
use std::time::Duration;

use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use brep_nbd::{Endpoint, NbdUri, TlsParameters};
use tokio_util::sync::CancellationToken;

use crate::args::{ServeArgs, ServerTls};
use crate::cmd::image::Source;
use crate::cmd::runtime::until_signal;
use crate::exit::{Failure, OK, Outcome};
use crate::output;

/// How long clients may take to get their last answers when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(10);

pub(crate) fn run(args: ServeArgs) -> Outcome {
    let endpoint = args.tls.listener("--listen", args.listen.clone())?;
    let tls = args.tls.server()?;
    until_signal("data", move |shutdown| serve_until(args, endpoint, tls, shutdown))?;
    Ok(OK)
}

async fn serve_until(
    args: ServeArgs,
    endpoint: Endpoint,
    tls: Option<ServerTls>,
    shutdown: CancellationToken,
) -> Result<(), Failure> {
    let source = Source::open_file(&args.file, args.format, args.read_only).await?;
    let exports = Arc::new(StaticExports::new());
    let export = Export::new(&args.export, Arc::clone(&source.device));
    let export = export.read_only(args.read_only).multi_conn(true);
    let allowed = tls.as_ref().and_then(|tls| tls.allowed_clients.clone());
    exports.add(export.allowed_subjects(allowed));
    let required = tls.as_ref().is_some_and(|tls| tls.is_required_at(&endpoint));
    let config = ServerConfig::default().tls(tls.map(|tls| tls.server), required);
    let server = Server::new(exports, config);
    let listener = Server::bind(&endpoint).await.map_err(Failure::failed)?;
    let uri = NbdUri {
        endpoint: listener.endpoint().clone(),
        export: args.export,
        tls: required.then(TlsParameters::default),
    };
    output::line(&format!("serving {} as {uri}", args.file.display()))?;
    tokio::select! {
        () = server.serve(listener) => {}
        () = shutdown.cancelled() => {}
    }
    server.shutdown(STOP_GRACE).await;
    source.close().await
}
