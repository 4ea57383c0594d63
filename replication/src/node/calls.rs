//! What the calls of a secondary node do.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brep_backup::{CbwOptions, CopyBeforeWrite};
use brep_block::{BlockDevice, Error, ErrorKind, RangeLock, ReplicationMode, Result};
use brep_qcow2::{MakeEmpty, Qcow2};
use tokio::task::JoinHandle;

use super::secondary::SecondaryOptions;
use super::split::SplitDisk;
use super::{NOT_RUNNING, Stage, check_start, control, not_running};
use crate::gate::{Gate, Gated};
use crate::layer::Below;
use crate::merge::MergedDisk;
use crate::unavailable::Unavailable;
use crate::view::ChainView;

/// How long a call waits for requests in flight.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

const JOB_CANCELLED: &str = "Backup job was cancelled unexpectedly";

/// The disks of a secondary node and the doors in front of them.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) options: SecondaryOptions,
    pub(super) active: Arc<Qcow2>,
    hidden: Option<Arc<Qcow2>>,
    /// What the active disk falls through to.
    below_active: Arc<Below>,
    /// This side's guest: the stage decides what is behind the door.
    pub(super) guest: Gated,
    /// The primary.
    local: Gated,
    /// The merge, and the guest on the merged disk.
    merge_target: Option<Gated>,
    /// One call at a time.
    calls: tokio::sync::Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    stage: Stage,
    latched: Option<Error>,
    /// While running.
    replica: Option<Replica>,
    merging: Option<JoinHandle<()>>,
}

#[derive(Debug, Clone)]
struct Replica {
    base: Arc<dyn BlockDevice>,
    hidden: Arc<Qcow2>,
    /// The copy job; none if it was cancelled.
    filter: Option<Arc<CopyBeforeWrite>>,
    view: Arc<ChainView>,
}

/// Both doors are held as long as this lives.
struct Held<'a>(&'a Shared);

impl Drop for Held<'_> {
    fn drop(&mut self) {
        self.0.local.0.open();
        self.0.guest.0.open();
    }
}

