use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use brep_block::BlockDevice;
use bytes::Bytes;
use futures_util::future::BoxFuture;

use super::Server;
use super::connection::Connection;
use super::contexts::{AllocationDepth, MetaContext};
use super::taken::TakenStream;
use crate::proto::server::{ExportDescription, ExportInfo, OptionError, OptionErrorCode};
use crate::proto::wire::{ALLOCATION_DEPTH, BASE_ALLOCATION, DIRTY_BITMAP_PREFIX, STRING_LEN_MAX};

/// What a server serves: the answers that only its user can give.
///
/// Names are looked up anew for every option, so exports may come and go at any time; a
/// connection that has chosen an export keeps it until it ends.
pub trait Exports: Send + Sync + 'static {
    /// Where a client is served that has asked for this; none: here. Asked before the others, for the
    /// first option that names something; what follows is answered there.
    fn home(&self, wanted: Wanted<'_>) -> Option<Home> {
        let _ = wanted;
        None
    }

    /// The exports to be listed.
    fn list(&self) -> Vec<ExportDescription>;

    /// The export of this name, for a client that wants to know about it or to use it; the empty
    /// name is the default export. Must be cheap, without I/O: the client has not yet said that
    /// it means it.
    ///
    /// # Errors
    /// Sent to the client. Where the option has no error reply the connection is closed.
    fn open(&self, name: &str, connection: &Arc<Connection>) -> Result<Export, OptionError>;

    /// A client has chosen this export: its requests follow.
    fn begin(&self, export: &Export, connection: &Arc<Connection>) {
        let _ = (export, connection);
    }

    /// An option of the private range (`PRIVATE_OPTION_BASE` and up), which means nothing to NBD.
    /// The handshake's deadline stands still meanwhile. The future is dropped if the connection
    /// is closed by [`Connection::close`] or by the end of a shutdown.
    fn private_option<'a>(
        &'a self,
        connection: &'a Arc<Connection>,
        option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        let _ = (connection, option, data);
        Box::pin(std::future::ready(PrivateReply::Unsupported))
    }
}

/// What a client has asked for.
#[derive(Debug, Clone, Copy)]
pub enum Wanted<'a> {
    /// The export of this name.
    Export(&'a str),
    /// A private option: its number and its data.
    Private(u32, &'a [u8]),
}

/// Another server, which takes a client over in the middle of its handshake.
#[derive(Debug, Clone)]
pub struct Home {
    /// The server. Its limits and exports count from then on.
    pub server: Arc<Server>,
    /// The runtime in which it serves the client.
    pub runtime: tokio::runtime::Handle,
}

/// A device under the conditions under which it is served.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Export {
    /// The disk.
    pub device: Arc<dyn BlockDevice>,
    /// Refuse changes although the device takes them.
    pub read_only: bool,
    /// Let clients change the size (`NBD_CMD_RESIZE`, which is experimental). Every connection
    /// then goes by the size that the device has at the moment.
    pub resizable: bool,
    /// Tell clients that a flush on one connection covers what has completed on all others, so
    /// that they may spread their requests. True of every device of this workspace that is served
    /// by one process alone.
    pub multi_conn: bool,
    /// A text for people; may be empty.
    pub description: String,
    /// The name that is the same however the export was asked for.
    pub canonical_name: String,
    /// Only for clients that have begun TLS.
    pub tls_required: bool,
    /// Only for clients whose certificate has one of these subjects, as
    /// [`TlsPeer::subject`](crate::tls::TlsPeer::subject) writes them. None: for all.
    pub allowed_subjects: Option<Arc<[String]>>,
    /// The meta contexts besides `base:allocation`, which is always there, by their whole names.
    /// Those whose name is no "namespace:leaf" of at most 4096 bytes are not offered.
    pub contexts: BTreeMap<String, Arc<dyn MetaContext>>,
}

impl Export {
    /// Writable as far as the device is, for one connection at a time.
    pub fn new(canonical_name: impl Into<String>, device: Arc<dyn BlockDevice>) -> Self {
        Export {
            device,
            read_only: false,
            resizable: false,
            multi_conn: false,
            description: String::new(),
            canonical_name: canonical_name.into(),
            tls_required: false,
            allowed_subjects: None,
            contexts: BTreeMap::new(),
        }
    }

    /// Refuses changes.
    #[must_use]
    pub fn read_only(mut self, read_only: bool) -> Self {
        self.read_only = read_only;
        self
    }

    /// Lets clients change the size.
    #[must_use]
    pub fn resizable(mut self, resizable: bool) -> Self {
        self.resizable = resizable;
        self
    }

    /// Promises what [`multi_conn`](Self::multi_conn) says.
    #[must_use]
    pub fn multi_conn(mut self, multi_conn: bool) -> Self {
        self.multi_conn = multi_conn;
        self
    }

