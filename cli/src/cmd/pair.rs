//! `brep primary`, `brep secondary` and `brep secondaries`.
use std::path::{Path, PathBuf};

use brep_replication::config::{Role, SideConfig};

use super::control::discard_text;
use super::runtime::until_signal;
use crate::args::{DryRun, SecondariesArgs};
use crate::exit::{Failure, OK, Outcome};
use crate::instances::{Entry, Registry};
use crate::output;

/// Runs a side until it is told to stop; or only says what a secondary would give up.
pub(crate) fn run(config: SideConfig, dry_run: Option<DryRun>) -> Outcome {
    let control = control_socket(config.control.as_deref(), &config.state_dir);
    if config.discard_local {
        let discard = serde_json::to_value(brep_replication::would_discard(&config)?)
            .map_err(Failure::failed)?;
        match dry_run {
            Some(DryRun { json: true }) => output::json(&discard)?,
            _ => output::line(&discard_text(&discard))?,
        }
        if dry_run.is_some() {
            return Ok(OK);
        }
    }
    let role = match config.role {
        Role::Primary => "primary",
        Role::Secondary => "secondary",
    };
    let _entry = register(role, &config.name, &control);
    until_signal("data", |shutdown| brep_replication::run(config, shutdown))?;
    Ok(OK)
}

/// Runs the groups of a file until they are told to stop.
pub(crate) fn run_groups(args: &SecondariesArgs) -> Outcome {
    let groups = args.resolve()?;
    if args.check {
        output::line(&format!("{} groups", groups.len()))?;
        return Ok(OK);
    }
    let entry = |config: &SideConfig| {
        let control = control_socket(config.control.as_deref(), &config.state_dir);
        let group = config.shared.as_ref().map_or("", |place| place.group());
        register("secondary", group, &control)
    };
    let _entries: Vec<_> = groups.iter().map(entry).collect();
    until_signal("reception", |shutdown| brep_replication::run_groups(groups, shutdown))?;
    Ok(OK)
}

fn control_socket(given: Option<&Path>, state_dir: &Path) -> PathBuf {
    given.map_or_else(|| state_dir.join("control.sock"), Path::to_owned)
}

/// Without its entry an instance can do everything, it is only not found without `--control`.
fn register(role: &str, name: &str, control: &Path) -> Option<Entry> {
    Registry::of_user()
        .add(role, name, control)
        .inspect_err(|failure| tracing::warn!("commands will need --control: {failure}"))
        .ok()
}
