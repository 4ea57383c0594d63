use std::path::PathBuf;
use std::time::Duration;

use brep_block::CacheMode;
use serde_json::{Map, Value};

use super::CommandResult;
use crate::config::{DiskConfig, DiskFormat};
use crate::control::CommandError;
use crate::secondary::Wanted;
use crate::state::Target;

/// How long a checkpoint command waits unless it says otherwise.
const CHECKPOINT_LIMIT: Duration = Duration::from_secs(60);

/// The arguments of a command, which have been checked against its description.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Arguments<'a>(pub(crate) &'a Map<String, Value>);

impl<'a> Arguments<'a> {
    pub(crate) fn text(self, name: &str) -> Option<&'a str> {
        self.0.get(name).and_then(Value::as_str)
    }

    pub(crate) fn has(self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// False if it was left out.
    pub(crate) fn flag(self, name: &str) -> bool {
        self.0.get(name).and_then(Value::as_bool).unwrap_or(false)
    }

    pub(crate) fn number(self, name: &str) -> Option<i64> {
        self.0.get(name).and_then(Value::as_i64)
    }

    pub(crate) fn real(self, name: &str) -> Option<f64> {
        self.0.get(name).and_then(Value::as_f64)
    }

    /// A member that is an object; empty if it was left out.
    pub(crate) fn object(self, name: &str) -> Option<Arguments<'a>> {
        self.0.get(name).and_then(Value::as_object).map(Arguments)
    }

    /// The objects of a list.
    pub(crate) fn objects(self, name: &str) -> impl Iterator<Item = Arguments<'a>> {
        let list = self.0.get(name).and_then(Value::as_array).into_iter().flatten();
        list.filter_map(Value::as_object).map(Arguments)
    }

    /// What a failover is to do.
    pub(crate) fn wanted(self) -> Wanted {
        let target = match self.text("to") {
            Some("latest") => Target::Latest,
            _ => Target::Checkpoint,
        };
        Wanted { target, hold: self.flag("hold") }
    }

    /// The disk that `disk-add` describes.
    pub(crate) fn disk(self) -> CommandResult<DiskConfig> {
        let path = PathBuf::from(self.text("file").unwrap_or_default());
        if !path.is_absolute() {
            return Err(CommandError::usage(format!("file {path:?}: an absolute path is needed")));
        }
        Ok(DiskConfig {
            name: self.text("name").unwrap_or_default().to_owned(),
            path,
            format: match self.text("format") {
                Some("qcow2") => DiskFormat::Qcow2,
                _ => DiskFormat::Raw,
            },
            cache: match self.text("cache") {
                Some("none") => CacheMode::None,
                _ => CacheMode::Writeback,
            },
            buffers: None,
        })
    }

    /// The time that a checkpoint command may take.
    pub(crate) fn checkpoint_limit(self) -> Duration {
        let given = self.0.get("timeout-ms").and_then(Value::as_u64);
        given.map_or(CHECKPOINT_LIMIT, Duration::from_millis)
    }
}
