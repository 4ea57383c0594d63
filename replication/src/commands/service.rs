use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brep_nbd::Endpoint;
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, OptionErrorCode, PrivateReply,
    Server, ServerConfig,
};
use bytes::Bytes;
use futures_util::future::{BoxFuture, join_all};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::{Arguments, CommandResult};
use crate::control::{CommandError, EventBus};
use crate::reception::SharedListener;
use crate::tls::Exposure;
use crate::{Error, Result};

/// The time in which the clients' requests have to end when the server is stopped.
const STOP_GRACE: Duration = Duration::from_secs(10);

/// Longest description of an export, in bytes.
const DESCRIPTION_LEN_MAX: usize = 4096;

/// An NBD server that commands start and stop, and whose exports they add and remove. At first it
/// runs, with all disks.
pub(crate) struct Service {
    exports: Arc<Listed>,
    /// Clients are served from then on.
    allowed: CancellationToken,
    exposure: Exposure,
    events: EventBus,
    running: tokio::sync::Mutex<Option<Running>>,
}

struct Running {
    server: Arc<Server>,
    accepting: tokio::task::JoinHandle<()>,
    /// Where clients know the exports by other names.
    shared: Option<SharedListener>,
}

impl Running {
    /// The clients of a disk's export.
    fn clients_of(&self, disk: &str) -> Vec<Arc<Connection>> {
        let own = |name: &str| match &self.shared {
            Some(shared) => shared.own_name(name) == Some(disk),
            None => name == disk,
        };
        let mut clients = self.server.connections();
        clients.retain(|client| client.export_name().is_some_and(own) && !client.is_closed());
        clients
    }
}

/// Exports, as far as they are listed, for those who are allowed to use them.
struct Listed {
    inner: Arc<dyn Exports>,
    exposure: Exposure,
    /// By disk.
    entries: Mutex<BTreeMap<String, Entry>>,
    multi_conn: Mutex<bool>,
}

/// How a disk was exported whose export has been removed.
#[derive(Debug)]
pub(crate) struct RemovedExport(Entry);

#[derive(Debug, Clone)]
struct Entry {
    id: String,
    writable: bool,
    description: Option<String>,
    shutting_down: bool,
}

impl Entry {
    fn of_disk(name: &str) -> Self {
        Entry { id: name.to_owned(), writable: true, description: None, shutting_down: false }
    }
}

impl Listed {
    fn entries(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_id(&self, id: &str) -> bool {
        self.entries().values().any(|entry| entry.id == id)
    }

    fn multi_conn(&self) -> MutexGuard<'_, bool> {
        self.multi_conn.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What opening an export leads to.
pub(crate) type Opened = std::result::Result<Export, OptionError>;

impl Exports for Listed {
    fn list(&self) -> Vec<ExportDescription> {
        let entries = self.entries();
        let mut list = self.inner.list();
        list.retain(|export| entries.get(&export.name).is_some_and(|e| !e.shutting_down));
        for export in &mut list {
            if let Some(text) = entries.get(&export.name).and_then(|e| e.description.clone()) {
                export.description = text;
            }
        }
        list
    }

    fn open(&self, name: &str, connection: &Arc<Connection>) -> Opened {
        let mut export = self.inner.open(name, connection)?;
        let entry = self.entries().get(&export.canonical_name).cloned();
        let Some(entry) = entry.filter(|entry| !entry.shutting_down) else {
            return Err(OptionError::new(
                OptionErrorCode::Unknown,
                format!("{} is not exported at present", export.canonical_name),
            ));
        };
        self.exposure.limit(&mut export, connection);
        export.read_only |= !entry.writable;
        export.multi_conn &= *self.multi_conn();
        if let Some(description) = entry.description {
            export.description = description;
        }
        Ok(export)
    }

    fn begin(&self, export: &Export, connection: &Arc<Connection>) {
        self.inner.begin(export, connection);
    }

    fn private_option<'a>(
        &'a self,
        connection: &'a Arc<Connection>,
        option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        match self.exposure.check_private(connection) {
            Ok(()) => self.inner.private_option(connection, option, data),
            Err(refusal) => Box::pin(std::future::ready(PrivateReply::Error(refusal))),
        }
    }
}

impl Service {
    /// `allowed`: clients are accepted from its cancellation on.
    pub(crate) fn new(
        exports: Arc<dyn Exports>,
        allowed: CancellationToken,
        exposure: Exposure,
        events: EventBus,
    ) -> Arc<Self> {
        let exports = Listed {
            inner: exports,
            exposure: exposure.clone(),
            entries: Mutex::default(),
            multi_conn: Mutex::new(true),
        };
        Arc::new(Service {
            exports: Arc::new(exports),
            allowed,
            exposure,
            events,
            running: tokio::sync::Mutex::new(None),
        })
    }

