//! The replication nodes: block replication as a filter on a device, with the calls start,
//! checkpoint, stop and get_error, and the stages that a node goes through.
//!
//! [`PrimaryNode`] forwards writes; [`SecondaryNode`] shows the checkpoint plus its guest's
//! writes, and copies what the primary overwrites. A pair of daemons does not need them; programs
//! that embed replication, and users of the original's calls, do.
mod all;
mod calls;
mod primary;
mod secondary;
mod split;
mod target;

pub use all::{checkpoint_all, error_all, start_all, stop_all};
pub use primary::{Forward, PrimaryNode};
pub use secondary::{SecondaryNode, SecondaryOptions};
pub use target::{ReferenceTarget, TargetUse};

use brep_block::{Error, ErrorKind, Operation, ReplicationMode};
use serde::{Deserialize, Serialize};

/// How far a node has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum Stage {
    /// Not started.
    None,
    /// Replicating.
    Running,
    /// A failover has begun, and the merge goes on.
    Failover,
    /// The merge has failed; the node serves on from its layers.
    Failed,
    /// Stopped, or merged.
    Done,
}

const NOT_RUNNING: &str = "Block replication is not running";

fn control(node: &str, kind: ErrorKind, text: impl Into<String>) -> Error {
    Error::new(Operation::Control, kind, node, text)
}

fn not_running(node: &str) -> Error {
    control(node, ErrorKind::InvalidInput, NOT_RUNNING)
}

/// The number under which the original's interface knows a mode.
fn mode_number(mode: ReplicationMode) -> i32 {
    match mode {
        ReplicationMode::Primary => 0,
        ReplicationMode::Secondary => 1,
        ReplicationMode::Unprotected => -1,
    }
}

/// Whether `start` may begin: `Ok` in stage none with the right mode.
fn check_start(
    node: &str,
    stage: Stage,
    mode: ReplicationMode,
    needed: ReplicationMode,
) -> Result<(), Error> {
    match stage {
        Stage::Running | Stage::Failed => {
            Err(control(node, ErrorKind::InvalidInput, "Block replication is running or done"))
        }
        Stage::Failover | Stage::Done => {
            Err(control(node, ErrorKind::InvalidInput, "Cannot restart block replication"))
        }
        Stage::None if mode != needed => Err(control(
            node,
            ErrorKind::InvalidInput,
            format!(
                "The parameter mode's value is invalid, needs {}, but got {}",
                mode_number(needed),
                mode_number(mode)
            ),
        )),
        Stage::None => Ok(()),
    }
}