impl Shared {
    pub(super) fn new(
        options: SecondaryOptions,
        active: Arc<Qcow2>,
        below_active: Arc<Below>,
        hidden: Option<Arc<Qcow2>>,
    ) -> Arc<Self> {
        let (name, size) = (options.name.as_str(), active.size());
        let door = || Gated(Gate::new(name, unavailable(name, size, NOT_RUNNING)));
        let (guest, local) = (door(), door());
        let base = options.base.as_ref();
        let merge_target = base.map(|base| Gated(Gate::new(name, Arc::clone(base))));
        Arc::new(Shared {
            active,
            hidden,
            below_active,
            guest,
            local,
            merge_target,
            calls: tokio::sync::Mutex::new(()),
            state: Mutex::new(State {
                stage: Stage::None,
                latched: None,
                replica: None,
                merging: None,
            }),
            options,
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn stage(&self) -> Stage {
        self.state().stage
    }

    pub(super) fn error(&self) -> Option<Error> {
        self.state().latched.clone()
    }

    pub(super) fn local(&self) -> Option<Arc<dyn BlockDevice>> {
        let filter = self.state().replica.as_ref().and_then(|r| r.filter.clone());
        filter.map(|_| Arc::new(self.local.clone()) as Arc<dyn BlockDevice>)
    }

    pub(super) fn cancel_job(&self) {
        let mut state = self.state();
        let filter = state.replica.as_mut().and_then(|r| r.filter.take());
        if filter.is_some() {
            // Requests inside have their pre-images still copied: they may end.
            self.local.0.replace(self.unavailable(JOB_CANCELLED));
            let text = "I/O error occurred: the copy job was cancelled";
            state.latched = Some(control(&self.options.name, ErrorKind::Io, text));
        }
    }

    fn invalid(&self, text: &str) -> Error {
        control(&self.options.name, ErrorKind::InvalidInput, text)
    }

    fn unavailable(&self, reason: &'static str) -> Arc<dyn BlockDevice> {
        unavailable(&self.options.name, self.active.size(), reason)
    }

    /// Holds guest and primary back and waits for what they have in flight.
    async fn hold(&self) -> Result<Held<'_>> {
        // Opens what is held already if the other one cannot be.
        let held = Held(self);
        self.local.0.hold(DRAIN_TIMEOUT).await?;
        self.guest.0.hold(DRAIN_TIMEOUT).await?;
        Ok(held)
    }

    pub(super) async fn start(self: Arc<Self>, mode: ReplicationMode) -> Result<()> {
        let _call = self.calls.lock().await;
        check_start(&self.options.name, self.stage(), mode, ReplicationMode::Secondary)?;
        let (hidden, base) = self.check_disks()?;
        let filter = CopyBeforeWrite::new(
            Arc::clone(&base),
            Arc::clone(&hidden) as Arc<dyn BlockDevice>,
            CbwOptions {
                discard_as_zeroes: true,
                ..CbwOptions::new(&self.options.name).unit_bytes(self.options.unit_bytes)
            },
        )?;
        // Both overlays begin empty: without a state record nobody knows what they hold.
        self.empty("active", &self.active).await?;
        self.empty("hidden", &hidden).await?;
        let layers = vec![Arc::clone(&hidden) as Arc<dyn BlockDevice>];
        let locks = filter.locks().clone();
        let view = ChainView::new(&self.options.name, layers, Arc::clone(&base), locks);
        let _held = self.hold().await?;
        self.below_active.set(Some(Arc::clone(&view) as Arc<dyn BlockDevice>));
        self.guest.0.replace(Arc::clone(&self.active) as Arc<dyn BlockDevice>);
        self.local.0.replace(Arc::clone(&filter) as Arc<dyn BlockDevice>);
        let mut state = self.state();
        state.replica = Some(Replica { base, hidden, filter: Some(filter), view });
        state.stage = Stage::Running;
        state.latched = None;
        Ok(())
    }

    /// The checks of a start, in the original's order. Nothing is changed.
    fn check_disks(&self) -> Result<(Arc<Qcow2>, Arc<dyn BlockDevice>)> {
        let Some(hidden) = &self.hidden else {
            return Err(self.invalid("Active disk doesn't have backing file"));
        };
        let Some(base) = &self.options.base else {
            return Err(self.invalid("Hidden disk doesn't have backing file"));
        };
        let size = self.active.size();
        if hidden.size() != size || base.size() != size {
            return Err(
                self.invalid("Active disk, hidden disk, secondary disk's length are not the same")
            );
        }
        if base.limits().read_only {
            let text = "the secondary disk is open for reading only";
            return Err(control(&self.options.name, ErrorKind::ReadOnly, text));
        }
        let options = &self.options;
        if options.top_id != options.name && !options.above.contains(&options.top_id) {
            return Err(self.invalid("No top_bs or it is invalid"));
        }
        // The hidden disk would fill the rest of what it allocates with zeroes.
        let (unit, allocated) = (options.unit_bytes, hidden.subcluster_size());
        if unit < allocated {
            return Err(self.invalid(&format!(
                "a copy unit of {unit} bytes is smaller than the {allocated} bytes that the \
                 hidden disk allocates at a time"
            )));
        }
        Ok((Arc::clone(hidden), Arc::clone(base)))
    }

    async fn empty(&self, which: &str, image: &Qcow2) -> Result<()> {
        image.make_empty(MakeEmpty::Keep).await.map_err(|e| {
            let text = format!("Cannot make {which} disk empty: {e}");
            control(&self.options.name, e.kind(), text)
        })
    }

    pub(super) async fn checkpoint(self: Arc<Self>) -> Result<()> {
        let _call = self.calls.lock().await;
        match self.stage() {
            Stage::None => return Err(not_running(&self.options.name)),
            Stage::Failover | Stage::Done => return Ok(()),
            Stage::Running | Stage::Failed => {}
        }
        let replica = self.state().replica.clone();
        let Some(Replica { hidden, filter: Some(filter), .. }) = replica else {
            return Err(self.invalid(JOB_CANCELLED));
        };
        let _held = self.hold().await?;
        // The guest's part first: a failure in between leaves the old checkpoint, without what
        // the guest wrote since, and never the new one under the guest's old writes.
        self.empty("active", &self.active).await?;
        let emptied = self.empty("hidden", &hidden).await;
        // It may be empty although the call failed. The filter has to know it: what it takes for
        // copied is overwritten.
        if emptied.is_ok() || hidden.is_empty().await.unwrap_or(false) {
            filter.checkpoint()?;
        }
        emptied
    }

    pub(super) async fn stop(self: Arc<Self>, failover: bool) -> Result<()> {
        let _call = self.calls.lock().await;
        match self.stage() {
            Stage::None | Stage::Failed => return Err(not_running(&self.options.name)),
            Stage::Failover | Stage::Done => return Ok(()),
            Stage::Running => {}
        }
        let _held = self.hold().await?;
        let Some(replica) = self.state().replica.take() else {
            return Err(not_running(&self.options.name));
        };
        self.local.0.replace(self.unavailable("replication has been stopped"));
        if failover {
            self.begin_merge(replica);
            Ok(())
        } else {
            self.drop_buffers(replica).await
        }
    }

    /// The disk is what the primary wrote.
    async fn drop_buffers(&self, replica: Replica) -> Result<()> {
        self.guest.0.replace(replica.base);
        {
            let mut state = self.state();
            state.stage = Stage::Done;
            state.latched = None;
        }
        self.below_active.set(None);
        let active = self.empty("active", &self.active).await;
        let hidden = self.empty("hidden", &replica.hidden).await;
        active.and(hidden)
    }

    fn begin_merge(self: &Arc<Self>, replica: Replica) {
        let target = match &self.merge_target {
            Some(target) => Arc::new(target.clone()) as Arc<dyn BlockDevice>,
            None => Arc::clone(&replica.base),
        };
        let merged = MergedDisk::merging(
            &self.options.name,
            target,
            Arc::clone(&self.active) as Arc<dyn BlockDevice>,
            vec![Arc::clone(&self.active), Arc::clone(&replica.hidden)],
        );
        self.guest.0.replace(Arc::clone(&merged) as Arc<dyn BlockDevice>);
        let mut state = self.state();
        state.stage = Stage::Failover;
        state.latched = None;
        let shared = Arc::clone(self);
        state.merging = Some(tokio::spawn(async move {
            match merged.merge().await {
                Ok(()) => {
                    merged.finish().await;
                    shared.state().stage = Stage::Done;
                }
                Err(error) => shared.merge_failed(replica, &error).await,
            }
        }));
    }

    async fn merge_failed(&self, replica: Replica, error: &Error) {
        let _call = self.calls.lock().await;
        // Requests on the merged disk and on the split disk do not know of each other. If they
        // do not end, the merged disk serves on, which only costs space.
        if self.guest.0.hold(DRAIN_TIMEOUT).await.is_ok() {
            self.guest.0.replace(Arc::new(SplitDisk {
                active: Arc::clone(&self.active),
                view: replica.view,
                base: replica.base,
                locks: RangeLock::new(),
            }));
        }
        tracing::error!(node = self.options.name, %error, "the failover's merge failed");
        {
            let mut state = self.state();
            state.stage = Stage::Failed;
            let text = format!("I/O error occurred: {error}");
            state.latched = Some(control(&self.options.name, error.kind(), text));
        }
        self.guest.0.open();
    }

    pub(super) async fn close(self: Arc<Self>) -> Result<()> {
        let _call = self.calls.lock().await;
        let merging = self.state().merging.take();
        if let Some(merging) = merging {
            merging.abort();
            // Cancelled, or at its end.
            let _ = merging.await;
        }
        let _held = self.hold().await?;
        if let Some(target) = &self.merge_target {
            // What the merge had in flight goes on without it.
            let drained = target.0.hold(DRAIN_TIMEOUT).await;
            target.0.open();
            drained?;
        }
        for door in [&self.guest, &self.local] {
            door.0.replace(self.unavailable("the node has been closed"));
        }
        let active = self.active.close().await;
        let hidden = match &self.hidden {
            Some(hidden) => hidden.close().await,
            None => Ok(()),
        };
        active.and(hidden)
    }
}

fn unavailable(name: &str, size: u64, reason: &'static str) -> Arc<dyn BlockDevice> {
    Arc::new(Unavailable { name: name.to_owned(), size, reason })
}