    /// Listens, and exports all `disks` for reading and writing, unless it runs already.
    ///
    /// # Errors
    /// The address cannot be used.
    pub(crate) async fn serve(&self, endpoint: &Endpoint, disks: &[String]) -> Result<()> {
        let mut running = self.running.lock().await;
        if running.is_some() {
            return Ok(());
        }
        *running = Some(self.listen(endpoint, self.exposure.server_config(endpoint)).await?);
        *self.exports.multi_conn() = true;
        *self.exports.entries() =
            disks.iter().map(|name| (name.clone(), Entry::of_disk(name))).collect();
        Ok(())
    }

    /// Exports a disk that has come, for reading and writing, while the server runs.
    pub(crate) async fn add_disk(&self, name: &str) {
        if self.running.lock().await.is_some() {
            self.exports.entries().insert(name.to_owned(), Entry::of_disk(name));
        }
    }

    /// Takes the export of a disk away that has gone.
    pub(crate) fn forget_disk(&self, name: &str) {
        self.exports.entries().remove(name);
    }

    /// Ends the export of a disk, and returns it, if there is one: with `force` also of one with
    /// clients.
    ///
    /// # Errors
    /// It has clients, or their requests do not end.
    pub(crate) async fn remove_disk(
        &self,
        name: &str,
        force: bool,
    ) -> CommandResult<Option<RemovedExport>> {
        let entry = self.exports.entries().get(name).cloned();
        if let Some(entry) = &entry {
            self.remove(&entry.id, force).await?;
        }
        Ok(entry.map(RemovedExport))
    }

    /// Exports a disk again that has stayed, as it was exported.
    pub(crate) async fn put_back(&self, name: &str, export: RemovedExport) {
        if self.running.lock().await.is_some() {
            self.exports.entries().insert(name.to_owned(), export.0);
        }
    }

    async fn listen(&self, endpoint: &Endpoint, config: ServerConfig) -> Result<Running> {
        self.exposure.check(endpoint)?;
        let exports = Arc::clone(&self.exports) as Arc<dyn Exports>;
        if let Some(shared) = self.exposure.shared.as_ref().filter(|shared| shared.is_at(endpoint))
        {
            let server = Server::new(shared.exports(exports), config);
            let accepting = tokio::spawn({
                let (server, allowed) = (Arc::clone(&server), self.allowed.clone());
                let shared = shared.clone();
                async move {
                    allowed.cancelled().await;
                    let _attached = shared.attach(&server);
                    std::future::pending().await
                }
            });
            return Ok(Running { server, accepting, shared: Some(shared.clone()) });
        }
        let server = Server::new(exports, config);
        // Bound at once, so that an address in use is known now; served when it is allowed.
        let listener = Server::bind(endpoint).await.map_err(|e| Error::failed(e.to_string()))?;
        let accepting = tokio::spawn({
            let (server, allowed) = (Arc::clone(&server), self.allowed.clone());
            async move {
                allowed.cancelled().await;
                server.serve(listener).await;
            }
        });
        Ok(Running { server, accepting, shared: None })
    }

    /// Exports what is more than a disk, for reading and writing.
    pub(crate) fn show(&self, names: impl Iterator<Item = String>) {
        let entry = |name: String| (name.clone(), Entry::of_disk(&name));
        self.exports.entries().extend(names.map(entry));
    }

