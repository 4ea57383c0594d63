//! A secondary as a manager of the original knows it: block nodes, latched errors, yank.

use std::sync::Arc;

use serde_json::{Value, json};

use super::group::Group;
use crate::commands::{Arguments, Node};
use crate::config::DiskFormat;
use crate::control::CommandError;
use crate::node::Stage;
use crate::side::Managed;

impl Managed for Group {
    fn get_error(&self) -> Option<String> {
        match self.stage() {
            Stage::None => Some("Block replication is not running".to_owned()),
            Stage::Done => None,
            _ => self.errors.latched(),
        }
    }

    fn nodes(&self, flat: bool) -> Value {
        let mut nodes = Vec::new();
        for disk in self.disks() {
            let name = |layer: &str| format!("{}-{layer}", disk.name);
            let driver = match disk.config.format {
                DiskFormat::Raw => "raw",
                DiskFormat::Qcow2 => "qcow2",
            };
            let mut below: Vec<Node> = Vec::new();
            let file = || disk.file.clone();
            let layers = std::iter::once((name("disk"), driver, file()));
            let buffers = disk
                .layers()
                .into_iter()
                .map(|(layer, path)| (name(&layer), "qcow2", path.display().to_string()));
            for (name, driver, file) in layers.chain(buffers) {
                let node = Node { name, driver, file, size: disk.size(), backing: below.clone() };
                below.insert(0, node.clone());
                nodes.push(node);
            }
            let (name, driver) = (disk.name.clone(), "replication");
            nodes.push(Node { name, driver, file: file(), size: disk.size(), backing: Vec::new() });
        }
        nodes.iter().map(|node| node.to_value(flat)).collect()
    }

    fn yank_instances(&self) -> Value {
        match self.session() {
            Some(_) => json!([{ "type": "migration" }]),
            None => json!([]),
        }
    }
}

impl Group {
    pub(super) fn disk_names(&self) -> Vec<String> {
        self.disks().iter().map(|disk| disk.name.clone()).collect()
    }

    /// `x-blockdev-change`: a secondary has nothing whose children change.
    pub(super) fn refuse_change(&self, arguments: Arguments<'_>) -> CommandError {
        let parent = arguments.text("parent").unwrap_or_default();
        let known = self.disks().iter().any(|disk: &Arc<_>| disk.name == parent);
        CommandError::refused(match (known, arguments.text("child"), arguments.text("node")) {
            (false, ..) => format!("Cannot find device='{parent}' nor node-name='{parent}'"),
            (true, Some(_), Some(_)) => "The parameters child and node are in conflict".to_owned(),
            (true, None, None) => "Either child or node must be specified".to_owned(),
            (true, Some(child), None) => format!("Node '{parent}' does not have child '{child}'"),
            (true, None, Some(_)) => {
                format!("The node {parent} does not support adding a child: this is a secondary")
            }
        })
    }
}
