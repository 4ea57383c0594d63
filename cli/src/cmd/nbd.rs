//! `brep nbd`: one image as an export, and what a server offers.
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use brep_nbd::client::{describe_export, list_exports};
use brep_nbd::proto::client::{ExportInfo, Outcome as Handshake};
use brep_nbd::proto::wire::TransmissionFlags;
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use brep_nbd::tls::TlsClient;
use brep_nbd::{Endpoint, NbdUri, TlsParameters};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::image::Source;
use super::runtime::{current_thread, until_signal};
use crate::args::{NbdInfoArgs, ServeArgs, ServerTls, tls_failure};
use crate::exit::{Failure, OK, Outcome};
use crate::{output, units};

/// How long clients may take to get their last answers when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// Most exports that are described.
const EXPORTS_MAX: usize = 256;

pub(crate) fn serve(args: ServeArgs) -> Outcome {
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

pub(crate) fn info(args: NbdInfoArgs) -> Outcome {
    let uri = args.uri;
    let directory = args.tls_dir.as_deref();
    let tls = TlsClient::for_uri(&uri, directory).map_err(|e| tls_failure("URI", &uri, e))?;
    let tls = tls.as_ref();
    let exports: Vec<Value> = current_thread()?.block_on(async {
        let names = if uri.export.is_empty() {
            let listed = list_exports(&uri.endpoint, tls, args.timeout).await;
            listed.map(|exports| exports.into_iter().map(|export| export.name).collect())
        } else {
            Ok(vec![uri.export.clone()])
        };
        let mut names: Vec<String> = names.context("cannot ask for the exports")?;
        names.truncate(EXPORTS_MAX);
        let mut exports = Vec::new();
        for name in names {
            let (info, handshake) = describe_export(&uri.endpoint, tls, &name, args.timeout)
                .await
                .with_context(|| format!("export {name:?}"))?;
            exports.push(describe(&name, &info, &handshake));
        }
        Ok::<_, Failure>(exports)
    })?;
    if args.json {
        let server = uri.endpoint.to_string();
        output::json(&json!({ "server": server, "exports": exports }))?;
    } else if exports.is_empty() {
        output::line(&format!("{} has no exports", uri.endpoint))?;
    } else {
        exports.iter().try_for_each(|export| output::line(&text(export)))?;
    }
    Ok(OK)
}

const CAPABILITIES: [(TransmissionFlags, &str); 9] = [
    (TransmissionFlags::READ_ONLY, "read-only"),
    (TransmissionFlags::SEND_FLUSH, "flush"),
    (TransmissionFlags::SEND_FUA, "fua"),
    (TransmissionFlags::SEND_TRIM, "trim"),
    (TransmissionFlags::SEND_WRITE_ZEROES, "write-zeroes"),
    (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
    (TransmissionFlags::SEND_DF, "df"),
    (TransmissionFlags::SEND_CACHE, "cache"),
    (TransmissionFlags::CAN_MULTI_CONN, "multi-conn"),
];

fn describe(name: &str, info: &ExportInfo, handshake: &Handshake) -> Value {
    let offered = CAPABILITIES.iter().filter(|(flag, _)| info.flags.contains(*flag));
    let mut capabilities: Vec<&str> = offered.map(|(_, name)| *name).collect();
    if handshake.structured_replies {
        capabilities.push("structured-replies");
    }
    if handshake.allocation_context.is_some() {
        capabilities.push("base:allocation");
    }
    json!({
        "name": info.canonical_name.as_deref().unwrap_or(name),
        "size": info.size,
        "description": info.description,
        "capabilities": capabilities,
        "block-size-min": info.block_sizes.min,
        "block-size-preferred": info.block_sizes.preferred,
        "block-size-max": info.block_sizes.max,
    })
}

fn text(export: &Value) -> String {
    let number = |key: &str| export[key].as_u64().unwrap_or(0);
    let capabilities = export["capabilities"].as_array();
    let capabilities: Vec<&str> =
        capabilities.into_iter().flatten().filter_map(Value::as_str).collect();
    let mut text = format!(
        "export {}\n  size          {} ({} bytes)\n  block sizes   {} / {} / {} (least, best, most)\n  \
         capabilities  {}",
        export["name"],
        units::bytes(number("size")),
        number("size"),
        units::bytes(number("block-size-min")),
        units::bytes(number("block-size-preferred")),
        units::bytes(number("block-size-max")),
        capabilities.join(", "),
    );
    if let Some(description) = export["description"].as_str().filter(|text| !text.is_empty()) {
        text.push_str(&format!("\n  description   {}", description.escape_debug()));
    }
    text
}
