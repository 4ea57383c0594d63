#![doc = include_str!("../README.md")]

mod endpoint;
mod stream;
mod uri;

pub mod client;
pub mod proto;
pub mod server;
#[cfg(feature = "simulation")]
pub mod simulation;
pub mod tls;

pub use endpoint::Endpoint;
pub use stream::Stream;
pub use uri::{NbdUri, TlsKind, TlsParameters, UriError};
