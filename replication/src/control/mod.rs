//! The control socket: JSON lines over a unix socket, in QMP's manner.
//!
//! * [`ControlServer`] accepts clients and passes their commands, checked against
//!   [`CommandSpec`], to a [`Handler`].
//! * [`EventBus`] carries events from anywhere in the process to every client.
//! * [`ControlClient`] is the other end, for programs that just want an answer.
//!
//! A client is greeted, says `qmp_capabilities`, and from then on its commands are executed in
//! order, one at a time; clients do not wait for each other. A client that has enabled `oob` may
//! have some commands executed out of band, past those that are queued. What a client sends can
//! fail its own commands or close its own connection, and nothing else.
mod client;
mod connection;
mod error;
mod event;
mod frame;
mod json;
mod listener;
mod request;
mod server;
mod spec;
#[cfg(test)]
mod tests;

pub use client::{ClientError, ControlClient, Event};
pub use connection::SERVER_COMMANDS;
pub use error::{CommandError, ErrorClass};
pub use event::EventBus;
#[cfg(feature = "simulation")]
pub(crate) use event::Listener;
pub use server::{ControlServer, ServerLimits, serve};
pub use spec::{ArgumentKind, ArgumentSpec, CommandSpec, Variant};

use futures_util::future::BoxFuture;
use serde_json::{Map, Value};

/// What carries out the commands of the control socket.
pub trait Handler: Send + Sync + 'static {
    /// The commands that exist, apart from the server's own (`qmp_capabilities`,
    /// `query-commands`, `query-version`). Arguments that do not fit these descriptions never
    /// reach [`execute`](Self::execute). Descriptions are best written as a `const`.
    fn commands(&self) -> &'static [CommandSpec];

    /// Executes a command of [`commands`](Self::commands). Those that may be executed out of band
    /// have to answer at once, whatever the data path is waiting for. The future may be
    /// dropped only when the server shuts down and its grace period has passed.
    ///
    /// # Errors
    /// Whatever the client is to be told; nothing of the command has happened then, or the
    /// description says what has.
    fn execute(
        &self,
        command: &str,
        arguments: Map<String, Value>,
    ) -> BoxFuture<'_, Result<Value, CommandError>>;

    /// What the event `BREP_STATE` tells whenever it has changed; none: nothing can be said now.
    /// Has to answer at once.
    fn state(&self) -> Option<Value> {
        None
    }
}
