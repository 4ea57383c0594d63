//! A connection to a server that follows a script.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use brep_block::{ErrorKind, Io, Result, WriteFlags};
use brep_nbd::client::{ConnectOptions, Connection};
use bytes::Bytes;
use futures_util::join;
use tokio::time::timeout;

use super::scripted::{Export, Listener, Server};

/// How long a test waits for what has to happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);

pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    timeout(PATIENCE, future).await.expect("this hangs")
}

/// A connection, and the server that follows the script.
pub(crate) struct Pair {
    pub(crate) disk: Arc<Connection>,
    pub(crate) server: Server,
    _directory: tempfile::TempDir,
}

pub(crate) async fn pair(export: Export, adjust: impl FnOnce(&mut ConnectOptions)) -> Pair {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let mut options = listener.options();
    adjust(&mut options);
    let (disk, server) =
        soon(async { join!(Connection::connect(&options), listener.accept(export)) }).await;
    Pair { disk: disk.expect("connected"), server, _directory: directory }
}

pub(crate) fn write(disk: &Connection, offset: u64, data: &[u8]) -> Io<'static, ()> {
    disk.start_write(offset, Bytes::copy_from_slice(data), WriteFlags::default())
}

pub(crate) fn kind<T: std::fmt::Debug>(result: Result<T>) -> ErrorKind {
    result.expect_err("an error").kind()
}
