use super::read_buffer::ReadBuffer;
use super::{Extent, Refusal, ReplyError, Request};
use crate::proto::wire::{ChunkType, Errno, Reader};

/// How much of an error text is kept, in bytes.
const MESSAGE_LEN_MAX: usize = 1024;

/// Most extents that are kept of replies that are not complete; of each context the first is. Whoever
/// asked asks again for the rest. As many as QEMU's server sends in one reply, twice: 4 MiB.
const EXTENTS_MAX: usize = 1 << 18;

/// A request without a complete reply, and what has come of that.
#[derive(Debug)]
pub(super) struct Outstanding {
    pub(super) tag: u64,
    pub(super) request: Request,
    /// A chunk of the reply has come.
    pub(super) begun: bool,
    pub(super) refusal: Option<Refusal>,
    /// The text of the first error, as far as it has come.
    pub(super) text: Vec<u8>,
    /// How many error chunks have begun.
    pub(super) texts: u32,
    pub(super) read: ReadBuffer,
    /// For each context.
    pub(super) extents: Vec<Vec<Extent>>,
    /// The context of which extents are coming, as an index.
    pub(super) context: usize,
}

impl Outstanding {
    /// A position on the disk as a position in the request.
    pub(super) fn relative(&self, offset: u64) -> Result<u64, ReplyError> {
        offset.checked_sub(self.request.offset).ok_or(ReplyError::OutsideRequest)
    }

    pub(super) fn hole(&mut self, body: &[u8; 12]) -> Result<(), ReplyError> {
        let mut reader = Reader::new(body);
        let offset = reader.u64().unwrap_or_default();
        let len = reader.u32().unwrap_or_default();
        if len == 0 {
            return Err(ReplyError::EmptyHole);
        }
        self.read.begin(self.relative(offset)?, len)?;
        self.read.put_zeroes(len);
        Ok(())
    }

    pub(super) fn begin_context(&mut self, id: u32, agreed: &[u32]) -> Result<(), ReplyError> {
        let index = agreed.iter().position(|agreed| *agreed == id);
        self.context = index.ok_or(ReplyError::Context(id))?;
        match self.extents.get(self.context) {
            Some(extents) if extents.is_empty() => Ok(()),
            _ => Err(ReplyError::RepeatedContext),
        }
    }

    /// `kept`: how many there are of all requests.
    pub(super) fn extent(
        &mut self,
        len: Option<u64>,
        flags: Option<u64>,
        kept: &mut usize,
    ) -> Result<(), ReplyError> {
        let (Some(len @ 1..), Some(flags)) = (len, flags) else {
            return Err(ReplyError::EmptyExtent);
        };
        if let Some(extents) = self.extents.get_mut(self.context)
            && (extents.is_empty() || *kept < EXTENTS_MAX)
        {
            extents.push(Extent { len, flags });
            *kept += 1;
        }
        Ok(())
    }

    /// Returns the length of the text, in bytes; `rest_len` is what follows in the chunk.
    pub(super) fn error(
        &mut self,
        head: &[u8; 6],
        kind: ChunkType,
        rest_len: u32,
    ) -> Result<u32, ReplyError> {
        let mut reader = Reader::new(head);
        let errno = Errno(reader.u32().unwrap_or_default());
        let text_len = u32::from(reader.u16().unwrap_or_default());
        if errno == Errno::OK {
            return Err(ReplyError::ErrorWithoutError);
        }
        let fits = match kind {
            ChunkType::ERROR => rest_len == text_len,
            ChunkType::ERROR_OFFSET => rest_len == text_len + 8,
            _ => rest_len >= text_len,
        };
        if !fits {
            return Err(ReplyError::ErrorText);
        }
        self.texts = self.texts.saturating_add(1);
        self.refusal.get_or_insert_with(|| Refusal { errno: known(errno), message: String::new() });
        Ok(text_len)
    }

    /// The text of the first error is kept; a server may cut it anywhere on its way.
    pub(super) fn error_text(&mut self, text: &[u8]) {
        if self.texts == 1 {
            let room = MESSAGE_LEN_MAX.saturating_sub(self.text.len());
            self.text.extend_from_slice(&text[..text.len().min(room)]);
        }
    }

    pub(super) fn error_offset(&self, offset: u64) -> Result<(), ReplyError> {
        let len = self.request.len;
        match offset.checked_sub(self.request.offset) {
            Some(relative) if relative < len || len == 0 => Ok(()),
            _ => Err(ReplyError::ErrorOffset),
        }
    }
}

/// What the protocol does not list counts as `EINVAL` (§6).
pub(super) fn known(errno: Errno) -> Errno {
    if errno.name().is_some() && errno != Errno::OK { errno } else { Errno::EINVAL }
}
