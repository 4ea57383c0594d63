//! NBD.

mod endpoint;
mod stream;
mod uri;

pub mod client;
pub mod proto;
pub mod server;
