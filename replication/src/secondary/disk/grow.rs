//! A disk of a secondary grows: its image, its buffers, and what is built over them.

use std::sync::atomic::Ordering;

use brep_backup::Copied;
use brep_block::FlushLevel;

use super::super::buffers::Buffer;
use super::ReplicaDisk;
use crate::Result;

impl ReplicaDisk {
    /// Whether [`grow`](Self::grow) can be done.
    pub(crate) fn is_growable(&self) -> bool {
        self.image.is_growable() && !self.pool.has_named_files()
    }

    /// Makes image and buffers as large as the primary's disk. There is no session, and the guest
    /// is held. The checkpoint has zeroes beyond its old end.
    ///
    /// The record follows; a larger image than it names is one that has grown.
    pub(crate) async fn grow(&self, size: u64) -> Result<()> {
        if size <= self.size() {
            return Ok(());
        }
        tracing::info!(disk = self.name, from = self.size(), to = size, "the disk grows");
        self.settle().await?;
        let buffers = self.grown_buffers(size).await?;
        self.image.device().truncate(size).await?;
        // Before the record names the size.
        self.image.device().flush(FlushLevel::Durable).await?;
        // If anything has failed up to here, all of them are as large as they were.
        self.adopt_grown(buffers, size);
        self.size.store(size, Ordering::Release);
        if self.state().replica.is_some() {
            self.rebuild_replica().await?;
        }
        Ok(())
    }

    /// Builds filter and view anew over what the buffers hold. Nobody uses the old ones.
    pub(in crate::secondary) async fn rebuild_replica(&self) -> Result<()> {
        self.settle().await?;
        let kept_bytes = self.hidden_bytes();
        {
            let mut state = self.state();
            state.replica = None;
            (state.kept_bytes, state.dropped_bytes, state.copied_at_switch) = (kept_bytes, 0, 0);
        }
        self.start_replica(Copied::AllocatedInTarget)?;
        let was_shown = self.state().shown;
        // Else there is no checkpoint yet, and what lies there is no disk.
        if was_shown { self.show_guest().await } else { Ok(()) }
    }

    /// The buffers, as large as that; none if they are. The disk goes on with those that it has.
    pub(super) async fn grown_buffers(&self, size: u64) -> Result<Option<Vec<Buffer>>> {
        if size <= self.pool.size() {
            return Ok(None);
        }
        let mut buffers = self.buffers();
        for buffer in &mut buffers {
            buffer.grow(size).await?;
            // A record that names the new size must not find a buffer of the old one.
            self.pool.flush(buffer).await?;
        }
        Ok(Some(buffers))
    }

    /// The disk goes on with what [`grown_buffers`](Self::grown_buffers) has made.
    pub(super) fn adopt_grown(&self, buffers: Option<Vec<Buffer>>, size: u64) {
        if let Some(buffers) = buffers {
            self.put_buffers(buffers);
            self.pool.grow(size);
        }
    }

    /// Those of the chain, the next and the active one.
    pub(super) fn buffers(&self) -> Vec<Buffer> {
        let state = self.state();
        state.chain.iter().chain(&state.next).chain(&state.active).cloned().collect()
    }

    /// Puts other handles in the place of those that [`buffers`](Self::buffers) gave.
    pub(super) fn put_buffers(&self, buffers: Vec<Buffer>) {
        let mut state = self.state();
        let state = &mut *state;
        let places = state.chain.iter_mut().chain(&mut state.next).chain(&mut state.active);
        for (place, buffer) in places.zip(buffers) {
            *place = buffer;
        }
    }
}
