//! One address for several groups: who connects there names the group, and is served by it from then
//! on, in its own thread.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use brep_nbd::Endpoint;
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, Home, OptionError, OptionErrorCode,
    PrivateReply, Server, Wanted,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use tokio_util::sync::CancellationToken;

use crate::commands::Opened;
use crate::config::SideConfig;
use crate::daemon::run_in_thread;
use crate::link::{OPTION_BIND, OPTION_LINK};
use crate::{Error, Result};

/// The time in which clients that have named no group yet have to end at a clean stop.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// Bytes of the private options before the name of the group.
const LINK_LEN: usize = 4;
const BIND_LEN: usize = 20;

/// An address that several groups of one process share.
#[derive(Clone)]
pub struct SharedListener {
    reception: Arc<Reception>,
    group: String,
}

/// Knows where each group is served; touches none of them.
struct Reception {
    endpoint: Endpoint,
    groups: Mutex<BTreeMap<String, Home>>,
}

/// A group is served at the shared address until this is dropped.
pub(crate) struct Attached {
    listener: SharedListener,
    server: Arc<Server>,
}

impl fmt::Debug for SharedListener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SharedListener")
            .field("endpoint", &self.reception.endpoint)
            .field("group", &self.group)
            .finish()
    }
}

impl SharedListener {
    /// The places of groups of these names at one address.
    pub fn places(endpoint: &Endpoint, groups: &[String]) -> Vec<Self> {
        let (endpoint, known) = (endpoint.clone(), Mutex::default());
        let reception = Arc::new(Reception { endpoint, groups: known });
        let place = |group: &String| SharedListener {
            reception: Arc::clone(&reception),
            group: group.clone(),
        };
        groups.iter().map(place).collect()
    }

    /// The name of the group whose place this is.
    #[must_use]
    pub fn group(&self) -> &str {
        &self.group
    }

    pub(crate) fn is_at(&self, endpoint: &Endpoint) -> bool {
        self.reception.endpoint == *endpoint
    }

    /// The exports under their names at the shared address.
    pub(crate) fn exports(&self, inner: Arc<dyn Exports>) -> Arc<dyn Exports> {
        Arc::new(OfGroup { place: self.clone(), inner })
    }

    /// The name at the shared address of an export of the group.
    fn shared_name(&self, own: &str) -> String {
        format!("{}/{own}", self.group)
    }

    /// What the group calls an export that has this name at the shared address.
    pub(crate) fn own_name<'a>(&self, name: &'a str) -> Option<&'a str> {
        name.strip_prefix(self.group.as_str())?.strip_prefix('/')
    }

    /// From now on clients of the group are served by `server`, in the present runtime.
    pub(crate) fn attach(&self, server: &Arc<Server>) -> Attached {
        let (server, runtime) = (Arc::clone(server), tokio::runtime::Handle::current());
        let home = Home { server: Arc::clone(&server), runtime };
        self.reception.groups().insert(self.group.clone(), home);
        Attached { listener: self.clone(), server }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let mut groups = self.listener.reception.groups();
        let mine = |home: &Home| Arc::ptr_eq(&home.server, &self.server);
        if groups.get(&self.listener.group).is_some_and(mine) {
            groups.remove(&self.listener.group);
        }
    }
}

impl Reception {
    fn groups(&self) -> MutexGuard<'_, BTreeMap<String, Home>> {
        self.groups.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn refusal(wanted: Wanted<'_>) -> OptionError {
        OptionError::new(
            OptionErrorCode::Unknown,
            match group_of(wanted) {
                None => {
                    "this address serves several groups: name one, --peer nbd://HOST:PORT/GROUP for \
                     a primary, and nbd://HOST:PORT/GROUP/DISK for a guest"
                        .to_owned()
                }
                Some(group) => format!(
                    "no group {group:?} is served here at present: correct its name, or start it"
                ),
            },
        )
    }
}

