use std::ops::Range;

use brep_block::{BlockDevice, FlushLevel, Result, Staging, WriteFlags, ZeroFlags};
use bytes::Bytes;

/// The target, as one copy sees it.
///
/// Where pre-images have to survive a loss of power, data is staged, and becomes the content only
/// when it is on stable storage: a mapping without its data would count as a pre-image. Copies that
/// go on at the same time share the flushes.
pub(crate) struct Target<'a> {
    device: &'a dyn BlockDevice,
    staging: Option<&'a dyn Staging>,
    staged: Vec<Range<u64>>,
}

impl<'a> Target<'a> {
    pub(crate) fn new(device: &'a dyn BlockDevice, barrier: Option<FlushLevel>) -> Self {
        let staging = device.staging().filter(|_| barrier == Some(FlushLevel::Durable));
        Target { device, staging, staged: Vec::new() }
    }

    pub(crate) async fn write(&mut self, offset: u64, data: Bytes) -> Result<()> {
        let Some(staging) = self.staging else {
            return self.device.write(offset, data, WriteFlags::default()).await;
        };
        let range = offset..offset + data.len() as u64;
        staging.stage(offset, data).await?;
        match self.staged.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.staged.push(range),
        }
        Ok(())
    }

    /// A mapping without data.
    pub(crate) async fn write_zeroes(&self, offset: u64, len: u64) -> Result<()> {
        let flags = ZeroFlags { may_unmap: true, ..ZeroFlags::default() };
        self.device.write_zeroes(offset, len, flags).await
    }

    /// Returns when everything that was written can be found again after what `level` names.
    pub(crate) async fn secure(self, level: FlushLevel) -> Result<()> {
        if let Some(staging) = self.staging.filter(|_| !self.staged.is_empty()) {
            self.device.flush(FlushLevel::Durable).await?;
            for range in self.staged {
                staging.publish(range.start, range.end - range.start).await?;
            }
        }
        self.device.flush(level).await
    }
}
