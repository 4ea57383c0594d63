//! The client: connects, keeps many requests in flight, reconnects.
//!
//! * [`Connection`] is one connection to one export, and a device.
//! * [`Client`] is a device that connects later, and again after a connection was lost.
//! * [`MultiConnection`] is one device over several connections.
//! * [`connect_private`] opens a connection for something else than NBD, through a private
//!   option; [`list_exports`] and [`describe_export`] ask a server what it has.

mod connect;
mod connection;
mod driver;
mod error;
mod multi;
mod opened;
mod operation;
mod options;
mod queue;
mod reconnect;
mod status;

pub use connect::{PrivateConnection, connect_private, describe_export, list_exports};
pub use connection::Connection;
pub use error::ClientError;
pub use multi::MultiConnection;
pub use options::{ConnectOptions, ReconnectPolicy};
pub use reconnect::{Client, ClientStatus};
