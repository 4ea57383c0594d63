//! `brep nbd list`: the names of a server's exports.
use anyhow::Context;
use brep_nbd::client::list_exports;
use serde_json::json;

use crate::args::NbdListArgs;
use crate::cmd::runtime::current_thread;
use crate::exit::{OK, Outcome};
use crate::output;

pub(crate) fn run(args: &NbdListArgs) -> Outcome {
    let tls = args.client.tls(&args.uri)?;
    let policy = args.client.policy();
    let list = async || list_exports(&args.uri.endpoint, tls.as_ref(), args.client.timeout).await;
    let exports =
        current_thread()?.block_on(policy.attempt(list)).context("cannot ask for the exports")?;
    if args.json {
        let server = args.uri.endpoint.to_string();
        let exports: Vec<_> = exports
            .iter()
            .map(|export| json!({ "name": export.name, "description": export.description }))
            .collect();
        output::json(&json!({ "server": server, "exports": exports }))?;
        return Ok(OK);
    }
    for export in &exports {
        let name = json!(export.name);
        match export.description.as_str() {
            "" => output::line(&name.to_string())?,
            description => output::line(&format!("{name}  {}", description.escape_debug()))?,
        }
    }
    Ok(OK)
}
