use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::{BlockDevice, FlushLevel, Operation, Result as DeviceResult};
use tokio::sync::watch;

use super::options::{BitmapMode, JobOptions};
use super::status::{EventSink, IoStatus, JobError, JobEvent, JobInfo, JobStatus};
use super::{Job, State};
use crate::filter::CopyBeforeWrite;
use crate::live::LiveDisk;

/// The jobs of a program: their names, which are unique, the devices that they keep from each
/// other, and who is told what happens to them.
///
/// Dropping this cancels the jobs that run.
pub struct Jobs {
    registry: Arc<Registry>,
}

pub(super) struct Registry {
    sink: EventSink,
    table: Mutex<BTreeMap<String, Entry>>,
}

/// A name that is taken.
#[derive(Default)]
struct Entry {
    /// `None` while it starts.
    job: Option<Arc<Job>>,
    /// What it uses, until it has ended.
    devices: Vec<Arc<dyn BlockDevice>>,
}

impl Jobs {
    /// No jobs yet. `sink` is told of events, in order, and must not call back.
    pub fn new(sink: impl Fn(JobEvent) + Send + Sync + 'static) -> Self {
        let registry = Registry { sink: Arc::new(sink), table: Mutex::default() };
        Jobs { registry: Arc::new(registry) }
    }

    /// Starts a job, whose background part is a task of the current tokio runtime. The state that
    /// it keeps is the disk's at the moment at which this returns: the guests' changes are held
    /// back until none is in flight.
    ///
    /// # Errors
    /// If the options do not fit together, the name or a device is in use, a length cannot be
    /// read, or the devices do not fit ([`CopyBeforeWrite::new`]). Nothing has changed then.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub async fn start(
        &self,
        disk: &Arc<LiveDisk>,
        target: Arc<dyn BlockDevice>,
        options: JobOptions,
    ) -> Result<Arc<Job>, JobError> {
        let bitmap = options.check()?;
        let size = disk.size();
        let devices: [Arc<dyn BlockDevice>; 3] =
            [Arc::clone(disk.source()), Arc::clone(disk) as _, Arc::clone(&target)];
        if same_device(&devices[1], &devices[2]) {
            let why = format!("{} is source and target", disk.name());
            return Err(JobError::Invalid(why));
        }
        let place = self.registry.reserve(&options.id, devices)?;
        check_length(&**disk.source()).await?;
        check_length(&*target).await?;
        let mut filter_options = options.filter.clone();
        let allocation = u64::from(target.limits().preferred_size);
        filter_options.unit_bytes = filter_options.unit_bytes.max(allocation);
        check_chunk(options.chunk_bytes_max, filter_options.unit_bytes)?;
        let filter = CopyBeforeWrite::new(Arc::clone(disk.source()), target, filter_options)?;
        if let Some((name, mode)) = &bitmap {
            disk.bitmaps().check(name, *mode != BitmapMode::Never)?;
        }

        let mut quiet = disk.quiet().await;
        // From here on nothing waits, so nothing is left half done.
        if disk.size() != size {
            let why = format!("{} changed its size just now: try again", disk.name());
            return Err(JobError::Invalid(why));
        }
        let mut len_bytes = size.next_multiple_of(filter.unit_bytes());
        if let Some((name, mode)) = &bitmap {
            let dirty = disk.bitmaps().freeze(name, *mode != BitmapMode::Never)?;
            if options.sync.follows_bitmap() {
                len_bytes = filter.shared().keep_only(&dirty);
            }
        }
        let state = State {
            status: JobStatus::Undefined,
            busy: false,
            paused: false,
            cancelled: false,
            finalized: false,
            speed: options.speed,
            io_status: IoStatus::Ok,
            end: None,
        };
        let job = Arc::new(Job {
            options,
            bitmap,
            disk: Arc::clone(disk),
            filter: Arc::clone(&filter),
            len_bytes: AtomicU64::new(len_bytes),
            state: watch::Sender::new(state),
            registry: Arc::clone(&self.registry),
        });
        *quiet = Some(filter);
        place.fill(&job);
        job.enter_status(JobStatus::Created);
        tokio::spawn(Arc::clone(&job).run());
        Ok(job)
    }

    /// The job of that name.
    ///
    /// # Errors
    /// [`JobError::NotFound`].
    pub fn job(&self, id: &str) -> Result<Arc<Job>, JobError> {
        let job = self.registry.table().get(id).and_then(|entry| entry.job.clone());
        job.ok_or_else(|| JobError::NotFound(id.to_owned()))
    }

    /// All jobs that are not internal, in the order of their names; those that have ended, until
    /// they are dismissed.
    #[must_use]
    pub fn query(&self) -> Vec<JobInfo> {
        let jobs = self.all();
        jobs.iter().filter(|job| !job.options.internal).map(|job| job.info()).collect()
    }

    fn all(&self) -> Vec<Arc<Job>> {
        self.registry.table().values().filter_map(|entry| entry.job.clone()).collect()
    }
}

