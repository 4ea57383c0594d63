//! What a server says of an export, and what a handshake leads to (§3, §8).

use crate::proto::wire::{TransmissionFlags, TransmissionMode};

/// One line of a list of exports.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportDescription {
    /// The name under which the export is opened.
    pub name: String,
    /// A text for people; may be empty.
    pub description: String,
}

/// What a client is told about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// The name that is the same however the export was asked for.
    pub canonical_name: String,
    /// A text for people; may be empty.
    pub description: String,
    /// In bytes; need not be a multiple of any block size.
    pub size: u64,
    /// Commands that change content are refused.
    pub read_only: bool,
    /// Clients may change the size.
    pub resizable: bool,
    /// A flush on one connection covers what completed on every other.
    pub multi_conn: bool,
    /// Every range has to be a multiple of this (a power of two up to 65536), in bytes.
    pub block_size: u32,
    /// Multiples of this work best (a power of two), in bytes.
    pub preferred_size: u32,
    /// The meta contexts that there are besides `base:allocation`, each name once and at most
    /// 4096 bytes long.
    pub contexts: Vec<String>,
}

impl ExportInfo {
    /// The flags of the transmission phase (§3). `contexts`: some are selected for this export.
    #[must_use]
    pub fn transmission_flags(&self, mode: TransmissionMode, contexts: bool) -> TransmissionFlags {
        let writable = TransmissionFlags::SEND_TRIM
            .with(TransmissionFlags::SEND_WRITE_ZEROES)
            .with(TransmissionFlags::SEND_FAST_ZERO);
        TransmissionFlags::HAS_FLAGS
            .with(TransmissionFlags::SEND_FLUSH)
            .with(TransmissionFlags::SEND_FUA)
            .with(TransmissionFlags::SEND_CACHE)
            .with_if(self.read_only, TransmissionFlags::READ_ONLY)
            .with_if(!self.read_only, writable)
            .with_if(!self.read_only && self.resizable, TransmissionFlags::SEND_RESIZE)
            .with_if(self.multi_conn, TransmissionFlags::CAN_MULTI_CONN)
            .with_if(mode.is_structured(), TransmissionFlags::SEND_DF)
            .with_if(mode.is_extended() && contexts, TransmissionFlags::BLOCK_STATUS_PAYLOAD)
    }
}

/// A meta context that a client has selected for its export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SelectedContext {
    /// How replies speak of it; unique within the connection.
    pub id: u32,
    /// Its whole name.
    pub name: String,
}

/// What both sides agreed on: the result of a handshake.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agreed {
    /// The export as it was described to the client.
    pub export: ExportInfo,
    /// How requests and replies are laid out.
    pub mode: TransmissionMode,
    /// The meta contexts that were selected for this export.
    pub contexts: Vec<SelectedContext>,
    /// The client asked for the block size, so it has to obey it.
    pub block_size_agreed: bool,
}
