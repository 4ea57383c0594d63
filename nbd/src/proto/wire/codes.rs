//! Codes that a peer may extend.

use std::fmt;

use super::{PRIVATE_OPTION_BASE, PRIVATE_OPTION_LAST};

/// An open set of codes: a newtype, its known values, and a `Debug` that names them.
macro_rules! codes {
    ($(#[$doc:meta])* $name:ident($int:ty) { $($(#[$vdoc:meta])* $value:ident = $number:expr;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $int);

        impl $name {
            $($(#[$vdoc])* pub const $value: Self = Self($number);)*

            /// The protocol's name of the code, if it is a known one.
            #[must_use]
            pub fn name(self) -> Option<&'static str> {
                match self {
                    $(Self::$value => Some(stringify!($value)),)*
                    _ => None,
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

codes! {
    /// Something a client asks for during the handshake (§2).
    OptionCode(u32) {
        /// Chooses an export without a way to refuse.
        EXPORT_NAME = 1;
        /// Ends the connection.
        ABORT = 2;
        /// Lists the exports.
        LIST = 3;
        /// Withdrawn.
        PEEK_EXPORT = 4;
        /// Starts TLS.
        STARTTLS = 5;
        /// Describes an export.
        INFO = 6;
        /// Describes an export and starts transmission.
        GO = 7;
        /// Switches to structured replies.
        STRUCTURED_REPLY = 8;
        /// Lists meta contexts.
        LIST_META_CONTEXT = 9;
        /// Chooses meta contexts.
        SET_META_CONTEXT = 10;
        /// Switches to extended headers.
        EXTENDED_HEADERS = 11;
    }
}

impl OptionCode {
    /// Lies in the range that [`PRIVATE_OPTION_BASE`] starts.
    #[must_use]
    pub fn is_private(self) -> bool {
        (PRIVATE_OPTION_BASE..=PRIVATE_OPTION_LAST).contains(&self.0)
    }
}

codes! {
    /// The kind of a reply to an option (§2).
    ReplyType(u32) {
        /// Done.
        ACK = 1;
        /// One export of a list.
        SERVER = 2;
        /// One piece of information on an export.
        INFO = 3;
        /// One meta context.
        META_CONTEXT = 4;
        /// The option is not known or not allowed in this phase.
        ERR_UNSUP = (1 << 31) + 1;
        /// Forbidden by configuration.
        ERR_POLICY = (1 << 31) + 2;
        /// Malformed.
        ERR_INVALID = (1 << 31) + 3;
        /// Not possible on this platform.
        ERR_PLATFORM = (1 << 31) + 4;
        /// Only with TLS.
        ERR_TLS_REQD = (1 << 31) + 5;
        /// No such export, or it is not available.
        ERR_UNKNOWN = (1 << 31) + 6;
        /// The server goes away.
        ERR_SHUTDOWN = (1 << 31) + 7;
        /// Only for clients that asked for the block size.
        ERR_BLOCK_SIZE_REQD = (1 << 31) + 8;
        /// Too much asked for.
        ERR_TOO_BIG = (1 << 31) + 9;
        /// Only with extended headers.
        ERR_EXT_HEADER_REQD = (1 << 31) + 10;
    }
}

impl ReplyType {
    /// An error; its data is a text.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 & (1 << 31) != 0
    }
}

codes! {
    /// A piece of information on an export (§2).
    InfoType(u16) {
        /// Size and transmission flags.
        EXPORT = 0;
        /// Canonical name.
        NAME = 1;
        /// Description for people.
        DESCRIPTION = 2;
        /// Minimum, preferred and maximum size of requests.
        BLOCK_SIZE = 3;
    }
}

codes! {
    /// What a request asks for (§4).
    Command(u16) {
        /// Reads a range.
        READ = 0;
        /// Writes the payload.
        WRITE = 1;
        /// Ends the session; has no reply.
        DISC = 2;
        /// Makes completed writes durable.
        FLUSH = 3;
        /// Content no longer needed.
        TRIM = 4;
        /// Content soon needed.
        CACHE = 5;
        /// Makes a range read as zeroes.
        WRITE_ZEROES = 6;
        /// Asks for the state of a range in every selected context.
        BLOCK_STATUS = 7;
        /// Experimental.
        RESIZE = 8;
    }
}

codes! {
    /// The kind of a structured or extended reply chunk (§5).
    ChunkType(u16) {
        /// Nothing but the end of the reply.
        NONE = 0;
        /// Offset and data.
        OFFSET_DATA = 1;
        /// Offset and size of a range of zeroes.
        OFFSET_HOLE = 2;
        /// Extents of one context.
        BLOCK_STATUS = 5;
        /// Extents of one context, 64 bits wide.
        BLOCK_STATUS_EXT = 6;
        /// Failure of the request.
        ERROR = (1 << 15) + 1;
        /// Failure at an offset.
        ERROR_OFFSET = (1 << 15) + 2;
    }
}

impl ChunkType {
    /// Of the error class, whether known or not.
    #[must_use]
    pub fn is_error(self) -> bool {
        self.0 & (1 << 15) != 0
    }
}

codes! {
    /// An error number as it is sent (§6).
    Errno(u32) {
        /// No error.
        OK = 0;
        /// Not permitted: a write to a read-only export.
        EPERM = 1;
        /// Input or output failed.
        EIO = 5;
        /// Out of memory.
        ENOMEM = 12;
        /// Not acceptable. What a client does not know counts as this.
        EINVAL = 22;
        /// No space, or a write beyond the end.
        ENOSPC = 28;
        /// Too much asked for.
        EOVERFLOW = 75;
        /// A `FAST_ZERO` that would not be fast.
        ENOTSUP = 95;
        /// The server goes away.
        ESHUTDOWN = 108;
    }
}
