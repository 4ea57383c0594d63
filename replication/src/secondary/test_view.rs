//! A test failover: a writable scratch view of the last checkpoint, while replication goes on.

use std::sync::Arc;
use std::time::Duration;

use brep_nbd::NbdUri;
use brep_nbd::server::{Export, ExportDescription};
use serde::Serialize;
use serde_json::json;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::buffers::Buffer;
use super::disk::{Remains, ReplicaDisk};
use super::group::Group;
use super::room::SPACE_LOW_BYTES;
use super::scratch::ScratchDevice;
use crate::daemon::check_name;
use crate::status::TestStatus;
use crate::table::Disks;
use crate::{Epoch, Error, Result};

/// How often a view's room is looked at.
const LOOK_PAUSE: Duration = Duration::from_millis(200);

/// With less free space than this there is no view: what is left is replication's.
const SPACE_MIN_BYTES: u64 = 2 * SPACE_LOW_BYTES;

/// Hidden disks that are kept for a view at most, of each disk.
const DEPTH_MAX: usize = 64;

/// How long the end of a view may wait for those who read in it.
const GIVE_UP_LIMIT: Duration = Duration::from_secs(10);

/// The view that is open, or the last one, if it has ended by itself.
#[derive(Debug, Clone)]
pub(super) struct Test {
    name: String,
    checkpoint: Option<Epoch>,
    opened: Instant,
    /// Why it ends or has ended.
    over: Option<String>,
    /// Cancelled when it has ended.
    ended: CancellationToken,
}

impl Test {
    fn is_open(&self) -> bool {
        !self.ended.is_cancelled()
    }
}

/// What was opened or ended.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct TestReport {
    name: String,
    /// The checkpoint that it shows.
    checkpoint: Option<Epoch>,
    /// Where the disks are found, in order.
    uris: Vec<String>,
}

impl Group {
    /// Opens a view of the last checkpoint of all disks.
    ///
    /// # Errors
    /// Refused if there is none, if a view is open already, or if there is no room for one.
    pub(super) async fn open_test(self: &Arc<Self>, name: &str) -> Result<TestReport> {
        let _transition = self.transition.lock().await;
        check_name("test view", name)?;
        if self.disks().iter().any(|disk| disk.name == name) {
            return Err(Error::usage(format!("test view {name:?}: a disk has this name")));
        }
        self.check_test()?;
        self.room_for_test(0).await?;
        let disks = self.disks();
        let scratch = self.take_scratch(&disks).await?;
        // From here to the end there is no await: no commit comes between two disks. One may have
        // come before.
        let same = self.disks().len() == disks.len() && self.disks().iter().all(|d| disks.has(d));
        let ready = match same {
            true => self.check_test(),
            false => Err(Error::refused("a disk has just gone: try again")),
        };
        if let Err(error) = ready {
            self.recycle(disks.iter().map(Arc::clone).zip(scratch.map(|s| vec![s])).collect())
                .await;
            return Err(error);
        }
        let checkpoint = self.record().com.map(|com| com.epoch);
        for (disk, scratch) in disks.iter().zip(scratch) {
            let export = format!("{name}/{}", disk.name);
            disk.open_test_view(scratch, |below| ScratchDevice::new(&export, below, self))?;
        }
        let test = Test {
            name: name.to_owned(),
            checkpoint,
            opened: Instant::now(),
            over: None,
            ended: CancellationToken::new(),
        };
        self.core().test = Some(test.clone());
        if let Ok(service) = self.service() {
            service.show(self.test_exports(&test));
        }
        tokio::spawn(Arc::clone(self).watch_test(test.ended.clone()));
        let report = self.test_report(&test);
        self.events.emit("BREP_TEST_OPENED", json!(report));
        Ok(report)
    }

    /// What takes the writes to a view, on all disks or on none.
    async fn take_scratch(&self, disks: &Disks<ReplicaDisk>) -> Result<std::vec::IntoIter<Buffer>> {
        let set = self.record().set.ok_or_else(|| Error::failed("no set"))?;
        let mut scratch = Vec::new();
        for disk in disks.iter() {
            match disk.pool.take(set).await {
                Ok(buffer) => scratch.push(buffer),
                Err(error) => {
                    let unused = scratch.into_iter().map(|buffer| vec![buffer]);
                    self.recycle(disks.iter().map(Arc::clone).zip(unused).collect()).await;
                    return Err(error);
                }
            }
        }
        Ok(scratch.into_iter())
    }

