//! Commands and their answers.

use std::cell::Cell;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;

use brep_backup::{Job, JobError, Jobs, LiveDisk};
use brep_block::BlockDevice;
use brep_nbd::server::{Export, StaticExports};
use serde_json::{Value, json};
use tokio::sync::mpsc;

use crate::args::BackupArgs;
use crate::{Error, images, json};

const GRANULARITY_BYTES: u64 = 64 << 10;

pub(crate) struct Control {
    disk: Arc<LiveDisk>,
    jobs: Jobs,
    exports: Arc<StaticExports>,
    /// How many snapshots there have been.
    snapshots: Rc<Cell<u64>>,
    output: SyncSender<Value>,
}

impl Control {
    pub(crate) fn new(
        disk: Arc<LiveDisk>,
        jobs: Jobs,
        exports: Arc<StaticExports>,
        output: SyncSender<Value>,
    ) -> Self {
        Control { disk, jobs, exports, snapshots: Rc::default(), output }
    }

    /// Starts a job, and serves the disk as it is now for as long as it runs.
    pub(crate) async fn backup(&self, args: BackupArgs) -> Result<Value, Error> {
        let options = args.options()?;
        let path = args.target.as_ref().ok_or("Parameter 'target' is missing")?;
        let target = images::open(path, &args.target_backing, Some(self.disk.size())).await?;
        let id = options.id.clone();
        let job = match self.jobs.start(&self.disk, target.device.clone(), options).await {
            Ok(job) => job,
            Err(error) => {
                target.close().await?;
                return Err(error.into());
            }
        };
        let snapshot = job.snapshot("snapshot");
        self.exports.replace(Export::new("snapshot", snapshot).read_only(true)).await;
        let number = self.snapshots.get() + 1;
        self.snapshots.set(number);
        let (exports, snapshots) = (Arc::clone(&self.exports), Rc::clone(&self.snapshots));
        let output = self.output.clone();
        tokio::task::spawn_local(async move {
            job.wait().await;
            let closed = target.close().await.map_err(|error| error.to_string());
            let line = json::target_closed(&id, closed.err());
            // Whoever does not read misses events.
            drop(output.try_send(line));
            // The next job's is another.
            if snapshots.get() == number {
                exports.remove("snapshot").await;
            }
        });
        Ok(json!({}))
    }

    pub(crate) async fn cancel_all(&self) {
        for info in self.jobs.query() {
            // One that has ended meanwhile refuses, and is waited for no longer.
            if let Ok(job) = self.jobs.job(&info.id)
                && job.cancel(true).is_ok()
            {
                job.wait().await;
            }
        }
    }

    /// Answers commands until one is `quit`; without commands it goes on for ever.
    pub(crate) async fn take_commands(&self, mut lines: mpsc::Receiver<String>) {
        while let Some(line) = lines.recv().await {
            let request = serde_json::from_str(&line).unwrap_or(Value::Null);
            let mut answer = match self.execute(&request).await {
                Ok(value) => json!({ "return": value }),
                Err(error) => {
                    let missing = error.downcast_ref().is_some_and(is_not_found);
                    let class = if missing { "DeviceNotActive" } else { "GenericError" };
                    json!({ "error": { "class": class, "desc": error.to_string() } })
                }
            };
            if let Some(id) = request.get("id") {
                answer["id"] = id.clone();
            }
            if self.output.send(answer).is_err() || request["execute"] == "quit" {
                return;
            }
        }
        std::future::pending().await
    }

    async fn execute(&self, request: &Value) -> Result<Value, Error> {
        let command = request["execute"].as_str().ok_or("a command is {\"execute\": NAME}")?;
        let arguments = Arguments(&request["arguments"]);
        match command {
            "quit" => return Ok(json!({})),
            "query-block-jobs" => {
                return Ok(self.jobs.query().iter().map(json::job).collect());
            }
            "query-dirty-bitmaps" => {
                return Ok(self.disk.bitmaps().query().iter().map(json::bitmap).collect());
            }
            "blockdev-backup" => {
                let args = serde_json::from_value(request["arguments"].clone())?;
                return self.backup(args).await;
            }
            "checkpoint" => {
                // What was copied may stay in the target: it is copied over.
                self.job(&arguments, "device")?.checkpoint(async { Ok(()) }).await?;
            }
            "block-job-pause" => self.job(&arguments, "device")?.pause()?,
            "block-job-resume" => self.job(&arguments, "device")?.resume()?,
            "block-job-set-speed" => {
                let speed = arguments.number("speed")?.ok_or("Parameter 'speed' is missing")?;
                self.job(&arguments, "device")?.set_speed(speed)?;
            }
            "block-job-cancel" => {
                let force = request["arguments"]["force"].as_bool().unwrap_or(false);
                self.job(&arguments, "device")?.cancel(force)?;
            }
            "block-job-complete" => self.job(&arguments, "device")?.complete()?,
            "block-job-finalize" => self.job(&arguments, "id")?.finalize()?,
            "block-job-dismiss" => self.job(&arguments, "id")?.dismiss()?,
            _ => self.change_bitmap(command, &arguments)?,
        }
        Ok(json!({}))
    }

    fn change_bitmap(&self, command: &str, arguments: &Arguments) -> Result<(), Error> {
        let bitmaps = self.disk.bitmaps();
        let name = || arguments.text("name");
        match command {
            "block-dirty-bitmap-add" => {
                let granularity = arguments.number("granularity")?;
                bitmaps.add(name()?, granularity.unwrap_or(GRANULARITY_BYTES))?;
            }
            "block-dirty-bitmap-clear" => bitmaps.clear(name()?)?,
            "block-dirty-bitmap-remove" => bitmaps.remove(name()?)?,
            "block-dirty-bitmap-enable" => bitmaps.set_recording(name()?, true)?,
            "block-dirty-bitmap-disable" => bitmaps.set_recording(name()?, false)?,
            _ => return Err(format!("The command {command} has not been found").into()),
        }
        Ok(())
    }

    fn job(&self, arguments: &Arguments, key: &str) -> Result<Arc<Job>, Error> {
        Ok(self.jobs.job(arguments.text(key)?)?)
    }
}

/// The arguments of a command.
struct Arguments<'a>(&'a Value);

impl<'a> Arguments<'a> {
    fn text(&self, key: &str) -> Result<&'a str, Error> {
        Ok(self.0[key].as_str().ok_or(format!("Parameter '{key}' is missing"))?)
    }

    fn number(&self, key: &str) -> Result<Option<u64>, Error> {
        match &self.0[key] {
            Value::Null => Ok(None),
            value => {
                let wrong = format!("Parameter '{key}' must be a number from 0 on");
                Ok(Some(value.as_u64().ok_or(wrong)?))
            }
        }
    }
}

fn is_not_found(error: &JobError) -> bool {
    matches!(error, JobError::NotFound(_))
}
