//! The link: the one connection between the two sides that carries no data, only what they have
//! to agree on. It is reached through the secondary's NBD address by a private option.
mod framed;
mod message;

pub use framed::{LinkReader, LinkWriter, split};
pub use message::{
    CopyMode, DiskInfo, FRAME_LEN_MAX, Hello, HelloAnswer, LINK_VERSION, MapsInfo, Message,
    RANGES_MAX, RefusalKind, Side, StopReason,
};

use std::time::Duration;

use brep_nbd::proto::wire::PRIVATE_OPTION_BASE;

/// How long a side may be silent: a quarter of the shorter of both sides' timeouts.
pub fn heartbeat_pause(mine: Duration, theirs_ms: u64) -> Duration {
    // Not less than a millisecond, whatever the other side says.
    (mine.min(Duration::from_millis(theirs_ms)) / 4).max(Duration::from_millis(1))
}

/// A timeout as hello tells it.
pub fn timeout_ms(timeout: Duration) -> u64 {
    u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX)
}

/// The private NBD option that turns a connection into a link; its data is [`LINK_VERSION`] as a
/// big-endian u32.
pub const OPTION_LINK: u32 = PRIVATE_OPTION_BASE + 1;

/// The private NBD option that binds a data connection to a session: 16 bytes of token, then the
/// slot as a big-endian u32.
pub const OPTION_BIND: u32 = PRIVATE_OPTION_BASE + 2;
