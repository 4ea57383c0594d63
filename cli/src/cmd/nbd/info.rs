//! `brep nbd info`: what a server says of its exports.
use anyhow::Context;
use brep_nbd::client::{ConnectOptions, Connection, describe_export, list_exports};
use brep_nbd::proto::client::{ExportInfo, Outcome as Handshake};
use brep_nbd::proto::wire::{TransmissionFlags, TransmissionMode};
use brep_nbd::tls::TlsClient;
use brep_nbd::{NbdUri, TlsParameters};
use serde_json::{Value, json};

use super::map;
use crate::args::NbdInfoArgs;
use crate::cmd::image::take_leave;
use crate::cmd::runtime::current_thread;
use crate::exit::{Failure, OK, Outcome};
use crate::{output, units};

/// Most exports that are described.
const EXPORTS_MAX: usize = 256;

pub(crate) fn run(args: &NbdInfoArgs) -> Outcome {
    let tls = args.client.tls(&args.uri)?;
    current_thread()?.block_on(async {
        match args.map.as_slice() {
            contexts @ [_, ..] => show_map(args, tls, contexts).await,
            [] if args.size => {
                let (info, _) = describe(args, tls.as_ref(), &args.uri.export).await?;
                output::line(&info.size.to_string())
            }
            [] => show(args, tls.as_ref()).await,
        }
    })?;
    Ok(OK)
}

async fn show_map(
    args: &NbdInfoArgs,
    tls: Option<TlsClient>,
    contexts: &[String],
) -> Result<(), Failure> {
    let options =
        ConnectOptions { contexts: contexts.to_vec(), tls, ..args.client.options(&args.uri) };
    let connect = async || Connection::connect(&options).await;
    let disk = args.client.policy().attempt(connect).await.context("cannot open the export")?;
    let has = |name: &String| disk.contexts().iter().any(|context| context.name == *name);
    let shown = match contexts.iter().find(|name| !has(name)) {
        None => map::show(&disk, args.totals, args.json).await,
        Some(context) => Err(Failure::failed(format!(
            "{}: the server has no meta context {context:?} for this export; `brep nbd info` \
             lists those that it has",
            args.uri
        ))),
    };
    take_leave(disk.disconnect()).await;
    shown
}

async fn describe(
    args: &NbdInfoArgs,
    tls: Option<&TlsClient>,
    name: &str,
) -> Result<(ExportInfo, Handshake), Failure> {
    let ask = async || describe_export(&args.uri.endpoint, tls, name, args.client.timeout).await;
    let described = args.client.policy().attempt(ask).await;
    Ok(described.with_context(|| format!("export {name:?}"))?)
}

async fn show(args: &NbdInfoArgs, tls: Option<&TlsClient>) -> Result<(), Failure> {
    let server = look(args, tls).await?;
    if args.json {
        return output::json(&server);
    }
    output::line(&server_text(&server))?;
    let exports = server["exports"].as_array().into_iter().flatten();
    exports.map(export_text).try_for_each(|text| output::line(&text))
}

/// A server, and what can be learned of its exports: one that refuses does not hide the others.
async fn look(args: &NbdInfoArgs, tls: Option<&TlsClient>) -> Result<Value, Failure> {
    let uri = &args.uri;
    let mut names = vec![uri.export.clone()];
    if uri.export.is_empty() {
        let list = async || list_exports(&uri.endpoint, tls, args.client.timeout).await;
        let listed = args.client.policy().attempt(list).await;
        let listed = listed.context("cannot ask for the exports")?;
        names = listed.into_iter().map(|export| export.name).collect();
        if names.len() > EXPORTS_MAX {
            tracing::warn!("{} exports: only the first {EXPORTS_MAX} are shown", names.len());
            names.truncate(EXPORTS_MAX);
        }
    }
    let mut exports = Vec::new();
    let mut mode = None;
    let mut failure = None;
    for name in names {
        match describe(args, tls, &name).await {
            Ok((info, handshake)) => {
                mode = Some(handshake.mode);
                let export = NbdUri {
                    endpoint: uri.endpoint.clone(),
                    export: name,
                    tls: tls.map(|_| TlsParameters::default()),
                };
                exports.push(export_json(&export, &info, &handshake));
            }
            Err(error) => {
                exports.push(json!({ "name": name, "error": error.to_string() }));
                failure.get_or_insert(error);
            }
        }
    }
    if let (None, Some(failure)) = (mode, failure) {
        return Err(failure);
    }
    // What only an export tells is not known of a server that has none.
    Ok(json!({
        "server": uri.endpoint.to_string(),
        "protocol": "newstyle-fixed",
        "tls": tls.is_some(),
        "structured-replies": mode.map(TransmissionMode::is_structured),
        "extended-headers": mode.map(TransmissionMode::is_extended),
        "exports": exports,
    }))
}

