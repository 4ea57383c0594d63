use std::io;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::connection::Connection;
use super::json::to_line;
use super::{CommandError, EventBus, Handler};

/// How long a change of the state that no other event tells of is unknown at most.
const STATE_PERIOD: Duration = Duration::from_millis(250);

/// What a client of the control socket is allowed.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct ServerLimits {
    /// Clients at the same time. One more is told so and closed. 64 by default.
    pub clients_max: usize,
    /// Length of a message. A longer one is skipped and answered with an error. 64 KiB by
    /// default.
    pub message_bytes_max: usize,
    /// Commands of one client that wait behind the one that is executed, if it has enabled
    /// out-of-band execution; beyond that nothing is read from it. 8 by default. Without it the
    /// next command is read when the one before has been answered.
    pub queued_max: usize,
    /// How long a client may take to negotiate before it is closed. 30 s by default.
    pub negotiation_timeout: Duration,
    /// How long a client may leave an answer unread before it is closed. 10 s by default.
    pub write_timeout: Duration,
    /// How long running commands may go on after the shutdown began. 5 s by default.
    pub grace_period: Duration,
}

impl Default for ServerLimits {
    fn default() -> Self {
        ServerLimits {
            clients_max: 64,
            message_bytes_max: 64 << 10,
            queued_max: 8,
            negotiation_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(10),
            grace_period: Duration::from_secs(5),
        }
    }
}

/// The server's end of the control socket.
#[derive(Debug)]
pub struct ControlServer {
    listener: UnixListener,
    path: PathBuf,
    limits: ServerLimits,
}

impl ControlServer {
    /// Binds the socket, with mode 0600; clients can connect from now on, and are served by
    /// [`serve`](Self::serve). A socket that nobody listens on any more is replaced.
    ///
    /// # Errors
    /// If another instance listens there, if something that is no socket has the name, and what
    /// the operating system reports. The message names the path.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let listener = super::listener::bind(path)?;
        Ok(ControlServer { listener, path: path.to_owned(), limits: ServerLimits::default() })
    }

    /// Replaces the limits.
    #[must_use]
    pub fn with_limits(mut self, limits: ServerLimits) -> Self {
        self.limits = limits;
        self
    }

    /// Serves clients until `shutdown` is cancelled; then takes no more commands, lets running
    /// ones end within the grace period, and removes the socket.
    ///
    /// # Errors
    /// If the socket cannot be used with the current runtime.
    pub async fn serve(
        self,
        handler: Arc<dyn Handler>,
        events: EventBus,
        shutdown: CancellationToken,
    ) -> io::Result<()> {
        let listener = tokio::net::UnixListener::from_std(self.listener)?;
        let mut clients = JoinSet::new();
        let mut told = std::pin::pin!(tell_states(&*handler, &events));
        loop {
            tokio::select! {
                () = shutdown.cancelled() => break,
                never = &mut told => match never {},
                Some(_) = clients.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) if clients.len() >= self.limits.clients_max => turn_away(&stream),
                    Ok((stream, _)) => {
                        let connection =
                            Connection::new(stream, handler.clone(), events.clone(), self.limits);
                        clients.spawn(connection.run(shutdown.clone()));
                    }
                    Err(error) => {
                        tracing::warn!("control socket: accept: {error}");
                        // Out of descriptors, most likely: trying again at once would spin.
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
            }
        }
        drop(listener);
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::debug!("control socket {}: remove: {error}", self.path.display());
        }
        let ended = async { while clients.join_next().await.is_some() {} };
        if tokio::time::timeout(self.limits.grace_period, ended).await.is_err() {
            tracing::warn!("control socket: commands that did not end were given up");
        }
        Ok(())
    }
}

/// Binds a control socket and serves it until `shutdown` is cancelled.
///
/// # Errors
/// As [`ControlServer::bind`] and [`ControlServer::serve`].
pub async fn serve(
    path: &Path,
    handler: Arc<dyn Handler>,
    events: EventBus,
    shutdown: CancellationToken,
) -> io::Result<()> {
    ControlServer::bind(path)?.serve(handler, events, shutdown).await
}

/// Sends `BREP_STATE` whenever the state has changed: looked at after each event, and now and then.
async fn tell_states(handler: &dyn Handler, events: &EventBus) -> std::convert::Infallible {
    let mut last = handler.state();
    loop {
        // Both ways are the same: it is time to look.
        let _ = tokio::time::timeout(STATE_PERIOD, events.sent()).await;
        let Some(state) = handler.state() else { continue };
        if last.as_ref() != Some(&state) {
            events.emit("BREP_STATE", state.clone());
            last = Some(state);
        }
    }
}

/// Says why to a client that is one too many, if it can be said without waiting.
fn turn_away(stream: &UnixStream) {
    let error = CommandError::failed("too many clients on this control socket");
    let _ = stream.try_write(&to_line(&json!({ "error": error.to_value() })));
}
