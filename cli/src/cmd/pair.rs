//! `brep primary` and `brep secondary`.
use std::path::{Path, PathBuf};

use brep_replication::config::{PrimaryConfig, SecondaryConfig};

use super::control::discard_text;
use super::runtime::until_signal;
use crate::args::DryRun;
use crate::exit::{Failure, OK, Outcome};
use crate::instances::{Entry, Registry};
use crate::output;

/// Serves the guest and replicates until told to stop.
pub(crate) fn primary(config: PrimaryConfig) -> Outcome {
    let control = control_socket(config.control.as_deref(), &config.state_dir);
    let _entry = register("primary", &config.name, &control);
    until_signal("data", |shutdown| brep_replication::primary::run(config, shutdown))?;
    Ok(OK)
}

/// Receives a primary's writes until told to stop; or only says what it would give up.
pub(crate) fn secondary(config: SecondaryConfig, dry_run: Option<DryRun>) -> Outcome {
    if config.discard_local {
        let discard = serde_json::to_value(brep_replication::secondary::would_discard(&config)?)
            .map_err(Failure::failed)?;
        match dry_run {
            Some(DryRun { json: true }) => output::json(&discard)?,
            _ => output::line(&discard_text(&discard))?,
        }
        if dry_run.is_some() {
            return Ok(OK);
        }
    }
    let control = control_socket(config.control.as_deref(), &config.state_dir);
    let _entry = register("secondary", &config.name, &control);
    until_signal("data", |shutdown| brep_replication::secondary::run(config, shutdown))?;
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