    /// Exports it no more; whoever uses it goes on.
    pub(crate) fn hide(&self, names: impl Iterator<Item = String>) {
        let mut entries = self.exports.entries();
        names.for_each(|name| drop(entries.remove(&name)));
    }

    /// Ends the server at the end of the process.
    pub(crate) async fn shut_down(&self) {
        if let Some(Running { server, accepting, .. }) = self.running.lock().await.take() {
            server.shutdown(STOP_GRACE).await;
            accepting.abort();
            let _ = accepting.await;
        }
    }

    /// The commands that concern the server and its exports.
    pub(crate) async fn command(
        &self,
        command: &str,
        disks: &[String],
        arguments: Arguments<'_>,
    ) -> CommandResult<()> {
        let text = |name| arguments.text(name).unwrap_or_default();
        let hard = arguments.text("mode") == Some("hard");
        match command {
            "nbd-server-start" => self.start(arguments).await,
            "nbd-server-stop" => self.stop().await,
            "nbd-server-add" => {
                let id = arguments.text("name").unwrap_or(text("device"));
                self.add(id, text("device"), disks, arguments).await
            }
            "block-export-add" => self.add(text("id"), text("node-name"), disks, arguments).await,
            "nbd-server-remove" => self.remove(text("name"), hard).await,
            "block-export-del" => self.remove(text("id"), hard).await,
            other => Err(CommandError::usage(format!("unknown command {other}"))),
        }
    }

    /// `nbd-server-start`.
    async fn start(&self, arguments: Arguments<'_>) -> CommandResult<()> {
        let mut running = self.running.lock().await;
        if running.is_some() {
            return Err(CommandError::refused("NBD server already running"));
        }
        let credentials = arguments.text("tls-creds").or(arguments.text("tls-authz"));
        if let Some(id) = credentials {
            return Err(CommandError::usage(format!("No TLS credentials with id '{id}'")));
        }
        let endpoint = address(arguments.object("addr"))?;
        let clients = arguments.number("max-connections").unwrap_or(0);
        let clients = usize::try_from(clients).map_err(|_| {
            CommandError::usage("Parameter 'max-connections' expects a value of 0 or more")
        })?;
        let mut config = self.exposure.server_config(&endpoint);
        if clients > 0 {
            config = config.connections_max(clients);
        }
        *running = Some(self.listen(&endpoint, config).await?);
        *self.exports.multi_conn() = clients != 1;
        Ok(())
    }

    /// `nbd-server-stop`: clients and exports are gone when this returns.
    pub(crate) async fn stop(&self) -> CommandResult<()> {
        let Some(Running { server, accepting, .. }) = self.running.lock().await.take() else {
            return Err(CommandError::refused("NBD server not running"));
        };
        accepting.abort();
        // Its listener is gone when it has ended: nobody connects any more.
        let _ = accepting.await;
        let entries = std::mem::take(&mut *self.exports.entries());
        let clients = server.connections();
        clients.iter().for_each(|client| client.close());
        server.shutdown(STOP_GRACE).await;
        drain(&clients).await?;
        entries.into_values().for_each(|entry| self.deleted(&entry.id));
        Ok(())
    }

