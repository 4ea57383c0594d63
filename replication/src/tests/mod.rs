//! Pairs in one process whose disks fail or hang.
mod answers;
mod begin;
mod broken;
#[path = "../../tests/common/mod.rs"]
mod common;
mod copy;
mod cut;
mod disks;
mod failover;
mod flush;
mod groups;
mod grow;
mod hot;
mod hung;
mod interrupted;
mod invariants;
mod joining;
mod kill_points;
mod killed;
mod policies;
mod record_fails;
mod rogue;
mod slots;
mod stall;
mod stepped_down;
mod switchover;
mod zeroes;

use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, WriteFlags};
use brep_nbd::client::Connection;
use bytes::Bytes;
use tokio::task::JoinHandle;

use self::common::{MIB, Scratch, Side};
use crate::config::SideConfig;
use crate::image::faults::{self, Faults};

/// A pair, in sync, with a peer timeout of two seconds.
struct Pair {
    scratch: Scratch,
    primary: Side,
    secondary: Side,
    /// Below the primary's disk.
    local: Faults,
    /// Below the secondary's disk.
    disk: Faults,
}

impl Pair {
    async fn new() -> Self {
        Self::with(|_, _, _| {}).await
    }

    /// With a guest on the secondary.
    async fn with_guest() -> Self {
        let listen = |scratch: &Scratch| Some(scratch.endpoint("s-guest.sock"));
        Self::with(|scratch, _, there| there.guest_listen = listen(scratch)).await
    }

    /// With what is changed of the configurations of primary and secondary.
    async fn with(change: impl FnOnce(&Scratch, &mut SideConfig, &mut SideConfig)) -> Self {
        let scratch = Scratch::new();
        scratch.raw("p.raw", MIB, 1);
        scratch.raw("s.raw", MIB, 2);
        let mut there = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
        let mut here = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
        here.peer_timeout = Duration::from_secs(2);
        change(&scratch, &mut here, &mut there);
        let (secondary, primary) = (Side::run(there), Side::run(here));
        primary.wait_state("in-sync").await;
        let local = faults::of(&scratch.path("p.raw"));
        let disk = faults::of(&scratch.path("s.raw"));
        Pair { scratch, primary, secondary, local, disk }
    }
}

/// Lets time pass, for the sides of this thread, in which nothing but timers is due: what hangs does
/// so on purpose. Not longer than the machine takes for it: however slow that is, each second is long
/// enough for what is done in one.
async fn pass(time: Duration) {
    const STEP: Duration = Duration::from_millis(50);
    tokio::time::pause();
    let end = tokio::time::Instant::now() + time;
    while tokio::time::Instant::now() < end {
        tokio::time::advance(STEP).await;
        // Time stands still as long as this takes, and the thread has nothing else to do.
        let rest = || std::thread::sleep(Duration::from_millis(2));
        tokio::task::spawn_blocking(rest).await.unwrap();
    }
    tokio::time::resume();
}

/// A write of 4096 bytes that goes on by itself.
fn write(device: &Arc<Connection>, offset: u64, byte: u8) -> JoinHandle<brep_block::Result<()>> {
    let device = Arc::clone(device);
    tokio::spawn(async move {
        device.write(offset, Bytes::from(vec![byte; 4096]), WriteFlags::default()).await
    })
}
