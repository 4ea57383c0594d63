//! The schema of the control socket, for programs: made from the tables that the server checks
//! commands against, so that it cannot say anything else.

use serde_json::{Map, Value, json};

use super::COMMANDS;
use crate::control::{ArgumentKind, ArgumentSpec, CommandSpec, SERVER_COMMANDS, Variant};

/// The events of either side, and the members of their data.
const EVENTS: &[(&str, &[&str])] = &[
    (
        "BREP_STATE",
        &[
            "role",
            "replication",
            "link",
            "peer",
            "promotable",
            "latest-ok",
            "guest-stopped",
            "writes-held",
            "reason",
            "advice",
            "disks",
        ],
    ),
    ("BREP_CONNECTED", &["peer"]),
    ("BREP_REFUSED", &["reason"]),
    ("BREP_PEER_LOST", &["reason"]),
    ("BREP_SUSPENDED", &["reason"]),
    ("BREP_RESUMED", &["reason"]),
    ("BREP_DISCONNECTED", &[]),
    ("BREP_CHECKPOINT", &["epoch", "left-out"]),
    (
        "BREP_ERROR",
        &[
            "disk",
            "operation",
            "offset",
            "length",
            "errno",
            "message",
            "count",
            "first-s",
            "last-s",
        ],
    ),
    (
        "BREP_PROMOTED",
        &[
            "target",
            "epoch",
            "differing-bytes",
            "last-contact-ms",
            "took-us",
            "held",
            "repeated",
            "left-out",
        ],
    ),
    ("BREP_FAILOVER_COMMITTED", &[]),
    ("BREP_ROLLED_BACK", &["bytes"]),
    ("BREP_TEST_OPENED", &["name", "checkpoint", "uris"]),
    ("BREP_TEST_ENDED", &["name", "reason"]),
    ("BREP_MERGE_FAILED", &["error"]),
    ("BREP_MERGED", &[]),
    ("BREP_SUPERSEDED", &["reason"]),
    ("BREP_STATE_FAILED", &["reason"]),
    ("EVENTS_LOST", &["count"]),
    ("QUORUM_REPORT_BAD", &["type", "error", "node-name", "sector-num", "sectors-count"]),
    ("QUORUM_FAILURE", &["reference", "sector-num", "sectors-count"]),
    ("COLO_EXIT", &["mode", "reason"]),
    ("BLOCK_EXPORT_DELETED", &["id"]),
    ("BLOCK_JOB_COMPLETED", &["type", "device", "len", "offset", "speed"]),
    ("STOP", &[]),
    ("RESUME", &[]),
    ("SHUTDOWN", &["guest", "reason"]),
];

/// A type that commands return: its members, each with its type; those with a question mark may
/// be absent.
type Type = (&'static str, &'static [(&'static str, &'static str)]);