impl Drop for Jobs {
    fn drop(&mut self) {
        for job in self.all() {
            // Those that have ended refuse.
            let _ = job.cancel(true);
        }
        // Those that have not been dismissed are forgotten.
        self.registry.table().clear();
    }
}

impl fmt::Debug for Jobs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.all()).finish()
    }
}

impl Registry {
    pub(super) fn emit(&self, event: JobEvent) {
        (self.sink)(event);
    }

    /// Takes a name and the devices; they are given back by dropping the result.
    fn reserve<const N: usize>(
        self: &Arc<Self>,
        id: &str,
        devices: [Arc<dyn BlockDevice>; N],
    ) -> Result<Place, JobError> {
        let mut table = self.table();
        if table.contains_key(id) {
            return Err(JobError::IdInUse(id.to_owned()));
        }
        for (job, entry) in &*table {
            let used = |device: &&Arc<dyn BlockDevice>| {
                entry.devices.iter().any(|other| same_device(device, other))
            };
            if let Some(device) = devices.iter().find(used) {
                let node = device.name().to_owned();
                return Err(JobError::DeviceInUse { node, job: job.clone() });
            }
        }
        table.insert(id.to_owned(), Entry { job: None, devices: devices.into() });
        Ok(Place { registry: Arc::clone(self), id: Some(id.to_owned()) })
    }

    /// Other jobs may use the devices of this one.
    pub(super) fn release_devices(&self, id: &str) {
        if let Some(entry) = self.table().get_mut(id) {
            entry.devices.clear();
        }
    }

    pub(super) fn remove(&self, id: &str) {
        self.table().remove(id);
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // No code that can panic runs under this lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A reserved name.
struct Place {
    registry: Arc<Registry>,
    id: Option<String>,
}

impl Place {
    fn fill(mut self, job: &Arc<Job>) {
        if let Some(id) = self.id.take()
            && let Some(entry) = self.registry.table().get_mut(&id)
        {
            entry.job = Some(Arc::clone(job));
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            self.registry.remove(id);
        }
    }
}

fn same_device(a: &Arc<dyn BlockDevice>, b: &Arc<dyn BlockDevice>) -> bool {
    std::ptr::eq(Arc::as_ptr(a).cast::<()>(), Arc::as_ptr(b).cast::<()>())
}

/// A device that is not connected has no size: it must not pass as one of no bytes.
async fn check_length(device: &dyn BlockDevice) -> DeviceResult<()> {
    if device.size() > 0 {
        return Ok(());
    }
    let connected = device.flush(FlushLevel::Process).await;
    connected.map_err(|error| error.within(Operation::Control, device.name(), 0, 0))
}

fn check_chunk(chunk_bytes_max: u64, unit_bytes: u64) -> Result<(), JobError> {
    if chunk_bytes_max == 0 || chunk_bytes_max >= unit_bytes {
        return Ok(());
    }
    Err(JobError::Invalid(format!(
        "max-chunk: {chunk_bytes_max} bytes are less than a unit ({unit_bytes} bytes)"
    )))
}
