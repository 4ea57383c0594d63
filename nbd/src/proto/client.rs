//! The client's side of the protocol: what it sends, and how it distrusts what it receives.
//!
//! * [`Handshake`] negotiates: greeting, options, export. Its [`Goal`] says what for.
//! * [`Transmission`] numbers requests, decodes replies, and checks every byte of them against
//!   the request that they answer.
//!
//! Neither does I/O: bytes go in and come out, and the caller moves them.

mod handshake;
mod info;
mod option_reply;
mod outstanding;
mod read_buffer;
mod slab;
mod transmission;

pub use handshake::{Goal, Handshake, HandshakeOptions, Outcome, Progress, SelectedContext};
pub use info::{BlockSizes, ExportInfo, ListedExport};
pub use option_reply::HandshakeError;
pub(crate) use slab::Slab;
pub use transmission::{
    Answer, Completion, DirectRead, Extent, Refusal, ReplyError, Request, Transmission,
};
