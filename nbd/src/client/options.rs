use std::hash::{BuildHasher, Hasher, RandomState};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::ClientError;
use crate::proto::wire::{BASE_ALLOCATION, TransmissionMode};
use crate::tls::{TlsClient, TlsError};
use crate::{Endpoint, NbdUri};

/// How to connect, and what a connection may cost.
#[derive(Debug, Clone)]
pub struct ConnectOptions {
    /// The server.
    pub endpoint: Endpoint,
    /// Name of the export; empty for the default one.
    pub export: String,
    /// The device's name in errors and events.
    pub name: String,
    /// Bounds connecting and the handshake together.
    pub connect_timeout: Duration,
    /// How long any request may take, counted from its submission, waiting in the queue
    /// included. When one takes longer the whole connection fails: nobody knows any more what
    /// the server will do with the others.
    pub request_timeout: Duration,
    /// Options outside the protocol, sent before all others; a server that refuses one refuses
    /// the connection. Numbers from
    /// [`PRIVATE_OPTION_BASE`](crate::proto::wire::PRIVATE_OPTION_BASE) on.
    pub private_options: Vec<(u32, Bytes)>,
    /// Most requests sent and not answered. QEMU's server looks at 16 at a time.
    pub in_flight_max: usize,
    /// Most bytes of payload, read or written, of requests sent and not answered. One request
    /// is always let through.
    pub in_flight_bytes_max: u64,
    /// Most operations waiting to be sent; one more fails at once.
    pub queued_max: usize,
    /// Most bytes of payload waiting to be sent; a write beyond it fails at once.
    pub queued_bytes_max: u64,
    /// The best mode to ask for; a server that does not have it is asked for the next one. Only
    /// structured replies and extended headers come with the state of ranges.
    pub mode_max: TransmissionMode,
    /// The meta contexts in which [`Connection::start_meta_status`] asks; without
    /// `base:allocation` every range counts as data for
    /// [`block_status`](brep_block::BlockDevice::block_status).
    ///
    /// [`Connection::start_meta_status`]: crate::client::Connection::start_meta_status
    pub contexts: Vec<String>,
    /// Refuse an export that does not promise that a flush on one connection covers all: for
    /// connections that share their work with others.
    pub needs_multi_conn: bool,
    /// Begin TLS before anything else; there is no connection without it then.
    pub tls: Option<TlsClient>,
}

impl ConnectOptions {
    /// The defaults: 10 s to connect, 30 s for a request, 128 requests or 64 MiB in flight,
    /// 16384 operations or 256 MiB queued.
    #[must_use]
    pub fn new(endpoint: Endpoint, export: impl Into<String>) -> Self {
        let export = export.into();
        let name = format!("nbd://{endpoint}/{export}");
        ConnectOptions {
            endpoint,
            export,
            name,
            connect_timeout: Duration::from_secs(10),
            request_timeout: Duration::from_secs(30),
            private_options: Vec::new(),
            in_flight_max: 128,
            in_flight_bytes_max: 64 << 20,
            queued_max: 16_384,
            queued_bytes_max: 256 << 20,
            mode_max: TransmissionMode::Extended,
            contexts: vec![BASE_ALLOCATION.to_owned()],
            needs_multi_conn: false,
            tls: None,
        }
    }

    /// The defaults for a URI, with the certificates that it names if it demands TLS.
    ///
    /// # Errors
    /// It demands TLS, and names no certificates or none that can be used.
    pub fn from_uri(uri: &NbdUri) -> Result<Self, TlsError> {
        let options = Self::new(uri.endpoint.clone(), uri.export.clone());
        let tls = TlsClient::for_uri(uri, None)?;
        Ok(ConnectOptions { name: uri.to_string(), tls, ..options })
    }
}

/// What a [`Client`](crate::client::Client) does when it has no connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReconnectPolicy {
    /// How long requests wait after a connection was lost, to be sent again over the next one.
    /// 0: they fail at once. Attempts go on in the background in either case.
    pub delay: Duration,
    /// How long [`Client::connect`](crate::client::Client::connect) goes on trying. 0: one
    /// attempt.
    pub open_timeout: Duration,
    /// Pause after the first attempt that failed; each further one doubles it. Up to a quarter
    /// is taken off by chance, so that clients that lost one server do not all come back at once.
    pub pause_first: Duration,
    /// Longest pause between attempts.
    pub pause_max: Duration,
}

impl Default for ReconnectPolicy {
    /// No waiting, one attempt; pauses of 1, 2, 4, 8, then 16 s.
    fn default() -> Self {
        ReconnectPolicy {
            delay: Duration::ZERO,
            open_timeout: Duration::ZERO,
            pause_first: Duration::from_secs(1),
            pause_max: Duration::from_secs(16),
        }
    }
}

impl ReconnectPolicy {
    /// Makes attempts until one succeeds, or [`open_timeout`](Self::open_timeout) is over.
    ///
    /// # Errors
    /// That of the last attempt, or of one that says that more of them are of no use.
    pub async fn attempt<T, F>(&self, mut attempt: impl FnMut() -> F) -> Result<T, ClientError>
    where
        F: Future<Output = Result<T, ClientError>>,
    {
        let deadline = Instant::now() + self.open_timeout;
        let mut pauses = self.pauses();
        loop {
            match attempt().await {
                Err(error) if !error.is_permanent() => {
                    let pause = pauses.next().unwrap_or(self.pause_max);
                    if Instant::now() + pause > deadline {
                        return Err(error);
                    }
                    tracing::debug!(%error, "trying again");
                    sleep(pause).await;
                }
                result => return result,
            }
        }
    }

    /// The pauses between attempts.
    pub(super) fn pauses(&self) -> impl Iterator<Item = Duration> + Send + use<> {
        let max = self.pause_max;
        let doubled = std::iter::successors(Some(self.pause_first.min(max)), move |pause| {
            Some(pause.saturating_mul(2).min(max))
        });
        doubled.map(|pause| pause - pause.mul_f64(chance() / 4.0))
    }
}

/// A number from 0 to 1, by chance: what the standard library seeds its hash tables with.
fn chance() -> f64 {
    let random = RandomState::new().build_hasher().finish();
    (random >> 32) as f64 / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_a_limit_and_differ_by_chance() {
        let policy = ReconnectPolicy::default();
        let pauses: Vec<f64> = policy.pauses().take(8).map(|pause| pause.as_secs_f64()).collect();
        for (pause, longest) in pauses.iter().zip([1.0, 2.0, 4.0, 8.0, 16.0, 16.0, 16.0, 16.0]) {
            assert!(*pause <= longest && *pause >= longest * 0.749, "{pauses:?}");
        }
        assert_ne!(pauses, policy.pauses().take(8).map(|p| p.as_secs_f64()).collect::<Vec<_>>());
    }
}