/// The group that a client has named.
fn group_of(wanted: Wanted<'_>) -> Option<&str> {
    let from = |data: &'_ [u8], at: usize| data.get(at..).map(<[u8]>::len);
    let group = match wanted {
        Wanted::Export(name) => name.split_once('/').map(|(group, _)| group),
        Wanted::Private(OPTION_LINK, data) if from(data, LINK_LEN).is_some() => {
            std::str::from_utf8(&data[LINK_LEN..]).ok()
        }
        Wanted::Private(OPTION_BIND, data) if from(data, BIND_LEN).is_some() => {
            std::str::from_utf8(&data[BIND_LEN..]).ok()
        }
        Wanted::Private(..) => None,
    };
    group.filter(|group| !group.is_empty())
}

impl Exports for Reception {
    fn home(&self, wanted: Wanted<'_>) -> Option<Home> {
        self.groups().get(group_of(wanted)?).cloned()
    }

    /// Who may know which groups there are is the groups' matter.
    fn list(&self) -> Vec<ExportDescription> {
        Vec::new()
    }

    fn open(&self, name: &str, _: &Arc<Connection>) -> Opened {
        Err(Self::refusal(Wanted::Export(name)))
    }

    fn private_option<'a>(
        &'a self,
        _: &'a Arc<Connection>,
        option: u32,
        data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        let refusal = Self::refusal(Wanted::Private(option, &data));
        Box::pin(std::future::ready(match option {
            OPTION_LINK | OPTION_BIND => PrivateReply::Error(refusal),
            _ => PrivateReply::Unsupported,
        }))
    }
}

/// A group's exports, whose names begin with the group's for everybody outside of it.
struct OfGroup {
    place: SharedListener,
    inner: Arc<dyn Exports>,
}

impl Exports for OfGroup {
    fn list(&self) -> Vec<ExportDescription> {
        let mut list = self.inner.list();
        list.iter_mut().for_each(|export| export.name = self.place.shared_name(&export.name));
        list
    }

    fn open(&self, name: &str, connection: &Arc<Connection>) -> Opened {
        let own = self.place.own_name(name);
        let own = own.ok_or_else(|| Reception::refusal(Wanted::Export(name)))?;
        let mut export = self.inner.open(own, connection)?;
        // The name by which others find it here.
        export.canonical_name = self.place.shared_name(&export.canonical_name);
        Ok(export)
    }

    fn begin(&self, export: &Export, connection: &Arc<Connection>) {
        let mut export = export.clone();
        if let Some(own) = self.place.own_name(&export.canonical_name) {
            export.canonical_name = own.to_owned();
        }
        self.inner.begin(&export, connection);
    }

    fn private_option<'a>(
        &'a self,
        connection: &'a Arc<Connection>,
        option: u32,
        mut data: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        // It has led here, and says nothing more.
        match option {
            OPTION_LINK => data.truncate(LINK_LEN),
            OPTION_BIND => data.truncate(BIND_LEN),
            _ => {}
        }
        self.inner.private_option(connection, option, data)
    }
}

