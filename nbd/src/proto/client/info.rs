use super::HandshakeError;
use crate::proto::wire::{InfoType, PAYLOAD_LEN_MAX, Reader, STRING_LEN_MAX, TransmissionFlags};

/// Largest minimum block size that the protocol allows, in bytes.
const BLOCK_SIZE_MIN_LIMIT: u32 = 65_536;

/// What the server says of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportInfo {
    /// Size in bytes.
    pub size: u64,
    /// What the export can do.
    pub flags: TransmissionFlags,
    /// Constraints on requests; the protocol's defaults if the server named none.
    pub block_sizes: BlockSizes,
    /// The name by which the server knows the export, if it says so.
    pub canonical_name: Option<String>,
    /// A text for people, if there is one.
    pub description: Option<String>,
}

/// Constraints on the sizes of requests, in bytes (§8).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Offsets and lengths are multiples of this power of two.
    pub min: u32,
    /// Requests of this size, aligned to it, are served best; a power of two.
    pub preferred: u32,
    /// Longest payload.
    pub max: u32,
}

impl Default for BlockSizes {
    fn default() -> Self {
        BlockSizes { min: 1, preferred: 4096, max: PAYLOAD_LEN_MAX }
    }
}

/// One line of a server's list of exports.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct ListedExport {
    /// Name of the export.
    pub name: String,
    /// A text for people; empty if there is none.
    pub description: String,
}

/// Collects the `INFO` replies to one `INFO` or `GO`.
#[derive(Debug, Default)]
pub(super) struct InfoCollector {
    export: Option<(u64, TransmissionFlags)>,
    block_sizes: Option<BlockSizes>,
    canonical_name: Option<String>,
    description: Option<String>,
}

impl InfoCollector {
    pub(super) fn of_export_name(size: u64, flags: TransmissionFlags) -> Self {
        InfoCollector { export: Some((size, flags)), ..Self::default() }
    }

    /// Takes in the data of one `INFO` reply. Unknown kinds are ignored.
    pub(super) fn take(&mut self, data: &[u8]) -> Result<(), HandshakeError> {
        let mut reader = Reader::new(data);
        let kind = InfoType(reader.u16().ok_or(HandshakeError::Malformed("INFO reply"))?);
        match kind {
            InfoType::EXPORT => {
                self.export = Some(export(reader).ok_or(HandshakeError::Malformed("EXPORT info"))?);
            }
            InfoType::BLOCK_SIZE => {
                let sizes = block_sizes(reader)
                    .ok_or(HandshakeError::Malformed("BLOCK_SIZE info"))?
                    .checked()?;
                self.block_sizes = Some(sizes);
            }
            InfoType::NAME => self.canonical_name = Some(string(reader.rest(), "NAME info")?),
            InfoType::DESCRIPTION => {
                self.description = Some(string(reader.rest(), "DESCRIPTION info")?);
            }
            _ => {}
        }
        Ok(())
    }

    /// What the replies amount to, now that all have come.
    pub(super) fn finish(self) -> Result<ExportInfo, HandshakeError> {
        let (size, flags) = self.export.ok_or(HandshakeError::NoExportInfo)?;
        if !flags.contains(TransmissionFlags::HAS_FLAGS) {
            return Err(HandshakeError::NoFlags(flags.0));
        }
        // Offsets of files are signed: to many this would be negative.
        if i64::try_from(size).is_err() {
            return Err(HandshakeError::SizeTooLarge(size));
        }
        let block_sizes = self.block_sizes.unwrap_or_default();
        if !size.is_multiple_of(u64::from(block_sizes.min)) {
            return Err(HandshakeError::SizeNotMultiple { size, min: block_sizes.min });
        }
        Ok(ExportInfo {
            size,
            flags,
            block_sizes,
            canonical_name: self.canonical_name,
            description: self.description,
        })
    }
}

fn export(mut reader: Reader<'_>) -> Option<(u64, TransmissionFlags)> {
    let export = (reader.u64()?, TransmissionFlags(reader.u16()?));
    reader.is_empty().then_some(export)
}

fn block_sizes(mut reader: Reader<'_>) -> Option<BlockSizes> {
    let sizes = BlockSizes { min: reader.u32()?, preferred: reader.u32()?, max: reader.u32()? };
    reader.is_empty().then_some(sizes)
}

impl BlockSizes {
    fn checked(self) -> Result<Self, HandshakeError> {
        let good = self.min.is_power_of_two()
            && self.min <= BLOCK_SIZE_MIN_LIMIT
            && self.preferred.is_power_of_two()
            && self.preferred >= self.min
            && self.max >= self.min;
        if good { Ok(self) } else { Err(HandshakeError::BlockSizes(self)) }
    }
}

/// A string of the protocol: UTF-8, without NUL, of limited length.
pub(super) fn string(bytes: &[u8], what: &'static str) -> Result<String, HandshakeError> {
    if bytes.len() > STRING_LEN_MAX || bytes.contains(&0) {
        return Err(HandshakeError::Malformed(what));
    }
    match std::str::from_utf8(bytes) {
        Ok(text) => Ok(text.to_owned()),
        Err(_) => Err(HandshakeError::Malformed(what)),
    }
}
