//! A pair in one process, over unix sockets in a scratch directory.
#![allow(missing_docs, dead_code, unreachable_pub)]

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, CacheMode, WriteFlags};
use brep_nbd::Endpoint;
use brep_nbd::client::{ConnectOptions, Connection};
use brep_replication::config::{DiskConfig, DiskFormat, Durability, Role, SideConfig};
use brep_replication::control::{ClientError, ControlClient};
use bytes::Bytes;
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

pub const MIB: u64 = 1 << 20;

/// A scratch directory with the files of a pair.
pub struct Scratch(pub tempfile::TempDir);

impl Scratch {
    pub fn new() -> Self {
        Scratch(tempfile::tempdir().unwrap())
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn endpoint(&self, name: &str) -> Endpoint {
        Endpoint::Unix { path: self.path(name) }
    }

    /// A raw file in which every byte of every 512-byte sector is `byte` plus the sector number.
    pub fn raw(&self, name: &str, size: u64, byte: u8) -> PathBuf {
        let path = self.path(name);
        let data: Vec<u8> = (0..size).map(|i| byte.wrapping_add((i / 512) as u8)).collect();
        std::fs::write(&path, data).unwrap();
        path
    }

    /// The primary's state as a kill would leave it now: its files, without a clean stop.
    pub fn killed(&self) -> PathBuf {
        let killed = self.path("killed.state");
        copy_dir(&self.path("p.state"), &killed);
        killed
    }

    pub fn disk(&self, name: &str, file: &str) -> DiskConfig {
        DiskConfig {
            name: name.into(),
            path: self.path(file),
            format: DiskFormat::Raw,
            cache: CacheMode::Writeback,
            buffers: None,
        }
    }

    pub fn primary(&self, disks: Vec<DiskConfig>) -> SideConfig {
        SideConfig {
            peer: Some(self.endpoint("s.sock").into()),
            guest_listen: Some(self.endpoint("p-guest.sock")),
            durability: durability(),
            checkpoint_interval: None,
            ..SideConfig::new(Role::Primary, "p", self.path("p.state"), disks)
        }
    }

    pub fn secondary(&self, disks: Vec<DiskConfig>) -> SideConfig {
        SideConfig {
            listen: Some(self.endpoint("s.sock")),
            checkpoint_interval: None,
            durability: durability(),
            ..SideConfig::new(Role::Secondary, "s", self.path("s.state"), disks)
        }
    }
}

/// The default, or what the environment says: every test holds with either.
fn durability() -> Durability {
    match std::env::var("BREP_TEST_DURABILITY").as_deref() {
        Ok("process") => Durability::Process,
        Ok("power") => Durability::Power,
        _ => Durability::default(),
    }
}

/// A side that runs.
pub struct Side {
    pub control: PathBuf,
    shutdown: CancellationToken,
    task: JoinHandle<brep_replication::Result<()>>,
}

impl Side {
    pub fn run(config: SideConfig) -> Self {
        let control = config.state_dir.join("control.sock");
        let (shutdown, name) = (CancellationToken::new(), config.name.clone());
        let running = brep_replication::run(config, shutdown.clone());
        let task = async move { running.await.inspect_err(|e| eprintln!("{name}: {e}")) };
        Side { control, shutdown, task: tokio::spawn(task) }
    }

    /// The same in a thread of its own, as a process has it: what holds that up does not hold up the
    /// test.
    pub fn run_in_thread(config: SideConfig) -> Self {
        let control = config.state_dir.join("control.sock");
        let shutdown = CancellationToken::new();
        let running = shutdown.clone();
        let task = tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(brep_replication::run(config, running))
        });
        Side { control, shutdown, task }
    }

    /// A clean stop.
    pub async fn stop(self) {
        self.shutdown.cancel();
        self.task.await.unwrap().unwrap();
    }

    /// A stop of a side that cannot end cleanly.
    pub async fn ended_by_stop(self) -> brep_replication::Result<()> {
        self.shutdown.cancel();
        self.ended().await
    }

    /// Waits for a side that ends by itself.
    pub async fn ended(self) -> brep_replication::Result<()> {
        self.task.await.unwrap()
    }

    pub async fn command(&self, name: &str, arguments: Value) -> Result<Value, ClientError> {
        let (control, name) = (self.control.clone(), name.to_owned());
        tokio::task::spawn_blocking(move || {
            let mut client = ControlClient::connect(&control, Duration::from_secs(30))?;
            client.execute(&name, arguments)
        })
        .await
        .unwrap()
    }

    pub async fn status(&self) -> Value {
        self.command("query-status", json!({})).await.unwrap()
    }

    /// Waits until the status fits.
    pub async fn wait(&self, what: &str, fits: impl Fn(&Value) -> bool) -> Value {
        let deadline = tokio::time::Instant::now() + Duration::from_secs(30);
        let mut last = Value::Null;
        loop {
            if let Ok(status) = self.command("query-status", json!({})).await {
                if fits(&status) {
                    return status;
                }
                last = status;
            }
            assert!(!self.task.is_finished(), "{what}: this side has ended");
            assert!(tokio::time::Instant::now() < deadline, "{what}: {last:#}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// A primary that is in sync has also taken the checkpoint that ends its first copy.
    pub async fn wait_state(&self, state: &str) -> Value {
        if state == "promoted" {
            // Whatever an old primary says that goes on alone.
            return self.wait_merged().await;
        }
        let committed = |s: &Value| s["role"] != "primary" || !s["checkpoint-age-ms"].is_null();
        let fits =
            |s: &Value| s["disks"][0]["state"] == state && (state != "in-sync" || committed(s));
        self.wait(state, fits).await
    }

    async fn wait_merged(&self) -> Value {
        let merged = |s: &Value| {
            s["role"] == "promoted"
                && s["disks"].as_array().unwrap().iter().all(|d| d["progress"].is_null())
        };
        self.wait("promoted and merged", merged).await
    }

    pub async fn checkpoint(&self) -> u64 {
        self.command("checkpoint", json!({})).await.unwrap()["epoch"].as_u64().unwrap()
    }
}

pub async fn connect(endpoint: Endpoint, export: &str) -> Arc<Connection> {
    let deadline = tokio::time::Instant::now() + Duration::from_secs(10);
    loop {
        match Connection::connect(&ConnectOptions::new(endpoint.clone(), export)).await {
            Ok(connection) => return connection,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

pub async fn fill(device: &dyn BlockDevice, offset: u64, len: usize, byte: u8) {
    device.write(offset, Bytes::from(vec![byte; len]), WriteFlags::default()).await.unwrap();
}

pub async fn read(device: &dyn BlockDevice, offset: u64, len: usize) -> Vec<u8> {
    device.read(offset, len).await.unwrap().to_vec()
}

pub fn file(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap()
}

pub fn copy_dir(from: &Path, to: &Path) {
    std::fs::create_dir(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}
