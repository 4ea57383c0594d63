//! Files of a disk that fail in a way that lasts.

use brep_block::Error as BlockError;

use super::{Buffer, ReplicaDisk};
use crate::Result;
use crate::config::Durability;

impl ReplicaDisk {
    /// Why a flush of the image, or of a buffer that pre-images go to, has failed, if one has.
    pub(in crate::secondary) fn failed_flush(&self) -> Option<BlockError> {
        let state = self.state();
        let newest = state.chain.last().or(state.next.as_ref());
        let of_files =
            || self.image.failed_flush().or_else(|| newest.and_then(Buffer::failed_flush));
        state.failed_flush.clone().or_else(of_files)
    }

    /// Why nothing is replicated until this side is started again, if that is so.
    pub(in crate::secondary) fn is_broken(&self) -> Option<BlockError> {
        let promised = self.pool.durability() == Durability::Power;
        self.image.failure().or_else(|| self.failed_flush().filter(|_| promised))
    }

    /// Whether a buffer takes no changes any more, and may if it is opened again.
    pub(in crate::secondary) fn has_failed_buffer(&self) -> bool {
        let state = self.state();
        let mut buffers = state.chain.iter().chain(&state.next).chain(&state.active);
        buffers.any(|buffer| buffer.image.failure().is_some())
    }

    /// Opens again what has failed. There is no session, nor any view, and the guest is held.
    ///
    /// # Errors
    /// A buffer still fails; nothing else has changed.
    pub(in crate::secondary) async fn reopen_buffers(&self) -> Result<()> {
        let mut buffers = self.buffers();
        let mut reopened = false;
        for buffer in &mut buffers {
            reopened |= buffer.reopen(self.pool.durability()).await?;
        }
        if reopened {
            self.put_buffers(buffers);
            self.rebuild_replica().await?;
        }
        Ok(())
    }
}
