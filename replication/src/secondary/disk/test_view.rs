//! What a disk keeps for a writable scratch view of a checkpoint, while replication goes on.

use std::sync::Arc;

use brep_block::WriteFlags;
use brep_block::{BlockDevice, ZeroFlags};
use brep_qcow2::Qcow2;

use super::{Buffer, ReplicaDisk, State};
use crate::secondary::buffers::BufferPool;
use crate::secondary::scratch::ScratchDevice;
use crate::view::ChainView;
use crate::{Error, Result};

/// Bytes that are joined at a time.
const JOIN_STEP_BYTES: u64 = 1 << 20;

/// A view of a checkpoint is the hidden disks since then, the oldest first, over the image; those
/// that commits have given up are kept for it.
#[derive(Debug)]
pub(super) struct TestView {
    /// Hidden disks that commits have given up since the view was opened, the oldest first.
    retired: Vec<Buffer>,
    /// Bytes of pre-images in them, each epoch by itself.
    retired_bytes: u64,
    view: Arc<ChainView>,
    /// Takes what is written to the view.
    scratch: Buffer,
    device: Arc<ScratchDevice>,
}

impl TestView {
    /// The chain has changed: what the view shows stays the same.
    pub(super) fn follow(&self, chain: &[Buffer]) {
        let layers = self.retired.iter().chain(chain).map(Buffer::device);
        self.view.set_layers(layers.collect());
    }

    /// A commit has given hidden disks up, with so many bytes of pre-images.
    pub(super) fn keep(&mut self, retired: Vec<Buffer>, bytes: u64) {
        self.retired.extend(retired);
        self.retired_bytes += bytes;
    }
}

/// What a view leaves behind.
#[derive(Debug)]
pub(in crate::secondary) struct Remains {
    pool: Arc<BufferPool>,
    buffers: Vec<Buffer>,
    device: Arc<ScratchDevice>,
}

impl Remains {
    /// Gives the room back, when nobody reads any more.
    pub(in crate::secondary) async fn give_up(self) {
        self.device.unused().await;
        for buffer in self.buffers {
            let path = buffer.path().to_owned();
            if let Err(error) = self.pool.remove(buffer).await {
                tracing::warn!(path = %path.display(), %error, "a buffer stays until the next start");
            }
        }
    }
}

impl ReplicaDisk {
    /// Whether a view can be opened now.
    ///
    /// # Errors
    /// Nothing protects the checkpoint from what may be received.
    pub(in crate::secondary) fn check_test_view(&self) -> Result<()> {
        let state = self.state();
        match state.replica.is_some() && !state.chain.is_empty() {
            true => Ok(()),
            false => Err(Error::refused(format!(
                "disk {}: the checkpoint is the disk's file alone until a primary has connected; \
                 try again then",
                self.name
            ))),
        }
    }

    /// Opens a view of the last checkpoint; `make` wraps what `scratch` takes the writes of.
    pub(in crate::secondary) fn open_test_view(
        &self,
        scratch: Buffer,
        make: impl FnOnce(Arc<dyn BlockDevice>) -> Arc<ScratchDevice>,
    ) -> Result<()> {
        self.check_test_view()?;
        let mut state = self.state();
        let State { replica: Some(replica), chain, .. } = &*state else {
            return Err(Error::failed(format!("disk {}: no session", self.name)));
        };
        let layers = chain.iter().map(Buffer::device).collect();
        let base = Arc::clone(self.image.device());
        let view = ChainView::new(&self.name, layers, base, replica.filter.locks().clone());
        scratch.below.set(Some(Arc::clone(&view) as Arc<dyn BlockDevice>));
        let device = make(scratch.device());
        let (retired, retired_bytes) = (Vec::new(), 0);
        state.test = Some(TestView { retired, retired_bytes, view, scratch, device });
        Ok(())
    }

    /// The device of the view that is open.
    pub(in crate::secondary) fn test_device(&self) -> Option<Arc<ScratchDevice>> {
        self.state().test.as_ref().map(|test| Arc::clone(&test.device))
    }

    /// Bytes that are kept for the view alone, as far as is counted: each epoch by itself, and each
    /// write.
    pub(in crate::secondary) fn test_bytes(&self) -> (u64, u64) {
        let state = self.state();
        state.test.as_ref().map_or((0, 0), |test| (test.retired_bytes, test.device.written_bytes()))
    }

