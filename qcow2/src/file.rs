//! The file below: any offset, any length, zeroes beyond the end.

use std::sync::Arc;

use brep_block::{
    BlockDevice, Error, ErrorKind, FlushLevel, LockMode, Operation, RangeLock, Result, WriteFlags,
    zeroes,
};
use bytes::{Bytes, BytesMut};

/// The device that carries the image. It hides the alignment that the device may demand.
#[derive(Debug, Clone)]
pub(crate) struct File {
    device: Arc<dyn BlockDevice>,
    /// What requests must be multiples of, in bytes.
    align: u64,
    /// Longest request, in bytes; a multiple of `align`.
    chunk: u64,
    /// Serialises the read-modify-write of shared blocks.
    blocks: RangeLock,
}

impl File {
    pub(crate) fn new(device: Arc<dyn BlockDevice>) -> Self {
        let limits = device.limits();
        let align = u64::from(limits.block_size.max(1));
        let chunk = (u64::from(limits.transfer_max) / align * align).max(align);
        File { device, align, chunk, blocks: RangeLock::new() }
    }

    pub(crate) fn name(&self) -> &str {
        self.device.name()
    }

    pub(crate) fn size(&self) -> u64 {
        self.device.size()
    }

    pub(crate) fn read_only(&self) -> bool {
        self.device.limits().read_only
    }

    pub(crate) fn growable(&self) -> bool {
        self.device.limits().growable
    }

    /// Reads `len` bytes; what lies beyond the end of the file reads as zeroes.
    pub(crate) async fn read(&self, offset: u64, len: usize) -> Result<Bytes> {
        let size = self.device.size();
        let inside = size.saturating_sub(offset).min(len as u64) as usize;
        if inside == 0 {
            return Ok(zeroes(len));
        }
        if inside == len && self.is_aligned(offset, len as u64) && len as u64 <= self.chunk {
            return self.device.read(offset, len).await;
        }
        let mut out = BytesMut::with_capacity(len);
        while out.len() < inside {
            let at = offset + out.len() as u64;
            let start = at / self.align * self.align;
            let skip = (at - start) as usize;
            let want = (inside - out.len() + skip) as u64;
            let padded = want.div_ceil(self.align) * self.align;
            let take = padded.min(self.chunk).min(size - start);
            let part = self.device.read(start, take as usize).await?;
            let usable = (part.len().saturating_sub(skip)).min(inside - out.len());
            if usable == 0 {
                return Err(Error::new(
                    Operation::Read,
                    ErrorKind::Io,
                    self.device.name(),
                    "short read",
                )
                .at(at, want));
            }
            out.extend_from_slice(&part[skip..skip + usable]);
        }
        out.resize(len, 0);
        Ok(out.freeze())
    }

    /// Writes all of `data`; the file grows as needed.
    pub(crate) async fn write(&self, offset: u64, data: Bytes) -> Result<()> {
        let len = data.len() as u64;
        if self.is_aligned(offset, len) {
            if len <= self.chunk {
                return self.device.write(offset, data, WriteFlags::default()).await;
            }
            let mut done = 0;
            while done < data.len() {
                let end = data.len().min(done + self.chunk as usize);
                let part = data.slice(done..end);
                self.device.write(offset + done as u64, part, WriteFlags::default()).await?;
                done = end;
            }
            return Ok(());
        }
        self.write_unaligned(offset, data).await
    }

    async fn write_unaligned(&self, offset: u64, data: Bytes) -> Result<()> {
        let start = offset / self.align * self.align;
        let end = (offset + data.len() as u64).div_ceil(self.align) * self.align;
        let _guard = self.blocks.lock(start..end, LockMode::Exclusive).await;
        let mut at = start;
        while at < end {
            let len = self.chunk.min(end - at);
            let mut block = BytesMut::from(&*self.read(at, len as usize).await?);
            let from = offset.max(at);
            let to = (offset + data.len() as u64).min(at + len);
            block[(from - at) as usize..(to - at) as usize]
                .copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
            self.device.write(at, block.freeze(), WriteFlags::default()).await?;
            at += len;
        }
        Ok(())
    }

    fn is_aligned(&self, offset: u64, len: u64) -> bool {
        self.align == 1 || (offset | len).is_multiple_of(self.align)
    }

    pub(crate) async fn flush(&self, level: FlushLevel) -> Result<()> {
        self.device.flush(level).await
    }

    pub(crate) async fn truncate(&self, size: u64) -> Result<()> {
        self.device.truncate(size).await
    }

    /// Gives the space of a range back; only a hint, so that a failure is of no consequence.
    pub(crate) async fn punch(&self, offset: u64, len: u64) {
        let limits = self.device.limits();
        let end = (offset + len).min(self.device.size());
        if !limits.can_discard || offset >= end {
            return;
        }
        if let Err(error) = self.device.discard(offset, end - offset).await {
            tracing::debug!(%error, "punching a hole failed");
        }
    }
}
