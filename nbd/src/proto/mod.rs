//! The protocol without I/O: bytes in, events out.
//!
//! * [`wire`]: constants and headers, used by both sides.
//! * [`server`]: a server's handshake, and its decoder of requests.
//! * [`client`]: a client's handshake, and its decoder of replies.

pub mod client;
pub mod server;
pub mod wire;
