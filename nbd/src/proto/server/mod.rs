//! The server's side of the protocol, without I/O.
//!
//! 1. [`Handshake`] takes bytes and asks its driver what only the driver knows (which exports
//!    there are). Its output has to be sent before more input is given to it.
//! 2. When it ends with [`Step::Transmission`], what is left of the input goes to a [`Decoder`],
//!    which takes requests out of it; [`check`] says what a request means on this export, or why
//!    it is refused.
//! 3. A [`ReplyEncoder`] puts replies, in any order, into an [`Output`], whose segments are
//!    written to the socket; payloads are not copied.

mod agreement;
mod contexts;
mod handshake;
mod options;
mod output;
mod reply;
mod request;

pub use agreement::{Agreed, ExportDescription, ExportInfo, SelectedContext};
pub use handshake::{Ending, Handshake, Step, TlsPolicy};
pub use options::{OPTION_DATA_LEN_MAX, OptionError, OptionErrorCode};
pub use output::Output;
pub use reply::{Content, ContextExtents, Extent, Failure, ReadChunk, ReplyEncoder, RequestId};
pub use request::{Action, Decoder, Request, check};