/// Runs several groups at one address, each in a thread of its own, until `shutdown` is cancelled or
/// all have ended. What goes wrong with one does not stop another. TLS at the shared address is that
/// of the first group; who is allowed, each group's own.
///
/// # Errors
/// The address cannot be used: then no group has been started. Or what the first failed group says,
/// when all have ended.
pub async fn run_groups(groups: Vec<SideConfig>, shutdown: CancellationToken) -> Result<()> {
    let first = groups.first().and_then(|config| Some((config, config.shared.as_ref()?)));
    let (config, place) = first.ok_or_else(|| Error::usage("no group with a shared address"))?;
    let (endpoint, exposure) = (&place.reception.endpoint, config.exposure());
    exposure.check(endpoint)?;
    let server = Server::new(Arc::clone(&place.reception) as _, exposure.server_config(endpoint));
    let listener = Server::bind(endpoint).await.map_err(|e| Error::failed(e.to_string()))?;
    let serving = Arc::clone(&server);
    tokio::spawn(async move { serving.serve(listener).await });
    let mut running = Vec::new();
    for config in groups {
        let group = config.shared.as_ref().map_or(String::new(), |place| place.group.clone());
        running.push((group, run_in_thread(config, shutdown.child_token())));
    }
    let mut result = Ok(());
    for (group, ended) in running {
        let ended = match ended {
            Ok(ended) => ended.await.unwrap_or_else(|_| Err(Error::failed("it has panicked"))),
            Err(error) => Err(error),
        };
        result = result.and(ended.map_err(|error| error.context(format!("group {group}"))));
    }
    server.shutdown(STOP_GRACE).await;
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_client_names_its_group_in_whatever_it_asks_for() {
        let link = |data: &'static [u8]| group_of(Wanted::Private(OPTION_LINK, data));
        assert_eq!(group_of(Wanted::Export("web/vda")), Some("web"));
        assert_eq!(group_of(Wanted::Export("web/test/vda")), Some("web"));
        assert_eq!(group_of(Wanted::Export("vda")), None);
        assert_eq!(group_of(Wanted::Export("/vda")), None);
        assert_eq!(link(b"\0\0\0\x03web"), Some("web"));
        assert_eq!(link(b"\0\0\0\x03"), None);
        assert_eq!(link(b"\0\0"), None);
        assert_eq!(link(b"\0\0\0\x03\xff"), None);
        let bind = [&[0; 20][..], b"web"].concat();
        assert_eq!(group_of(Wanted::Private(OPTION_BIND, &bind)), Some("web"));
        assert_eq!(group_of(Wanted::Private(OPTION_BIND, &bind[..19])), None);
        assert_eq!(group_of(Wanted::Private(7, &bind)), None);
    }

    /// Remembers what has begun.
    #[derive(Default)]
    struct Begun(Mutex<Vec<String>>);

    impl Exports for Begun {
        fn list(&self) -> Vec<ExportDescription> {
            Vec::new()
        }

        fn open(&self, name: &str, _: &Arc<Connection>) -> Opened {
            Ok(Export::new(name, brep_block::Memory::new(name, 4096)))
        }

        fn begin(&self, export: &Export, _: &Arc<Connection>) {
            self.0.lock().unwrap().push(export.canonical_name.clone());
        }
    }

    #[tokio::test]
    async fn a_group_is_told_its_own_names_and_a_client_those_of_the_address() {
        let dir = tempfile::tempdir().unwrap();
        let endpoint = Endpoint::Unix { path: dir.path().join("s.sock") };
        let place = &SharedListener::places(&endpoint, &["web".to_owned()])[0];
        assert_eq!(place.own_name("web/vda"), Some("vda"));
        assert_eq!(place.own_name("webb/vda").or(place.own_name("vda")), None);
        let begun = Arc::new(Begun::default());
        let server = Server::new(place.exports(Arc::clone(&begun) as _), Default::default());
        let listener = Server::bind(&endpoint).await.unwrap();
        let serving = Arc::clone(&server);
        tokio::spawn(async move { serving.serve(listener).await });
        let options = brep_nbd::client::ConnectOptions::new(endpoint, "web/vda");
        let client = brep_nbd::client::Connection::connect(&options).await.unwrap();
        assert_eq!(client.export().canonical_name.as_deref(), Some("web/vda"));
        brep_block::BlockDevice::read(&*client, 0, 512).await.unwrap();
        assert_eq!(*begun.0.lock().unwrap(), ["vda"]);
    }

    #[test]
    fn a_refusal_names_no_group_but_the_one_that_was_asked_for() {
        let endpoint = Endpoint::Unix { path: "/s".into() };
        let places = SharedListener::places(&endpoint, &["web".to_owned(), "db".to_owned()]);
        assert!(places[0].is_at(&endpoint));
        let reception = &places[0].reception;
        assert!(reception.home(Wanted::Export("web/vda")).is_none(), "it has not been started");
        assert!(reception.list().is_empty());
        for wanted in [Wanted::Export("web"), Wanted::Export("mail/vda")] {
            let text = Reception::refusal(wanted).to_string();
            assert!(!text.contains("\"db\"") && !text.contains("\"web\""), "{text}");
        }
    }
}
