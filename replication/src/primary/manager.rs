//! A primary as a manager of the original knows it: block nodes, latched errors, yank.

use brep_block::Error as BlockError;
use serde_json::{Value, json};

use super::commands::peer_node;
use super::group::Group;
use crate::commands::Node;
use crate::config::DiskFormat;
use crate::node::Stage;
use crate::side::Managed;

impl Managed for Group {
    fn get_error(&self) -> Option<String> {
        match self.overall_stage() {
            Stage::None => Some("Block replication is not running".to_owned()),
            Stage::Running | Stage::Failover => self.errors.latched(),
            _ => None,
        }
    }

    fn nodes(&self, flat: bool) -> Value {
        if let Some(secondary) = &self.promoted {
            return secondary.nodes(flat);
        }
        let attached = self.is_attached();
        let mut nodes = Vec::new();
        for disk in self.disks() {
            let size = disk.size();
            let node = |name: String, driver, file: String| Node {
                name,
                driver,
                file,
                size,
                backing: Vec::new(),
            };
            let driver = match disk.format {
                DiskFormat::Raw => "raw",
                DiskFormat::Qcow2 => "qcow2",
            };
            nodes.push(node(disk.name.clone(), "quorum", disk.file.clone()));
            nodes.push(node(disk_node(&disk.name), driver, disk.file.clone()));
            if let Some(peer) = self.peer().filter(|_| attached) {
                let file = format!("{peer} {}", disk.name);
                nodes.push(node(peer_node(&disk.name), "nbd", file));
            }
        }
        nodes.iter().map(|node| node.to_value(flat)).collect()
    }

    fn yank_instances(&self) -> Value {
        if !self.is_attached() || self.core().dropped.is_some() {
            return json!([]);
        }
        let node = |name: &str| json!({ "type": "block-node", "node-name": peer_node(name) });
        let disks = self.disks();
        let nodes = disks.iter().map(|disk| node(&disk.name));
        nodes.chain([json!({ "type": "migration" })]).collect()
    }
}

impl Group {
    /// A write of the guest has failed on the local disk, and fails to the guest.
    pub(super) fn report_lost_vote(&self, disk: usize, offset: u64, len: u64, error: &BlockError) {
        let Some(disk) = self.disk(disk) else { return };
        let sector_num = offset / 512;
        let sectors_count = offset.saturating_add(len).div_ceil(512) - sector_num;
        self.events.emit(
            "QUORUM_REPORT_BAD",
            json!({
                "type": "write",
                "error": error.to_string(),
                "node-name": disk_node(&disk.name),
                "sector-num": sector_num,
                "sectors-count": sectors_count,
            }),
        );
        self.events.emit(
            "QUORUM_FAILURE",
            json!({
                "reference": disk.name,
                "sector-num": sector_num,
                "sectors-count": sectors_count,
            }),
        );
    }
}

/// The name of the node that is the local disk.
fn disk_node(disk: &str) -> String {
    format!("{disk}-disk")
}
