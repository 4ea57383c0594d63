use brep_block::{BlockDevice, Limits};

use super::{ClientError, ConnectOptions, Connection};
use crate::proto::wire::TransmissionFlags;

/// What an export was when it was opened: what users were promised holds on every further
/// connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Opened {
    pub(super) size: u64,
    pub(super) limits: Limits,
    flags: TransmissionFlags,
}

impl Opened {
    pub(super) fn of(connection: &Connection) -> Self {
        let export = connection.export();
        Opened { size: export.size, limits: connection.limits(), flags: export.flags }
    }

    /// Refuses, and closes, a connection on which that does not hold.
    ///
    /// # Errors
    /// [`ClientError::Incompatible`].
    pub(super) fn check(
        self,
        connection: &Connection,
        options: &ConnectOptions,
    ) -> Result<(), ClientError> {
        let export = connection.export();
        let lost = |flag| self.flags.contains(flag) && !export.flags.contains(flag);
        let reason = if export.size < self.size {
            format!("it had {} bytes and now has {}", self.size, export.size)
        } else if !self.limits.read_only && connection.limits().read_only {
            "it is read-only now".to_owned()
        } else if lost(TransmissionFlags::SEND_FLUSH) {
            "it cannot be flushed any more".to_owned()
        } else if connection.limits().block_size > self.limits.block_size {
            format!("its blocks now have {} bytes", connection.limits().block_size)
        } else {
            return Ok(());
        };
        connection.close();
        Err(ClientError::Incompatible { server: options.endpoint.to_string(), reason })
    }
}