/// What commands return.
const TYPES: &[Type] = &[
    ("CommandInfo", &[("name", "string")]),
    ("VersionInfo", &[("qemu", "object"), ("brep", "object"), ("package", "string")]),
    (
        "Status",
        &[
            ("sequence", "integer"),
            ("name", "string"),
            ("role", "string"),
            ("pid", "integer"),
            ("set", "string or null"),
            ("cur", "string or null"),
            ("epoch", "integer"),
            ("checkpoint", "integer or null"),
            ("checkpoint-age-ms", "integer or null"),
            ("peer", "string or null"),
            ("link", "string"),
            ("tls", "object or null"),
            ("last-contact-ms", "integer or null"),
            ("reason", "string or null"),
            ("advice", "string or null"),
            ("differences", "object or null"),
            ("ack", "string or null"),
            ("durability", "string"),
            ("peer-durability", "string or null"),
            ("promotable", "boolean or null"),
            ("latest-ok", "boolean or null"),
            ("replication", "string"),
            ("lapsed", "array"),
            ("guest-stopped", "boolean"),
            ("held-writes", "integer or null"),
            ("held", "object or null"),
            ("test", "object or null"),
            ("resync", "object or null"),
            ("disks", "array"),
            ("errors", "array"),
            ("counters", "object"),
        ],
    ),
    ("CheckpointReport", &[("epoch", "integer")]),
    ("SwitchoverReport", &[("epoch", "integer"), ("role", "string")]),
    (
        "FailoverReport",
        &[
            ("target", "string"),
            ("epoch", "integer or null"),
            ("differing-bytes", "integer"),
            ("last-contact-ms", "integer or null"),
            ("took-us", "integer"),
            ("held", "boolean"),
            ("repeated", "boolean"),
            ("left-out", "array"),
        ],
    ),
    ("TestReport", &[("name", "string"), ("checkpoint", "integer or null"), ("uris", "array")]),
    ("DiscardReport", &[("bytes", "integer or null"), ("disks", "array"), ("dry-run", "boolean")]),
    (
        "ResyncReport",
        &[("bytes", "integer or null?"), ("disks", "array?"), ("dry-run", "boolean?")],
    ),
    ("DiskReport", &[("name", "string"), ("changed", "boolean")]),
    ("ReplicationStatus", &[("error", "boolean"), ("desc", "string?")]),
    ("ColoStatus", &[("mode", "string"), ("last-mode", "string"), ("reason", "string")]),
    (
        "BlockExport",
        &[
            ("id", "string"),
            ("type", "string"),
            ("node-name", "string"),
            ("shutting-down", "boolean"),
        ],
    ),
    (
        "BlockNode",
        &[
            ("node-name", "string"),
            ("drv", "string"),
            ("ro", "boolean"),
            ("file", "string"),
            ("backing_file", "string?"),
            ("backing_file_depth", "integer"),
            ("encrypted", "boolean"),
            ("detect_zeroes", "string"),
            ("write_threshold", "integer"),
            ("bps", "integer"),
            ("bps_rd", "integer"),
            ("bps_wr", "integer"),
            ("iops", "integer"),
            ("iops_rd", "integer"),
            ("iops_wr", "integer"),
            ("cache", "object"),
            ("image", "object"),
        ],
    ),
    (
        "BlockJob",
        &[
            ("type", "string"),
            ("device", "string"),
            ("len", "integer"),
            ("offset", "integer"),
            ("busy", "boolean"),
            ("paused", "boolean"),
            ("speed", "integer"),
            ("io-status", "string"),
            ("ready", "boolean"),
            ("status", "string"),
            ("auto-finalize", "boolean"),
            ("auto-dismiss", "boolean"),
        ],
    ),
    ("YankInstance", &[("type", "string"), ("node-name", "string?")]),
];

/// The schema as it stands in docs/reference/control-schema.json.
fn schema() -> Value {
    let commands = SERVER_COMMANDS.iter().chain(COMMANDS).map(command);
    let events = EVENTS.iter().map(|(name, data)| json!({ "name": name, "data": data }));
    let types = TYPES.iter().map(|(name, members)| {
        let members: Map<_, _> =
            members.iter().map(|(name, kind)| ((*name).to_owned(), json!(kind))).collect();
        ((*name).to_owned(), Value::Object(members))
    });
    json!({
        "version": 1,
        "commands": commands.collect::<Vec<_>>(),
        "events": events.collect::<Vec<_>>(),
        "types": types.collect::<Map<_, _>>(),
    })
}

fn command(spec: &CommandSpec) -> Value {
    json!({
        "name": spec.name,
        "arguments": members(spec.arguments),
        "returns": spec.returns,
        "allow-oob": spec.out_of_band,
    })
}

fn members(arguments: &[ArgumentSpec]) -> Value {
    let describe = |argument: &ArgumentSpec| {
        let mut described = kind(argument.kind);
        described["name"] = json!(argument.name);
        described["required"] = json!(argument.required);
        described
    };
    arguments.iter().map(describe).collect()
}