    /// Counts again: what was overwritten is counted once.
    ///
    /// # Errors
    /// A table could not be read.
    pub(in crate::secondary) async fn count_test_bytes(&self) -> Result<()> {
        let (retired, scratch, device) = {
            let state = self.state();
            let Some(test) = &state.test else { return Ok(()) };
            let retired: Vec<_> = test.retired.iter().map(|b| Arc::clone(&b.image)).collect();
            (retired, Arc::clone(&test.scratch.image), Arc::clone(&test.device))
        };
        let before = device.written_bytes();
        let written = scratch.allocated_bytes().await?;
        device.counted(before, written);
        let mut bytes = 0;
        for image in &retired {
            bytes += image.allocated_bytes().await?;
        }
        let mut state = self.state();
        if let Some(test) = &mut state.test
            && test.retired.len() == retired.len()
        {
            test.retired_bytes = bytes;
        }
        Ok(())
    }

    /// How many hidden disks are kept for the view alone.
    pub(in crate::secondary) fn test_depth(&self) -> usize {
        self.state().test.as_ref().map_or(0, |test| test.retired.len())
    }

    /// Ends the view: from now on its guests get errors. What it leaves is to be given up.
    pub(in crate::secondary) fn end_test_view(&self) -> Option<Remains> {
        let test = self.state().test.take()?;
        test.device.end();
        let mut buffers = test.retired;
        buffers.push(test.scratch);
        Some(Remains { pool: Arc::clone(&self.pool), buffers, device: test.device })
    }

    /// Joins two hidden disks that are kept for the view into the older one, so that there are few of
    /// them however many checkpoints are committed. False: there was nothing to be joined.
    ///
    /// # Errors
    /// One could not be read, or the other one not be written; the view is as it was.
    pub(in crate::secondary) async fn join_retired(&self) -> Result<bool> {
        let Some((older, newer, device)) = self.joinable() else { return Ok(false) };
        join(&older.image, &newer.image).await?;
        {
            let mut state = self.state();
            let state = &mut *state;
            let Some(test) = &mut state.test else { return Ok(false) };
            let position = test.retired.iter().position(|buffer| buffer.seq == newer.seq);
            // The view may have ended meanwhile, and another one been opened.
            let Some(position) = position else { return Ok(false) };
            test.retired.remove(position);
            test.follow(&state.chain);
        }
        let pool = Arc::clone(&self.pool);
        // Beside this, which may be given up.
        tokio::spawn(async move {
            // Whoever reads in it began before this.
            device.unused().await;
            if let Err(error) = pool.recycle(newer).await {
                tracing::warn!(%error, "a hidden disk of a test view was not emptied");
            }
        });
        Ok(true)
    }

    /// Two neighbours, the older one with units that are not larger: it would invent what is around
    /// a smaller one.
    fn joinable(&self) -> Option<(Buffer, Buffer, Arc<ScratchDevice>)> {
        let state = self.state();
        let test = state.test.as_ref()?;
        let fits = |pair: &&[Buffer]| pair[0].unit_bytes() <= pair[1].unit_bytes();
        let pair = test.retired.windows(2).find(fits)?;
        Some((pair[0].clone(), pair[1].clone(), Arc::clone(&test.device)))
    }
}

/// Copies what `newer` has and `older` lacks. Both are read meanwhile: a reader finds the same in
/// either of them.
async fn join(older: &Qcow2, newer: &Qcow2) -> Result<()> {
    let mut at = 0;
    while let Some(found) = newer.next_allocated(at).await? {
        at = found.start;
        while at < found.end {
            let there = older.layer_status(at, found.end - at).await?;
            if there.flags.allocated {
                at += there.len;
                continue;
            }
            let here = newer.layer_status(at, there.len.min(JOIN_STEP_BYTES)).await?;
            if here.flags.zero {
                older.write_zeroes(at, here.len, ZeroFlags::default()).await?;
            } else {
                // At most JOIN_STEP_BYTES, so it fits.
                let data = newer.read(at, here.len as usize).await?;
                older.write(at, data, WriteFlags::default()).await?;
            }
            at += here.len;
            tokio::task::yield_now().await;
        }
    }
    Ok(())
}
