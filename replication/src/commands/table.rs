//! Every command of the control socket.

use crate::control::{ArgumentKind as Kind, ArgumentSpec, CommandSpec};

const fn optional(name: &'static str, kind: Kind) -> ArgumentSpec {
    ArgumentSpec::optional(name, kind)
}

const fn required(name: &'static str, kind: Kind) -> ArgumentSpec {
    ArgumentSpec::required(name, kind)
}

const fn command(name: &'static str, arguments: &'static [ArgumentSpec]) -> CommandSpec {
    CommandSpec::new(name, arguments)
}

/// A command that only asks.
const fn query(name: &'static str, returns: &'static str) -> CommandSpec {
    CommandSpec::new(name, &[]).returning(returns).allow_oob()
}

const REMOVE_MODE: ArgumentSpec = optional("mode", Kind::Enum(&["safe", "hard"]));
const DEVICE: ArgumentSpec = required("device", Kind::String);
const JOB_ID: ArgumentSpec = required("id", Kind::String);

const ADDRESS: Kind = Kind::Union(&[
    ("inet", &[required("host", Kind::String), required("port", Kind::String)]),
    ("unix", &[required("path", Kind::String)]),
]);

const YANK_INSTANCE: &[ArgumentSpec] = &[
    required("type", Kind::Enum(&["block-node", "chardev", "migration"])),
    optional("node-name", Kind::String),
    optional("id", Kind::String),
];

/// The commands of either side; one that makes no sense on a side is refused there, with the
/// reason.
pub(crate) const COMMANDS: &[CommandSpec] = &[
    // brep's own.
    query("query-status", "Status"),
    command(
        "checkpoint",
        &[optional("wait", Kind::Enum(&["cut", "commit"])), optional("timeout-ms", Kind::Integer)],
    )
    .returning("CheckpointReport"),
    command(
        "failover",
        &[optional("to", Kind::Enum(&["checkpoint", "latest"])), optional("hold", Kind::Boolean)],
    )
    .returning("FailoverReport"),
    command("failover-commit", &[]),
    command("failover-test", &[required("name", Kind::String)]).returning("TestReport"),
    command("failover-test-end", &[required("name", Kind::String)]).returning("TestReport"),
    command(
        "failover-rollback",
        &[optional("discard-local", Kind::Boolean), optional("dry-run", Kind::Boolean)],
    )
    .returning("DiscardReport"),
    command("replication-start", &[]),
    command("replication-stop", &[optional("discard-checkpoint", Kind::Boolean)]),
    command(
        "resync",
        &[
            optional("full", Kind::Boolean),
            optional("compare", Kind::Boolean),
            optional("discard-checkpoint", Kind::Boolean),
            optional("rate", Kind::Integer),
            optional("latency-factor", Kind::Number),
            optional("discard-local", Kind::Boolean),
            optional("dry-run", Kind::Boolean),
        ],
    )
    .returning("ResyncReport"),
    command(
        "block_resize",
        &[
            optional("device", Kind::String),
            optional("node-name", Kind::String),
            required("size", Kind::Integer),
        ],
    ),
    command(
        "disk-add",
        &[
            required("name", Kind::String),
            required("file", Kind::String),
            required("format", Kind::Enum(&["raw", "qcow2"])),
            optional("cache", Kind::Enum(&["writeback", "none"])),
        ],
    )
    .returning("DiskReport"),
    command("disk-remove", &[required("name", Kind::String), optional("force", Kind::Boolean)])
        .returning("DiskReport"),
    command("peer-set", &[required("uri", Kind::String)]),
    command("peer-clear", &[]),
    command("resume", &[optional("lonely", Kind::Boolean)]),
    command("switchover", &[optional("timeout-ms", Kind::Integer)]).returning("SwitchoverReport"),
    // Replication, as a manager of the original knows it.
    command(
        "xen-set-replication",
        &[
            required("enable", Kind::Boolean),
            required("primary", Kind::Boolean),
            optional("failover", Kind::Boolean),
        ],
    ),
    query("query-xen-replication-status", "ReplicationStatus"),
    command("xen-colo-do-checkpoint", &[]),
    command("x-colo-lost-heartbeat", &[]),
    query("query-colo-status", "ColoStatus"),
    command(
        "x-blockdev-change",
        &[
            required("parent", Kind::String),
            optional("child", Kind::String),
            optional("node", Kind::String),
        ],
    ),
    // The NBD server and its exports.
    command(
        "nbd-server-start",
        &[
            required("addr", ADDRESS),
            optional("tls-creds", Kind::String),
            optional("tls-authz", Kind::String),
            optional("max-connections", Kind::Integer),
        ],
    ),
    command(
        "nbd-server-add",
        &[
            DEVICE,
            optional("name", Kind::String),
            optional("description", Kind::String),
            optional("writable", Kind::Boolean),
            optional("bitmap", Kind::String),
        ],
    ),
    command("nbd-server-remove", &[required("name", Kind::String), REMOVE_MODE]),
    command("nbd-server-stop", &[]),
    command(
        "block-export-add",
        &[
            required("type", Kind::Enum(&["nbd"])),
            JOB_ID,
            required("node-name", Kind::String),
            optional("name", Kind::String),
            optional("description", Kind::String),
            optional("writable", Kind::Boolean),
            optional("writethrough", Kind::Boolean),
            optional("iothread", Kind::String),
            optional("fixed-iothread", Kind::Boolean),
            optional("bitmaps", Kind::Strings),
            optional("allocation-depth", Kind::Boolean),
        ],
    ),
    command("block-export-del", &[JOB_ID, REMOVE_MODE]),
    query("query-block-exports", "[BlockExport]"),
    // Nodes and jobs.
    CommandSpec::new("query-named-block-nodes", &[optional("flat", Kind::Boolean)])
        .returning("[BlockNode]")
        .allow_oob(),
    query("query-block-jobs", "[BlockJob]"),
    command("block-job-cancel", &[DEVICE, optional("force", Kind::Boolean)]),
    command("block-job-set-speed", &[DEVICE, required("speed", Kind::Integer)]),
    command("block-job-pause", &[DEVICE]),
    command("block-job-resume", &[DEVICE]),
    command("block-job-complete", &[DEVICE]),
    command("block-job-finalize", &[JOB_ID]),
    command("block-job-dismiss", &[JOB_ID]),
    // Connections, guest, process.
    query("query-yank", "[YankInstance]"),
    CommandSpec::new("yank", &[required("instances", Kind::Objects(YANK_INSTANCE))]).allow_oob(),
    command("stop", &[]),
    command("cont", &[]),
    command("quit", &[]),
];
