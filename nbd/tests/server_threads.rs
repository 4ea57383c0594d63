//! Connections that are served by several threads.

mod server_support;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use brep_block::Memory;
use brep_nbd::proto::wire::Errno;
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, ServerConfig, StaticExports,
};
use server_support::{Fixture, SIZE, within};
use tokio::runtime::{Builder, Handle};
use tokio_util::sync::CancellationToken;

/// Remembers in which runtimes connections have begun.
struct Watched {
    exports: StaticExports,
    seen: Mutex<Vec<String>>,
}

impl Exports for Watched {
    fn list(&self) -> Vec<ExportDescription> {
        self.exports.list()
    }

    fn open(&self, name: &str, connection: &Arc<Connection>) -> Result<Export, OptionError> {
        self.exports.open(name, connection)
    }

    fn begin(&self, _: &Export, _: &Arc<Connection>) {
        self.seen.lock().unwrap().push(Handle::current().id().to_string());
    }
}

fn worker(stop: &CancellationToken) -> (Handle, JoinHandle<()>) {
    let runtime = Builder::new_current_thread().enable_all().build().unwrap();
    let (handle, stop) = (runtime.handle().clone(), stop.clone());
    (handle, std::thread::spawn(move || runtime.block_on(stop.cancelled())))
}

#[tokio::test]
async fn connections_spread_over_the_runtimes_and_are_drained_from_all_of_them() {
    let stop = CancellationToken::new();
    let workers: Vec<_> = (0..3).map(|_| worker(&stop)).collect();
    let exports = StaticExports::new();
    exports.add(Export::new("disk", Memory::new("memory", SIZE)).multi_conn(true));
    let exports = Arc::new(Watched { exports, seen: Mutex::default() });
    let runtimes = workers.iter().map(|(runtime, _)| runtime.clone()).collect();
    let config = ServerConfig::default().runtimes(runtimes);
    let fixture = Fixture::serve(exports.clone(), config).await;

    let mut sessions = Vec::new();
    for number in 0..6 {
        let mut session = fixture.session(false).await;
        assert_eq!(session.write(number * 10, &[number as u8; 10]).await, Errno::OK);
        sessions.push(session);
    }
    for session in &mut sessions {
        assert_eq!(session.read(30, 20).await, [[3; 10], [4; 10]].concat());
    }
    let seen = exports.seen.lock().unwrap().clone();
    assert_eq!(seen[..3].iter().collect::<BTreeSet<_>>().len(), 3, "{seen:?}");
    assert_eq!(seen[3..].iter().collect::<BTreeSet<_>>().len(), 3, "{seen:?}");

    within(fixture.server.shutdown(Duration::from_secs(60))).await;
    for session in &mut sessions {
        assert!(session.is_closed().await);
    }
    assert!(fixture.server.connections().is_empty());
    stop.cancel();
    for (_, thread) in workers {
        thread.join().unwrap();
    }
}
