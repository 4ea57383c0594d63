use std::fmt;
use std::sync::Arc;

use brep_block::{BlockDevice, Io};

use super::connection::Connection;
use super::exports::Export;
use crate::proto::server::Agreed;
use crate::proto::wire::{AllocationFlags, BASE_ALLOCATION};

/// Something that a server can tell of every range of an export: the source of one meta context.
pub trait MetaContext: Send + Sync + fmt::Debug {
    /// The state of the first bytes of a range that lies inside the export: at least 1 and at
    /// most `len` bytes share it. Neighbouring extents need not differ.
    fn status(&self, offset: u64, len: u64) -> Io<'_, ContextStatus>;
}

/// What a [`MetaContext`] says of a range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ContextStatus {
    /// How many bytes, counted from the start of the query, share the flags. At least 1.
    pub len: u64,
    /// What they mean is up to the context.
    pub flags: u32,
}

/// What the requests of a connection go to: a device, and the meta contexts that were selected.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) connection: Arc<Connection>,
    pub(super) device: Arc<dyn BlockDevice>,
    pub(super) contexts: Vec<(u32, Arc<dyn MetaContext>)>,
}

impl Target {
    pub(super) fn new(export: Export, agreed: &Agreed, connection: Arc<Connection>) -> Self {
        let find = |name: &str| match name {
            BASE_ALLOCATION => Some(Arc::new(Allocation(Arc::clone(&export.device))) as _),
            _ => export.contexts.get(name).cloned(),
        };
        // What was selected is there: the handshake has compared.
        let contexts = agreed.contexts.iter().filter_map(|selected| {
            find(&selected.name).map(|context: Arc<dyn MetaContext>| (selected.id, context))
        });
        Target { connection, contexts: contexts.collect(), device: export.device }
    }
}

/// `base:allocation`.
#[derive(Debug)]
struct Allocation(Arc<dyn BlockDevice>);

impl MetaContext for Allocation {
    fn status(&self, offset: u64, len: u64) -> Io<'_, ContextStatus> {
        let status = self.0.block_status(offset, len);
        Io::future(async move {
            let status = status.await?;
            let flags = AllocationFlags::NONE
                .with_if(!status.flags.data, AllocationFlags::HOLE)
                .with_if(status.flags.zero, AllocationFlags::ZERO);
            Ok(ContextStatus { len: status.len, flags: flags.0 })
        })
    }
}

/// `qemu:allocation-depth`: the layers from the top down.
#[derive(Debug)]
pub(super) struct AllocationDepth(pub(super) Vec<Arc<dyn BlockDevice>>);

impl MetaContext for AllocationDepth {
    fn status(&self, offset: u64, mut len: u64) -> Io<'_, ContextStatus> {
        Io::future(async move {
            for (layer, depth) in self.0.iter().zip(1..) {
                // A layer may be shorter than the one above it: the zeroes beyond its end count as its
                // own, as QEMU has it.
                let Some(inside) = layer.size().checked_sub(offset).filter(|inside| *inside > 0)
                else {
                    return Ok(ContextStatus { len, flags: depth });
                };
                let status = layer.block_status(offset, len.min(inside)).await?;
                len = status.len.clamp(1, len);
                if status.flags.allocated {
                    return Ok(ContextStatus { len, flags: depth });
                }
            }
            Ok(ContextStatus { len, flags: 0 })
        })
    }
}