    /// `nbd-server-add` and `block-export-add`.
    async fn add(
        &self,
        id: &str,
        disk: &str,
        disks: &[String],
        arguments: Arguments<'_>,
    ) -> CommandResult<()> {
        let failed = |text: String| Err(CommandError::refused(text));
        if self.running.lock().await.is_none() {
            return failed("NBD server not running".to_owned());
        }
        if !well_formed(id) {
            return failed(format!("Invalid block export id '{id}'"));
        }
        if self.exports.has_id(id) {
            return failed(format!("Block export id '{id}' is already in use"));
        }
        if !disks.iter().any(|name| name == disk) {
            return failed(format!("Cannot find device='{disk}' nor node-name='{disk}'"));
        }
        let name = arguments.text("name").unwrap_or(disk);
        if name.len() > DESCRIPTION_LEN_MAX {
            return failed(format!("export name '{name:.32}...' too long"));
        }
        if name != disk {
            return failed(format!(
                "export name '{name}': an export has its disk's name, '{disk}', on both sides"
            ));
        }
        let description = arguments.text("description").map(str::to_owned);
        if description.as_ref().is_some_and(|text| text.len() > DESCRIPTION_LEN_MAX) {
            return failed(format!("description longer than {DESCRIPTION_LEN_MAX} bytes"));
        }
        if let Some(bitmap) = arguments.text("bitmap") {
            return failed(format!("Bitmap '{bitmap}' is not found"));
        }
        if arguments.has("bitmaps") || arguments.flag("allocation-depth") {
            return failed(format!("Disk '{disk}' has no bitmaps and no allocation depth"));
        }
        let mut entries = self.exports.entries();
        if entries.contains_key(disk) {
            return failed(format!("NBD server already has export named '{name}'"));
        }
        let writable = arguments.flag("writable");
        let entry = Entry { id: id.to_owned(), writable, description, shutting_down: false };
        entries.insert(disk.to_owned(), entry);
        Ok(())
    }

    /// `nbd-server-remove` and `block-export-del`: returns when no client of it is left.
    async fn remove(&self, id: &str, hard: bool) -> CommandResult<()> {
        let clients = {
            let running = self.running.lock().await;
            let mut entries = self.exports.entries();
            let Some((disk, entry)) = entries.iter_mut().find(|(_, entry)| entry.id == id) else {
                return Err(CommandError::refused(format!("Export '{id}' is not found")));
            };
            if entry.shutting_down {
                let text = format!("Export '{id}' is already shutting down");
                return Err(CommandError::refused(text));
            }
            let clients = running.as_ref().map_or_else(Vec::new, |r| r.clients_of(disk));
            if !clients.is_empty() && !hard {
                return Err(CommandError::refused(format!("export '{id}' still in use")));
            }
            entry.shutting_down = true;
            clients
        };
        clients.iter().for_each(|client| client.close());
        let drained = drain(&clients).await;
        match &drained {
            Ok(()) => {
                self.exports.entries().retain(|_, entry| entry.id != id);
                self.deleted(id);
            }
            // It can be tried again.
            Err(_) => self
                .exports
                .entries()
                .values_mut()
                .filter(|entry| entry.id == id)
                .for_each(|entry| entry.shutting_down = false),
        }
        drained
    }

    fn deleted(&self, id: &str) {
        self.events.emit("BLOCK_EXPORT_DELETED", json!({ "id": id }));
    }

    /// `query-block-exports`.
    pub(crate) fn to_value(&self) -> Value {
        let entries = self.exports.entries();
        let describe = |(disk, entry): (&String, &Entry)| {
            json!({
                "id": entry.id,
                "type": "nbd",
                "node-name": disk,
                "shutting-down": entry.shutting_down,
            })
        };
        entries.iter().map(describe).collect()
    }
}

/// Waits until nothing of these clients goes on.
async fn drain(clients: &[Arc<Connection>]) -> CommandResult<()> {
    let ended = join_all(clients.iter().map(|client| client.closed()));
    tokio::time::timeout(STOP_GRACE, ended).await.map(drop).map_err(|_| {
        CommandError::failed(format!(
            "requests of clients have not ended within {STOP_GRACE:?}; a disk may be stuck"
        ))
    })
}

/// The characters of an identifier.
fn well_formed(id: &str) -> bool {
    let inside = |c: char| c.is_ascii_alphanumeric() || "-._".contains(c);
    id.starts_with(|c: char| c.is_ascii_alphabetic()) && id.chars().all(inside)
}

fn address(given: Option<Arguments<'_>>) -> CommandResult<Endpoint> {
    let data = given.and_then(|addr| addr.object("data"));
    let text = |name: &str| data.and_then(|d| d.text(name)).unwrap_or_default().to_owned();
    if data.is_some_and(|d| d.has("path")) {
        return Ok(Endpoint::Unix { path: text("path").into() });
    }
    let port = text("port");
    match port.parse() {
        Ok(port) => Ok(Endpoint::Tcp { host: text("host"), port }),
        Err(_) => {
            Err(CommandError::usage(format!("Port '{port}' is not a number from 0 to 65535")))
        }
    }
}

#[cfg(test)]
mod tests {
    use brep_block::{BlockDevice, Memory};
    use brep_nbd::client::{ConnectOptions, Connection as Client};
    use brep_nbd::server::StaticExports;