    /// Whether a view is open.
    pub(super) fn has_open_test(&self) -> bool {
        self.core().test.as_ref().is_some_and(Test::is_open)
    }

    fn check_test(&self) -> Result<()> {
        let record = self.record();
        if record.is_primary() {
            return Err(Error::refused("this side has been promoted: it is the disk"));
        }
        if !record.has_checkpoint() {
            return Err(Error::refused(
                "there is no complete checkpoint (see brep status): there is nothing to be tested",
            ));
        }
        if let Some(open) = self.core().test.as_ref().filter(|test| test.is_open()) {
            return Err(Error::refused(format!(
                "the test view {} is open, and there is one at a time: brep failover --test-end {}",
                open.name, open.name
            )));
        }
        if let Some(disk) = self.disks().iter().find(|disk| disk.joining().is_some()) {
            return Err(Error::refused(format!(
                "disk {} is being added: try again when it is in sync",
                disk.name
            )));
        }
        self.disks().iter().try_for_each(|disk| disk.check_test_view())
    }

    /// Ends the view of this name, and waits until its room has been given back.
    ///
    /// # Errors
    /// None is open under this name.
    pub(super) async fn close_test(&self, name: &str) -> Result<TestReport> {
        let test = self.core().test.clone().filter(|test| test.name == name);
        let Some(test) = test else {
            return Err(Error::refused(match &self.core().test {
                Some(open) if open.is_open() => {
                    format!("there is no test view {name:?}; {} is open", open.name)
                }
                _ => format!("there is no test view {name:?}"),
            }));
        };
        let report = self.test_report(&test);
        let remains = self.end_test("ended by command");
        self.core().test = None;
        give_up(remains).await;
        Ok(report)
    }

    /// The role ends, and with it the view.
    pub(super) async fn end_with_test(&self) {
        give_up(self.end_test("the secondary ends")).await;
    }

    /// Ends the view that is open, if there is one: at once, for its guests. Its room is given back
    /// in the background.
    pub(super) fn drop_test(&self, reason: &str) {
        for remains in self.end_test(reason) {
            tokio::spawn(remains.give_up());
        }
    }

    fn end_test(&self, reason: &str) -> Vec<Remains> {
        let test = {
            let mut core = self.core();
            let Some(test) = core.test.as_mut().filter(|test| test.is_open()) else {
                return Vec::new();
            };
            test.ended.cancel();
            test.over = Some(reason.to_owned());
            test.clone()
        };
        if let Ok(service) = self.service() {
            service.hide(self.test_exports(&test));
        }
        let name = test.name;
        tracing::info!(name, reason, "the test view has ended");
        self.events.emit("BREP_TEST_ENDED", json!({ "name": name, "reason": reason }));
        self.disks().iter().filter_map(|disk| disk.end_test_view()).collect()
    }

    /// The view ends by itself, soon.
    pub(super) fn test_is_over(&self, reason: &str) {
        if let Some(test) = self.core().test.as_mut().filter(|test| test.is_open()) {
            test.over.get_or_insert_with(|| reason.to_owned());
        }
        self.test_changed.notify_one();
    }

    /// Whether the view may take so many bytes more.
    async fn room_for_test(&self, len: u64) -> Result<()> {
        match (self.config.buffer_limit, self.space_bytes().await) {
            (Some(limit), _) if self.buffer_bytes().saturating_add(len) > limit => {
                Err(Error::refused(format!("no room for it within --buffer-limit ({limit} bytes)")))
            }
            (_, Some(space)) if space < SPACE_MIN_BYTES.saturating_add(len) => {
                Err(Error::refused(format!(
                    "no room for it: the file system of the state directory has {space} bytes left, \
                     and the last {SPACE_MIN_BYTES} are for replication"
                )))
            }
            _ => Ok(()),
        }
    }

    /// The same, counted anew if it seems that there is none.
    pub(super) async fn check_test_room(&self, len: u64) -> Result<()> {
        if self.room_for_test(len).await.is_ok() {
            return Ok(());
        }
        for disk in self.disks() {
            disk.count_test_bytes().await?;
        }
        self.room_for_test(len).await
    }

    /// Pre-images of the last checkpoint, and what is kept for the view.
    fn buffer_bytes(&self) -> u64 {
        let of = |(kept, written): (u64, u64)| kept + written;
        self.disks().iter().map(|disk| disk.hidden_bytes() + of(disk.test_bytes())).sum()
    }

