//! This side's guest, held while it is moved.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::join_all;

use super::group::Group;
use crate::Result;

/// The time in which the guest's requests have to end when it is moved to a new active disk.
const GUEST_HOLD_LIMIT: Duration = Duration::from_secs(30);

impl Group {
    /// Holds this side's guest on all disks until the result is dropped; none of its requests is
    /// going on then.
    pub(crate) async fn hold_guest(self: &Arc<Self>) -> Result<GuestHeld> {
        let turn = Arc::clone(&self.guest_hold).lock_owned().await;
        // Made before anything is held: whoever gives up in the middle lets the guest go on.
        let held = GuestHeld { group: Arc::clone(self), _turn: turn };
        let disks = self.disks();
        let holding = disks.iter().map(|disk| disk.gate().hold(GUEST_HOLD_LIMIT));
        join_all(holding).await.into_iter().collect::<brep_block::Result<()>>()?;
        Ok(held)
    }
}

/// This side's guest is held; it goes on when this is dropped.
pub(crate) struct GuestHeld {
    group: Arc<Group>,
    _turn: tokio::sync::OwnedMutexGuard<()>,
}

impl Drop for GuestHeld {
    fn drop(&mut self) {
        for disk in self.group.disks() {
            disk.gate().open();
        }
    }
}