fn kind(kind: ArgumentKind) -> Value {
    let mut described = json!({ "type": kind.type_name() });
    match kind {
        ArgumentKind::String
        | ArgumentKind::Boolean
        | ArgumentKind::Number
        | ArgumentKind::Integer => {}
        ArgumentKind::Enum(values) => described["values"] = json!(values),
        ArgumentKind::Strings => described["element"] = json!({ "type": "string" }),
        ArgumentKind::Objects(inside) => {
            described["element"] = json!({ "type": "object", "members": members(inside) });
        }
        ArgumentKind::Object(inside) => described["members"] = members(inside),
        ArgumentKind::Union(variants) => {
            let variant =
                |(name, inside): &Variant| json!({ "type": name, "data": members(inside) });
            described["variants"] = variants.iter().map(variant).collect();
        }
    }
    described
}

mod tests {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};

    use super::*;

    fn reference(file: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/reference").join(file)
    }

    #[test]
    fn the_schema_in_the_reference_is_what_the_server_accepts() {
        let file = reference("control-schema.json");
        let now = format!("{:#}\n", schema());
        if std::env::var_os("BREP_BLESS").is_some() {
            std::fs::write(&file, &now).unwrap();
        }
        let kept = std::fs::read_to_string(&file).unwrap();
        assert!(kept == now, "run this test with BREP_BLESS=1 and commit {}", file.display());
    }

    #[test]
    fn no_name_is_given_twice_and_every_returned_type_is_described() {
        let commands: Vec<_> = SERVER_COMMANDS.iter().chain(COMMANDS).collect();
        let names: BTreeSet<_> = commands.iter().map(|c| c.name).collect();
        assert_eq!(names.len(), commands.len());
        let events: BTreeSet<_> = EVENTS.iter().map(|(name, _)| *name).collect();
        assert_eq!(events.len(), EVENTS.len());
        let known: BTreeSet<_> = TYPES.iter().map(|(name, _)| *name).collect();
        let used = commands.iter().map(|c| c.returns.trim_matches(['[', ']']));
        let used: BTreeSet<_> = used.filter(|name| *name != "{}").collect();
        assert!(used.is_subset(&known), "{:?}", used.difference(&known));
    }

    /// The words in backticks at the start of the lines of a page's tables.
    fn first_cells(page: &str) -> BTreeSet<&str> {
        let rows = page.lines().filter_map(|line| line.strip_prefix("| `"));
        rows.filter_map(|row| row.split('`').next()).collect()
    }

    #[test]
    fn the_page_has_every_command_and_every_event_and_no_others() {
        let page = std::fs::read_to_string(reference("control-socket.md")).unwrap();
        let cells = first_cells(&page);
        let commands = SERVER_COMMANDS.iter().chain(COMMANDS).map(|c| c.name);
        let events = EVENTS.iter().map(|(name, _)| *name);
        let known: BTreeSet<_> = commands.chain(events).collect();
        let missing: Vec<_> = known.difference(&cells).collect();
        assert!(missing.is_empty(), "not on the page: {missing:?}");
        let classes = crate::control::ErrorClass::ALL.map(|class| class.as_str());
        let others: Vec<_> =
            cells.difference(&known).filter(|cell| !classes.contains(*cell)).collect();
        assert!(others.is_empty(), "on the page, and unknown: {others:?}");
    }

    /// Names between quotes that follow `emit(` or `tell(` in the sources.
    fn emitted(folder: &Path, found: &mut BTreeSet<String>) {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            if entry.file_type().unwrap().is_dir() {
                emitted(&entry.path(), found);
                continue;
            }
            let text = std::fs::read_to_string(entry.path()).unwrap();
            let code = text.split("#[cfg(test)]\nmod tests").next().unwrap_or_default();
            for call in code.split("emit(").skip(1).chain(code.split("event(").skip(1)) {
                if let Some(name) = call.trim_start().strip_prefix('"') {
                    found.extend(name.split('"').next().map(str::to_owned));
                }
            }
        }
    }

    #[test]
    fn every_event_that_is_sent_is_described_and_every_described_one_is_sent() {
        let mut found = BTreeSet::new();
        emitted(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src"), &mut found);
        let is_name = |name: &str| name.chars().all(|c| c.is_ascii_uppercase() || c == '_');
        found.retain(|name| is_name(name) && !["TICK", "EARLY", "LATE"].contains(&&**name));
        let described: BTreeSet<_> = EVENTS.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(found, described);
    }
}
