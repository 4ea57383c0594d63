//! A disk that has been promoted.

use std::sync::Arc;

use brep_block::BlockDevice;
use brep_hbitmap::{MapSet, Role};
use brep_qcow2::Qcow2;

use super::{Buffer, ReplicaDisk};
use crate::Result;
use crate::merge::MergedDisk;
use crate::state::Target;
use crate::status::Written;

impl ReplicaDisk {
    /// Makes the promoted disk: a fresh top over the checkpoint, or over what was received last.
    /// Without a `top` the image itself becomes the disk.
    pub(crate) fn promote_onto(&self, top: Option<Buffer>, target: Target) {
        let base = Arc::clone(self.image.device());
        let promoted = match top {
            None => MergedDisk::direct(&self.name, base),
            Some(top) => {
                let (below, mut layers) = match target {
                    Target::Checkpoint => self.at_checkpoint(),
                    Target::Latest => (Arc::clone(&base), Vec::new()),
                };
                top.below.set(Some(below));
                layers.insert(0, Arc::clone(&top.image));
                let promoted = MergedDisk::merging(&self.name, base, top.device(), layers);
                self.state().top = Some(top);
                promoted
            }
        };
        self.state().promoted = Some(Arc::clone(&promoted));
        self.gate.replace(promoted);
    }

    /// The disk at its checkpoint: the active disk, if there is one, over the chain, over the
    /// image; and the buffers in it, the upper first.
    fn at_checkpoint(&self) -> (Arc<dyn BlockDevice>, Vec<Arc<Qcow2>>) {
        let state = self.state();
        let layers = state.active.iter().chain(&state.chain).map(|b| Arc::clone(&b.image));
        let layers = layers.collect();
        let below: Arc<dyn BlockDevice> = match &state.replica {
            Some(replica) => Arc::clone(&replica.view) as _,
            // Its file is the checkpoint.
            None => Arc::clone(self.image.device()),
        };
        let Some(active) = &state.active else { return (below, layers) };
        active.below.set(Some(below));
        (active.device(), layers)
    }

    /// Marks where the disk differs from its last checkpoint once it has been promoted to `target`.
    pub(crate) async fn mark_beyond_checkpoint(
        &self,
        target: Target,
        maps: &mut MapSet,
    ) -> Result<()> {
        let layers: Vec<Buffer> = {
            let state = self.state();
            match target {
                Target::Checkpoint => state.active.iter().cloned().collect(),
                Target::Latest => state.chain.clone(),
            }
        };
        for layer in layers {
            let mut at = 0;
            while at < self.size() {
                let status = layer.image.layer_status(at, self.size() - at).await?;
                if status.flags.allocated {
                    maps.set(Role::Differs, at, status.len);
                }
                at += status.len;
            }
        }
        Ok(())
    }

    pub(crate) fn promoted(&self) -> Option<Arc<MergedDisk>> {
        self.state().promoted.clone()
    }

    /// What was written since the promotion, by units of the top layer.
    pub(crate) async fn written_since_promotion(&self) -> Result<Written> {
        let top = self.state().top.clone();
        let (mut bytes, mut ranges, mut complete) = (0, Vec::<(u64, u64)>::new(), true);
        let mut at = 0;
        while let Some(top) = &top
            && let Some(range) = top.image.next_allocated(at).await?
        {
            // The image may be longer than the disk, by less than a sector.
            let end = range.end.min(self.size());
            bytes += end.saturating_sub(range.start);
            let is_full = ranges.len() == Written::SHOWN_MAX;
            match ranges.last_mut() {
                Some((start, len)) if *start + *len == range.start => *len = end - *start,
                _ if is_full => complete = false,
                _ => ranges.push((range.start, end - range.start)),
            }
            at = range.end;
        }
        Ok(Written { disk: self.name.clone(), bytes: Some(bytes), ranges, complete })
    }
}
