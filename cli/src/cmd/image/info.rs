//! `brep image info`: what an image is.
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use brep_qcow2::Info;
use serde_json::{Value, json};

use super::Source;
use crate::args::InfoArgs;
use crate::cmd::runtime::current_thread;
use crate::exit::{OK, Outcome};
use crate::{output, units};

pub(crate) fn run(args: &InfoArgs) -> Outcome {
    let runtime = current_thread()?;
    let source = runtime.block_on(Source::describe(&args.image, args.format))?;
    let limits = source.device.limits();
    let mut info = json!({
        "image": args.image,
        "format": source.format(),
        "virtual-size": source.device.size(),
        "block-size": limits.block_size,
        "preferred-size": limits.preferred_size,
    });
    if !source.is_export()
        && let Ok(metadata) = std::fs::metadata(Path::new(&args.image))
    {
        info["file-size"] = metadata.len().into();
        info["allocated-size"] = metadata.blocks().saturating_mul(512).into();
    }
    if let Some(image) = source.qcow2() {
        info["qcow2"] = describe(&image.info());
    }
    if args.json {
        output::json(&info)?
    } else {
        output::line(&text(&info))?
    }
    Ok(OK)
}

fn describe(info: &Info) -> Value {
    let snapshots: Vec<&String> = info.snapshots.iter().map(|snapshot| &snapshot.name).collect();
    json!({
        "version": info.version,
        "cluster-size": info.cluster_size,
        "subcluster-size": info.subcluster_size,
        "extended-l2": info.extended_l2,
        "refcount-bits": info.refcount_bits,
        "lazy-refcounts": info.lazy_refcounts,
        "dirty": info.dirty,
        "corrupt": info.corrupt,
        "backing-name": info.backing_name,
        "backing-format": info.backing_format,
        "snapshots": snapshots,
    })
}

fn text(info: &Value) -> String {
    let word = |value: &Value| value.as_str().unwrap_or_default().escape_debug().to_string();
    let size = |value: &Value| value.as_u64().map(units::bytes).unwrap_or_default();
    let mut lines = vec![
        format!("image       {}", word(&info["image"])),
        format!("format      {}", word(&info["format"])),
        format!("size        {} ({} bytes)", size(&info["virtual-size"]), info["virtual-size"]),
    ];
    if info.get("allocated-size").is_some() {
        lines.push(format!("on disk     {}", size(&info["allocated-size"])));
    }
    if let Some(qcow2) = info.get("qcow2") {
        let mut clusters = size(&qcow2["cluster-size"]);
        if qcow2["extended-l2"] == true {
            clusters.push_str(&format!(" in sub-clusters of {}", size(&qcow2["subcluster-size"])));
        }
        lines.push(format!("qcow2       version {}, clusters of {clusters}", qcow2["version"]));
        if qcow2["backing-name"].is_string() {
            let name = word(&qcow2["backing-name"]);
            lines.push(format!("backing     {name} (named in the header; never followed)"));
        }
        let snapshots = qcow2["snapshots"].as_array().map_or(0, Vec::len);
        if snapshots > 0 {
            lines.push(format!("snapshots   {snapshots}"));
        }
        for (flag, said) in [
            ("dirty", "not closed cleanly; it is repaired when it is opened for writing"),
            ("corrupt", "marked corrupt; see brep image check"),
        ] {
            if qcow2[flag] == true {
                lines.push(format!("{flag:<10}  {said}"));
            }
        }
    }
    lines.join("\n")
}
