use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, StaticExports,
};
use tokio_util::sync::CancellationToken;

/// Exports that tell when nobody uses them any more. Those who only ask do not count.
pub(super) struct LastClient {
    exports: StaticExports,
    users: Arc<AtomicUsize>,
    gone: CancellationToken,
}

impl LastClient {
    pub(super) fn new(exports: StaticExports, gone: CancellationToken) -> Self {
        LastClient { exports, users: Arc::default(), gone }
    }
}

impl Exports for LastClient {
    fn list(&self) -> Vec<ExportDescription> {
        self.exports.list()
    }

    fn open(&self, name: &str, connection: &Arc<Connection>) -> Result<Export, OptionError> {
        self.exports.open(name, connection)
    }

    fn begin(&self, export: &Export, connection: &Arc<Connection>) {
        self.exports.begin(export, connection);
        self.users.fetch_add(1, Ordering::Relaxed);
        let (users, gone) = (Arc::clone(&self.users), self.gone.clone());
        let connection = Arc::clone(connection);
        tokio::spawn(async move {
            connection.closed().await;
            if users.fetch_sub(1, Ordering::Relaxed) == 1 {
                gone.cancel();
            }
        });
    }
}
