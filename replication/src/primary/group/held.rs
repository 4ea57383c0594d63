//! What happens to the guest's writes when the secondary is lost: they go on, or they are held.

use std::sync::atomic::Ordering;

use brep_block::{Error as BlockError, ErrorKind, Operation};
use serde_json::json;
use tokio::time::{Instant, sleep};

use super::Group;
use crate::config::OnPeerLost;
use crate::{Error, Result};

impl Group {
    /// Whether writes are held when the peer is lost.
    pub(super) fn suspends(&self) -> bool {
        self.config.on_peer_lost == OnPeerLost::Suspend && self.peer().is_some()
    }

    /// Holds the guest's writes. Nothing of this survives the process: a start asks the peer.
    pub(super) fn suspend(&self, reason: &str) {
        if !self.held.send_replace(true) {
            tracing::warn!(reason, "the guest's writes are held");
            self.events.emit("BREP_SUSPENDED", json!({ "reason": reason }));
        }
    }

    /// The peer is lost: writes are held, or go on alone; they go on if somebody wanted them to.
    pub(super) fn without_peer(&self, reason: &str, wanted: bool) {
        // It has made room for the other side: whatever comes is refused, not held.
        if !self.record().is_primary() {
            return;
        }
        match self.suspends() && !wanted {
            true => self.suspend(reason),
            false => self.go_alone(),
        }
    }

    /// Lets what is held go on.
    pub(super) fn let_go(&self, reason: &str) {
        if self.held.send_replace(false) {
            tracing::info!(reason, "the guest's writes go on");
            self.events.emit("BREP_RESUMED", json!({ "reason": reason }));
        }
    }

    /// Goes on without the secondary, by command.
    ///
    /// # Errors
    /// Nothing is held; the secondary has been promoted, as far as is known; or the record could not
    /// be saved. What was held is held still.
    pub(crate) fn resume_lonely(&self) -> Result<()> {
        if !*self.held.borrow() {
            return Err(Error::refused("no writes are held"));
        }
        let superseded = self.core().refusal.clone().filter(|refusal| refusal.superseded);
        if let Some(refusal) = superseded {
            let reason = refusal.reason;
            return Err(Error::refused(format!("there would be two that write: {reason}")));
        }
        self.go_alone();
        if let Some(fatal) = self.core().fatal() {
            return Err(Error::failed(fatal.to_owned()));
        }
        self.let_go("without the secondary, by command");
        Ok(())
    }

    /// Waits while writes are held.
    ///
    /// # Errors
    /// The secondary has taken over, or this side ends or is no primary any more: nobody lets them go on.
    pub(crate) async fn until_writable(
        &self,
        disk: usize,
        operation: Operation,
    ) -> brep_block::Result<()> {
        if !*self.held.borrow() {
            return Ok(());
        }
        self.held_writes.fetch_add(1, Ordering::Relaxed);
        let let_go = async {
            let (mut held, leaving) = (self.held.subscribe(), self.leaving());
            tokio::select! {
                biased;
                // The sender lives as long as this.
                _ = held.wait_for(|held| !held) => Ok(()),
                () = leaving.cancelled() => {
                    let text = "the guest's writes are held, and brep ends";
                    Err(BlockError::new(operation, ErrorKind::Shutdown, self.disk_name(disk), text))
                }
            }
        };
        let writable = self.unless_superseded(disk, operation, let_go).await;
        self.held_writes.fetch_sub(1, Ordering::Relaxed);
        writable
    }

    /// How many writes are held; none: they are not.
    pub(crate) fn held_writes(&self) -> Option<u64> {
        self.held.borrow().then(|| self.held_writes.load(Ordering::Relaxed))
    }

    /// Ends when the window has been full for too long: the peer is there, and slow. It counts as
    /// full from seven eighths on until less than a half is in use.
    pub(crate) async fn watch_window(&self) -> String {
        let Some(limit) = self.config.slow_peer_limit else {
            return std::future::pending().await;
        };
        let mut since = None;
        loop {
            sleep(limit / 8).await;
            let (bytes, requests) = self.window_use();
            let used = bytes.max(requests);
            if used < 0.5 {
                since = None;
            } else if used >= 0.875 || since.is_some() {
                let now = Instant::now();
                if now >= *since.get_or_insert(now) + limit {
                    return format!(
                        "the secondary is too slow: the window has been full for {limit:?}"
                    );
                }
            }
        }
    }

    /// What part of the window is in use, by bytes and by requests.
    fn window_use(&self) -> (f64, f64) {
        let part = |free: usize, all: u64| 1.0 - free as f64 / all.max(1) as f64;
        let all = self.config.window_bytes.min(u64::from(u32::MAX >> 4));
        (
            part(self.window_bytes.available_permits(), all),
            part(self.window_requests.available_permits(), self.config.window_requests as u64),
        )
    }
}
