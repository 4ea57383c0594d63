/// How requests and replies are laid out after the handshake (§4, §5); each mode can do all that
/// the ones before it can.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum TransmissionMode {
    /// Compact requests, one reply to each.
    #[default]
    Simple,
    /// Compact requests, replies in chunks: reads with holes, errors with texts, block status.
    Structured,
    /// Extended requests, with 64-bit lengths, and replies in chunks.
    Extended,
}

impl TransmissionMode {
    /// Replies are made of chunks.
    #[must_use]
    pub fn is_structured(self) -> bool {
        self >= TransmissionMode::Structured
    }

    /// Headers are extended.
    #[must_use]
    pub fn is_extended(self) -> bool {
        self == TransmissionMode::Extended
    }

    /// Bytes of a request's fixed part.
    #[must_use]
    pub fn request_header_size(self) -> usize {
        if self.is_extended() {
            super::RequestHeader::EXTENDED_SIZE
        } else {
            super::RequestHeader::SIZE
        }
    }
}