const CAPABILITIES: [(TransmissionFlags, &str); 12] = [
    (TransmissionFlags::READ_ONLY, "read-only"),
    (TransmissionFlags::SEND_FLUSH, "flush"),
    (TransmissionFlags::SEND_FUA, "fua"),
    (TransmissionFlags::ROTATIONAL, "rotational"),
    (TransmissionFlags::SEND_TRIM, "trim"),
    (TransmissionFlags::SEND_WRITE_ZEROES, "write-zeroes"),
    (TransmissionFlags::SEND_FAST_ZERO, "fast-zero"),
    (TransmissionFlags::SEND_DF, "df"),
    (TransmissionFlags::SEND_CACHE, "cache"),
    (TransmissionFlags::CAN_MULTI_CONN, "multi-conn"),
    (TransmissionFlags::SEND_RESIZE, "resize"),
    (TransmissionFlags::BLOCK_STATUS_PAYLOAD, "block-status-payload"),
];

fn export_json(uri: &NbdUri, info: &ExportInfo, handshake: &Handshake) -> Value {
    let offered = CAPABILITIES.iter().filter(|(flag, _)| info.flags.contains(*flag));
    let capabilities: Vec<&str> = offered.map(|(_, name)| *name).collect();
    json!({
        "name": info.canonical_name.as_deref().unwrap_or(&uri.export),
        "uri": uri.to_string(),
        "size": info.size,
        "description": info.description,
        "capabilities": capabilities,
        "contexts": handshake.contexts,
        "block-size-min": info.block_sizes.min,
        "block-size-preferred": info.block_sizes.preferred,
        "block-size-max": info.block_sizes.max,
    })
}

fn server_text(server: &Value) -> String {
    let tls = if server["tls"] == true { "TLS" } else { "no TLS" };
    let has = |key: &str| server[key].as_bool();
    let replies = match (has("structured-replies"), has("extended-headers")) {
        (_, Some(true)) => ", extended headers",
        (Some(true), _) => ", structured replies",
        (Some(false), _) => ", simple replies",
        (None, _) => "; it lists no exports",
    };
    let (name, protocol) = (&server["server"], &server["protocol"]);
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    format!("server {}: {}, {tls}{replies}", word(name), word(protocol))
}

fn export_text(export: &Value) -> String {
    if let Some(error) = export["error"].as_str() {
        return format!("export {}\n  error         {error}", export["name"]);
    }
    let number = |key: &str| export[key].as_u64().unwrap_or(0);
    let words = |key: &str| {
        let words = export[key].as_array().into_iter().flatten().filter_map(Value::as_str);
        let words: Vec<_> = words.map(|word| word.escape_debug().to_string()).collect();
        if words.is_empty() { "none".to_owned() } else { words.join(", ") }
    };
    let mut text = format!(
        "export {}\n  uri           {}\n  size          {} ({} bytes)\n  block sizes   {} / {} / \
         {} (least, best, most)\n  capabilities  {}\n  contexts      {}",
        export["name"],
        export["uri"].as_str().unwrap_or_default(),
        units::bytes(number("size")),
        number("size"),
        units::bytes(number("block-size-min")),
        units::bytes(number("block-size-preferred")),
        units::bytes(number("block-size-max")),
        words("capabilities"),
        words("contexts"),
    );
    if let Some(description) = export["description"].as_str().filter(|text| !text.is_empty()) {
        text.push_str(&format!("\n  description   {}", description.escape_debug()));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use brep_block::Memory;
    use brep_nbd::Endpoint;
    use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: NbdInfoArgs,
    }

    #[tokio::test]
    async fn an_export_that_refuses_does_not_hide_the_others() {
        let dir = tempfile::tempdir().unwrap();
        let exports = StaticExports::new();
        exports.add(Export::new("closed", Memory::new("closed", 4096)).tls_required(true));
        exports.add(Export::new("open", Memory::new("open", 8192)));
        let server = Server::new(Arc::new(exports), ServerConfig::default());
        let path = dir.path().join("s.sock");
        let endpoint = Endpoint::Unix { path: path.clone() };
        let listener = Server::bind(&endpoint).await.unwrap();
        tokio::spawn(async move { server.serve(listener).await });

        let line = |export: &str| {
            let uri = format!("nbd+unix:///{export}?socket={}", path.display());
            Line::try_parse_from(["info", &uri]).unwrap().args
        };
        let found = look(&line(""), None).await.unwrap();
        assert_eq!(found["exports"][0]["name"], "closed");
        let error = found["exports"][0]["error"].as_str().unwrap();
        assert!(error.contains("TLS"), "{error}");
        assert!(export_text(&found["exports"][0]).contains(error));
        assert_eq!(
            (&found["exports"][1]["name"], &found["exports"][1]["size"]),
            (&json!("open"), &json!(8192))
        );
        assert!(look(&line("closed"), None).await.is_err(), "the only one that was asked for");
    }
}
