use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use super::connection::{Connection, Stop};
use super::exports::{Export, Exports};
use crate::proto::server::{ExportDescription, OptionError};

/// A table of exports that can be changed at any time.
///
/// Names are the exports' canonical names. The empty name opens the export that has this name, or
/// the only one there is.
#[derive(Debug, Default)]
pub struct StaticExports {
    table: Mutex<BTreeMap<String, Entry>>,
}

#[derive(Debug)]
struct Entry {
    export: Export,
    /// Those that have opened it and may be using it.
    connections: Vec<Weak<Connection>>,
}

impl StaticExports {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an export under its canonical name; `false`, changing nothing, if there is one of
    /// this name already.
    pub fn add(&self, export: Export) -> bool {
        let mut table = self.table();
        if table.contains_key(&export.canonical_name) {
            return false;
        }
        let entry = Entry { export, connections: Vec::new() };
        table.insert(entry.export.canonical_name.clone(), entry);
        true
    }

    /// Puts an export in the place of the one of its name, if there is one: nobody can open the
    /// old one any more, its connections are closed, and have ended when this returns.
    pub async fn replace(&self, export: Export) {
        let entry = Entry { export, connections: Vec::new() };
        let old = self.table().insert(entry.export.canonical_name.clone(), entry);
        if let Some(old) = old {
            old.drain().await;
        }
    }

    /// Removes an export, closes its connections and waits until they have ended and nothing of
    /// theirs runs on the device any more. `false` if there is none of this name.
    pub async fn remove(&self, name: &str) -> bool {
        let old = self.table().remove(name);
        match old {
            Some(old) => {
                old.drain().await;
                true
            }
            None => false,
        }
    }

    /// Removes an export so that another server can go on with its disk: requests in flight are
    /// finished and answered, those that come meanwhile, and those that are not done after `grace`,
    /// are refused with `ESHUTDOWN`, then each connection is closed. When this returns, nothing of
    /// theirs runs on the device any more; an operation that hangs is waited for beyond `grace`.
    /// `false` if there is none of this name.
    pub async fn hand_over(&self, name: &str, grace: Duration) -> bool {
        let old = self.table().remove(name);
        let Some(old) = old else { return false };
        let users = old.users();
        let ended = async {
            for connection in &users {
                connection.shut_down();
            }
            for connection in &users {
                connection.closed().await;
            }
        };
        if tokio::time::timeout(grace, ended).await.is_err() {
            for connection in &users {
                connection.stop(Stop::Abort);
            }
        }
        old.drain().await;
        true
    }

    fn table(&self) -> MutexGuard<'_, BTreeMap<String, Entry>> {
        // No code that can panic runs under this lock.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Entry {
    /// Those that only asked about it and then chose another are none.
    fn users(&self) -> Vec<Arc<Connection>> {
        let name = &self.export.canonical_name;
        let mut users: Vec<_> = self.connections.iter().filter_map(Weak::upgrade).collect();
        users.retain(|connection| connection.export_name().is_none_or(|used| used == name));
        users
    }

    async fn drain(self) {
        let users = self.users();
        for connection in &users {
            connection.close();
        }
        for connection in &users {
            connection.closed().await;
        }
    }
}

impl Exports for StaticExports {
    fn list(&self) -> Vec<ExportDescription> {
        let describe = |entry: &Entry| ExportDescription {
            name: entry.export.canonical_name.clone(),
            description: entry.export.description.clone(),
        };
        self.table().values().map(describe).collect()
    }

    fn open(&self, name: &str, connection: &Arc<Connection>) -> Result<Export, OptionError> {
        let mut table = self.table();
        let only = (name.is_empty() && table.len() == 1).then(|| table.keys().next().cloned());
        let key = only.flatten().unwrap_or_else(|| name.to_owned());
        let entry = table.get_mut(&key).ok_or_else(|| OptionError::unknown_export(name))?;
        entry.connections.retain(|known| match known.upgrade() {
            // Not by number: another server may have the same exports.
            Some(known) => !Arc::ptr_eq(&known, connection) && !known.is_closed(),
            None => false,
        });
        entry.connections.push(Arc::downgrade(connection));
        Ok(entry.export.clone())
    }
}