    use super::*;

    struct Rig {
        service: Arc<Service>,
        events: EventBus,
        endpoint: Endpoint,
        _folder: tempfile::TempDir,
    }

    impl Rig {
        async fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let endpoint = Endpoint::Unix { path: folder.path().join("s.sock") };
            let exports = StaticExports::new();
            exports.add(Export::new("vda", Memory::new("vda", 65_536)).multi_conn(true));
            let (allowed, events) = (CancellationToken::new(), EventBus::new());
            allowed.cancel();
            let service =
                Service::new(Arc::new(exports), allowed, Exposure::default(), events.clone());
            service.serve(&endpoint, &["vda".to_owned()]).await.unwrap();
            Rig { service, events, endpoint, _folder: folder }
        }

        async fn command(
            &self,
            command: &str,
            arguments: Value,
        ) -> std::result::Result<(), String> {
            let arguments = arguments.as_object().unwrap();
            let done =
                self.service.command(command, &["vda".to_owned()], Arguments(arguments)).await;
            done.map_err(|error| error.desc)
        }

        async fn connect(&self) -> std::result::Result<Arc<Client>, String> {
            let options = ConnectOptions::new(self.endpoint.clone(), "vda");
            Client::connect(&options).await.map_err(|error| error.to_string())
        }
    }

    #[tokio::test]
    async fn an_export_with_a_client_goes_only_hard_and_then_its_id_is_free() {
        let rig = Rig::new().await;
        let mut events = rig.events.listen();
        let client = rig.connect().await.unwrap();
        let remove = |mode| rig.command("block-export-del", json!({ "id": "vda", "mode": mode }));
        assert_eq!(remove("safe").await.unwrap_err(), "export 'vda' still in use");
        client.read(0, 512).await.unwrap();
        remove("hard").await.unwrap();
        assert_eq!(events.next().unwrap()["data"], json!({ "id": "vda" }));
        client.read(0, 512).await.unwrap_err();
        assert_eq!(remove("hard").await.unwrap_err(), "Export 'vda' is not found");
        assert!(rig.connect().await.is_err(), "it is not exported");
        rig.command("nbd-server-add", json!({ "device": "vda" })).await.unwrap();
        let client = rig.connect().await.unwrap();
        assert!(client.limits().read_only, "unless it is to be writable");
    }

    #[tokio::test]
    async fn a_server_that_was_stopped_listens_no_more_and_starts_without_exports() {
        let rig = Rig::new().await;
        rig.command("nbd-server-stop", json!({})).await.unwrap();
        assert!(rig.connect().await.is_err());
        let Endpoint::Unix { path } = &rig.endpoint else { unreachable!() };
        let addr = json!({ "type": "unix", "data": { "path": path } });
        let start = json!({ "addr": addr, "max-connections": 1 });
        rig.command("nbd-server-start", start).await.unwrap();
        assert!(rig.connect().await.is_err(), "it has no exports");
        assert_eq!(rig.service.to_value(), json!([]));
        let add =
            |id: &str| json!({ "type": "nbd", "id": id, "node-name": "vda", "writable": true });
        let bad = rig.command("block-export-add", add("7 x")).await;
        assert_eq!(bad.unwrap_err(), "Invalid block export id '7 x'");
        rig.command("block-export-add", add("e0")).await.unwrap();
        let again = rig.command("block-export-add", add("e1")).await;
        assert_eq!(again.unwrap_err(), "NBD server already has export named 'vda'");
        assert!(!rig.connect().await.unwrap().limits().read_only);
    }
}