    /// Keeps the view small, and ends it when it does not fit any more.
    async fn watch_test(self: Arc<Self>, ended: CancellationToken) {
        loop {
            tokio::select! {
                biased;
                () = ended.cancelled() => return,
                () = self.test_changed.notified() => {}
                () = tokio::time::sleep(LOOK_PAUSE) => {}
            }
            let over = self.core().test.as_ref().and_then(|test| test.over.clone());
            let over = match over {
                Some(over) => Some(over),
                // What is kept grows while it is joined, and somebody may want its room at once.
                None => tokio::select! {
                    biased;
                    () = ended.cancelled() => return,
                    over = self.test_outgrown() => Some(over),
                    small = self.keep_test_small() => small.err().map(|error| error.to_string()),
                },
            };
            if let Some(reason) = over.filter(|_| !ended.is_cancelled()) {
                self.drop_test(&reason);
            }
        }
    }

    async fn keep_test_small(&self) -> Result<()> {
        for disk in self.disks() {
            while disk.join_retired().await? {}
        }
        self.check_test_room(0).await
    }

    /// Ends when the view has to, with the reason.
    async fn test_outgrown(&self) -> String {
        loop {
            tokio::time::sleep(LOOK_PAUSE).await;
            if let Some(over) = self.core().test.as_ref().and_then(|test| test.over.clone()) {
                return over;
            }
            if self.disks().iter().any(|disk| disk.test_depth() > DEPTH_MAX) {
                return "checkpoints come faster than a test view can keep them".to_owned();
            }
            if let Err(error) = self.check_test_room(0).await {
                return error.to_string();
            }
        }
    }

    fn test_report(&self, test: &Test) -> TestReport {
        let address = self.config.guest_listen.as_ref().or(self.config.listen.as_ref());
        let uri = |export: String| {
            let endpoint = address?.clone();
            Some(NbdUri { endpoint, export, tls: None }.to_string())
        };
        TestReport {
            name: test.name.clone(),
            checkpoint: test.checkpoint,
            uris: self.test_exports(test).filter_map(uri).collect(),
        }
    }

    /// The names of the view's exports, in the order of the disks.
    fn test_exports(&self, test: &Test) -> impl Iterator<Item = String> {
        let is_only = self.disks().len() == 1;
        let name = test.name.clone();
        self.disks().into_iter().map(move |disk| match is_only {
            true => name.clone(),
            false => format!("{name}/{}", disk.name),
        })
    }

    /// A view is found where guests are served after a failover.
    pub(super) fn test_export(&self, wanted: &str) -> Option<Export> {
        let test = self.core().test.clone().filter(|test| test.is_open())?;
        let index = self.test_exports(&test).position(|export| export == wanted)?;
        let device = self.disks()[index].test_device()?;
        // One device behind all connections.
        let mut export = Export::new(wanted.to_owned(), device);
        export.multi_conn = true;
        Some(export)
    }

    /// For people who ask what there is.
    pub(super) fn list_test(&self) -> Vec<ExportDescription> {
        let test = self.core().test.clone().filter(|test| test.is_open());
        let description = "test view".to_owned();
        let names = test.iter().flat_map(|test| self.test_exports(test));
        names.map(|name| ExportDescription { name, description: description.clone() }).collect()
    }

    pub(super) fn test_status(&self, test: Option<&Test>) -> Option<TestStatus> {
        let test = test?;
        let bytes = self.disks().into_iter().map(|disk| disk.test_bytes());
        let (kept_bytes, written_bytes) =
            bytes.fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        let age_ms = u64::try_from(test.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        Some(TestStatus {
            name: test.name.clone(),
            checkpoint: test.checkpoint.map(|epoch| epoch.0),
            age_ms: Some(age_ms).filter(|_| test.is_open()),
            uris: self.test_report(test).uris,
            kept_bytes,
            written_bytes,
            ended: test.over.clone().filter(|_| !test.is_open()),
        })
    }
}

/// Gives a view's room back, unless somebody is stuck in it: then the next start does.
async fn give_up(remains: Vec<Remains>) {
    let given_up = async {
        for remains in remains {
            remains.give_up().await;
        }
    };
    if tokio::time::timeout(GIVE_UP_LIMIT, given_up).await.is_err() {
        tracing::warn!("requests to a test view do not end; its files stay until the next start");
    }
}