    /// Describes the export to people.
    #[must_use]
    pub fn description(mut self, description: impl Into<String>) -> Self {
        self.description = description.into();
        self
    }

    /// Keeps out those that do not use TLS.
    #[must_use]
    pub fn tls_required(mut self, required: bool) -> Self {
        self.tls_required = required;
        self
    }

    /// Keeps out those whose certificate does not have one of these subjects; with `None` nobody
    /// for that.
    #[must_use]
    pub fn allowed_subjects(mut self, subjects: Option<Arc<[String]>>) -> Self {
        self.allowed_subjects = subjects;
        self
    }

    /// Offers a meta context of this name, in place of one that has it already.
    #[must_use]
    pub fn context(mut self, name: impl Into<String>, context: Arc<dyn MetaContext>) -> Self {
        self.contexts.insert(name.into(), context);
        self
    }

    /// Offers a dirty bitmap as the meta context `qemu:dirty-bitmap:NAME`; bit 0 of its flags
    /// means "dirty".
    #[must_use]
    pub fn dirty_bitmap(self, name: &str, bitmap: Arc<dyn MetaContext>) -> Self {
        self.context(format!("{DIRTY_BITMAP_PREFIX}{name}"), bitmap)
    }

    /// Offers the meta context `qemu:allocation-depth`: in which of these layers, from the
    /// device's own to the lowest, the content of a range lies. A layer says so itself
    /// ([`StatusFlags::allocated`](brep_block::StatusFlags)).
    #[must_use]
    pub fn allocation_depth(self, layers: Vec<Arc<dyn BlockDevice>>) -> Self {
        self.context(ALLOCATION_DEPTH, Arc::new(AllocationDepth(layers)))
    }

    /// The export itself, if this client may have it.
    pub(super) fn admit(self, connection: &Connection) -> Result<Self, OptionError> {
        let refuse = |code, message: String| Err(OptionError::new(code, message));
        match (connection.tls_peer(), &self.allowed_subjects) {
            (None, subjects) if self.tls_required || subjects.is_some() => {
                refuse(OptionErrorCode::TlsRequired, "this export is for TLS only".to_owned())
            }
            (Some(peer), Some(subjects)) if !subjects.contains(&peer.subject) => {
                tracing::warn!(
                    export = self.canonical_name,
                    peer = connection.peer(),
                    "refused: the certificate's subject {:?} is not among those that are allowed",
                    peer.subject
                );
                refuse(
                    OptionErrorCode::Policy,
                    format!("{} is not allowed to use this export", peer.subject),
                )
            }
            _ => Ok(self),
        }
    }

    pub(super) fn info(&self) -> ExportInfo {
        let limits = self.device.limits();
        // What a device says of itself is fitted into what the protocol can say.
        let block_size = limits.block_size.clamp(1, 65_536).next_power_of_two();
        let preferred_size = limits.preferred_size.clamp(512, 32 << 20).next_power_of_two();
        let can_be_asked_for = |name: &&String| {
            name.contains(':') && name.len() <= STRING_LEN_MAX && *name != BASE_ALLOCATION
        };
        ExportInfo {
            contexts: self.contexts.keys().filter(can_be_asked_for).cloned().collect(),
            canonical_name: self.canonical_name.clone(),
            description: self.description.clone(),
            size: self.device.size(),
            read_only: self.read_only || limits.read_only,
            resizable: self.resizable,
            multi_conn: self.multi_conn,
            block_size,
            preferred_size: preferred_size.max(block_size),
        }
    }
}

/// What goes on with a connection whose byte stream has been taken over.
pub type Takeover = Box<dyn FnOnce(TakenStream) -> BoxFuture<'static, ()> + Send>;

/// The answer to a private option.
#[non_exhaustive]
pub enum PrivateReply {
    /// The option is not known here.
    Unsupported,
    /// Done. What is not empty is sent as a `PRIVATE_REPLY`, then `ACK` follows.
    Ack(Bytes),
    /// Refused.
    Error(OptionError),
    /// As `Ack`; after that the connection no longer speaks NBD. `then` gets the byte stream,
    /// beginning with what the client has already sent after the option, and runs in the
    /// connection's task; its end is the connection's end.
    Takeover {
        /// Sent before `ACK` unless it is empty.
        reply: Bytes,
        /// Gets the byte stream.
        then: Takeover,
    },
}

impl fmt::Debug for PrivateReply {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PrivateReply::Unsupported => f.write_str("Unsupported"),
            PrivateReply::Ack(data) => write!(f, "Ack({} bytes)", data.len()),
            PrivateReply::Error(error) => write!(f, "Error({error})"),
            PrivateReply::Takeover { reply, .. } => write!(f, "Takeover({} bytes)", reply.len()),
        }
    }
}
