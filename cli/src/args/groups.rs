//! `brep secondaries FILE`: what stands in the file, as what it means.

use std::ops::Range;
use std::path::{Path, PathBuf};

use brep_replication::SharedListener;
use brep_replication::config::SideConfig;
use clap::{Args, Command, FromArgMatches};
use toml_edit::{Document, Item, TableLike, Value};

use super::disk::check_name;
use super::pair::SecondaryArgs;
use crate::exit::Failure;

/// What stands at the top of the file alone: all groups share it.
const SHARED: &[&str] = &["listen", "tls-dir", "tls", "allow-plaintext"];

/// What is typed, and not kept in a file.
const TYPED: &[&str] = &["discard-local", "dry-run", "json", "end-with-parent", "help"];

/// Longest file, in bytes, and most groups in it.
const FILE_LEN_MAX: u64 = 1 << 20;
const GROUPS_MAX: usize = 256;

/// Receive the writes of many primaries in one process, at one address
#[derive(Debug, Args)]
#[command(after_help = "\
The file is TOML. Its keys are the options of `brep secondary`, without the dashes; what stands before
the first group is for all of them. `listen`, `tls-dir`, `tls` and `allow-plaintext` stand there alone.
  listen = \"nbd://127.0.0.1:10809\"
  [group.web]
  disk = [\"vda=/srv/web.qcow2\"]
  state-dir = \"/var/lib/brep/web\"
A primary connects with --peer nbd://127.0.0.1:10809/web; after a failover guests find web/vda there.
Every group has its own control socket, and is commanded like a secondary of its own.")]
pub(crate) struct SecondariesArgs {
    /// The file that describes the groups
    #[arg(value_name = "FILE")]
    file: PathBuf,

    /// Only check the file
    #[arg(long)]
    pub(crate) check: bool,
}

impl SecondariesArgs {
    /// What the file says, as what it means.
    pub(crate) fn resolve(&self) -> Result<Vec<SideConfig>, Failure> {
        let text = read(&self.file)?;
        Groups { file: &self.file, text: &text }.resolve()
    }
}

fn read(file: &Path) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::usage(format!("{}: {error}", file.display()));
    if std::fs::metadata(file).map_err(failed)?.len() > FILE_LEN_MAX {
        let size = FILE_LEN_MAX;
        return Err(Failure::usage(format!("{}: longer than {size} bytes", file.display())));
    }
    std::fs::read_to_string(file).map_err(failed)
}

/// The text of the file.
struct Groups<'a> {
    file: &'a Path,
    text: &'a str,
}

/// An option with its place in the text.
struct Given {
    key: String,
    span: Range<usize>,
    words: Vec<String>,
}

impl Groups<'_> {
    fn resolve(&self) -> Result<Vec<SideConfig>, Failure> {
        let document = Document::parse(self.text)
            .map_err(|error| Failure::usage(format!("{}: {error}", self.file.display())))?;
        let top = document.as_table();
        let Some(groups) = top.get("group").and_then(Item::as_table_like) else {
            return Err(self.fault(0..0, "no group: [group.NAME]"));
        };
        let names: Vec<_> = groups.iter().map(|(name, _)| name.to_owned()).collect();
        if names.is_empty() || names.len() > GROUPS_MAX {
            return Err(self.fault(0..0, &format!("there may be 1 to {GROUPS_MAX} groups")));
        }
        let shared = self.options(top, |key| key != "group")?;
        let mut configs = Vec::new();
        for name in &names {
            let (header, table) = groups.get_key_value(name).map_or((0..0, None), |(key, item)| {
                (key.span().unwrap_or_default(), item.as_table_like())
            });
            check_name(name).map_err(|error| self.fault(header.clone(), &error))?;
            let table = table.ok_or_else(|| self.fault(header.clone(), "a group is a table"))?;
            let own = self.options(table, |_| true)?;
            if let Some(given) = own.iter().find(|given| SHARED.contains(&given.key.as_str())) {
                let what = format!("{}: all groups share it; it stands before them", given.key);
                return Err(self.fault(given.span.clone(), &what));
            }
            configs.push(self.group(&shared, &own, header)?);
        }
        let listen = configs.first().and_then(|config| config.listen.clone());
        let listen = listen.ok_or_else(|| self.fault(0..0, "listen is missing"))?;
        for (config, place) in configs.iter_mut().zip(SharedListener::places(&listen, &names)) {
            config.shared = Some(place);
        }
        Ok(configs)
    }

    /// A group, as if its options had been typed.
    fn group(
        &self,
        shared: &[Given],
        own: &[Given],
        header: Range<usize>,
    ) -> Result<SideConfig, Failure> {
        let is_own = |key: &str| own.iter().any(|given| given.key == key);
        let common = shared.iter().filter(|given| !is_own(&given.key));
        let given: Vec<_> = common.chain(own).collect();
        let place = |text: &str| {
            let named = given.iter().find(|given| text.contains(&format!("--{} ", given.key)));
            let named = named
                .or_else(|| given.iter().find(|given| text.contains(&format!("--{}", given.key))));
            named.map_or(header.clone(), |given| given.span.clone())
        };
        let words = given.iter().flat_map(|given| given.words.iter());
        let matches = command().try_get_matches_from(words).map_err(|error| {
            let text = error.render().to_string();
            let first = text.split("\n\n").next().unwrap_or_default();
            let text = first.strip_prefix("error: ").unwrap_or(first);
            self.fault(place(text), text)
        })?;
        let args = SecondaryArgs::from_arg_matches(&matches)
            .map_err(|error| self.fault(header.clone(), &error.to_string()))?;
        args.resolve().map_err(|failure| {
            let text = failure.to_string();
            self.fault(place(&text), &text)
        })
    }

    fn options(
        &self,
        table: &dyn TableLike,
        wanted: impl Fn(&str) -> bool,
    ) -> Result<Vec<Given>, Failure> {
        let known = command();
        let mut options = Vec::new();
        for (key, item) in table.iter().filter(|(key, _)| wanted(key)) {
            let span = table.key(key).and_then(toml_edit::Key::span).unwrap_or_default();
            let is_known = known.get_arguments().any(|arg| arg.get_long() == Some(key));
            if !is_known || TYPED.contains(&key) {
                let text = format!("{key}: no option that brep secondary takes from a file");
                return Err(self.fault(span, &text));
            }
            let words = item.as_value().and_then(|value| words(key, value)).ok_or_else(|| {
                self.fault(span.clone(), &format!("{key}: a text, number, bool or list of texts"))
            })?;
            options.push(Given { key: key.to_owned(), span, words });
        }
        Ok(options)
    }

    /// A fault with the line that it is in.
    fn fault(&self, span: Range<usize>, what: &str) -> Failure {
        let before = self.text.get(..span.start).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        Failure::usage(format!("{}:{line}: {what}", self.file.display()))
    }
}

fn command() -> Command {
    SecondaryArgs::augment_args(Command::new("secondary").no_binary_name(true))
}

/// An option as it would be typed.
fn words(key: &str, value: &Value) -> Option<Vec<String>> {
    let word = |text: &str| format!("--{key}={text}");
    Some(match value {
        Value::String(text) => vec![word(text.value())],
        Value::Integer(number) => vec![word(&number.value().to_string())],
        Value::Float(number) => vec![word(&number.value().to_string())],
        Value::Boolean(flag) if *flag.value() => vec![format!("--{key}")],
        Value::Boolean(_) => Vec::new(),
        Value::Array(list) => {
            list.iter().map(|item| item.as_str().map(word)).collect::<Option<_>>()?
        }
        Value::Datetime(_) | Value::InlineTable(_) => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(text: &str) -> Result<Vec<SideConfig>, String> {
        let groups = Groups { file: Path::new("g.toml"), text };
        groups.resolve().map_err(|failure| failure.to_string())
    }

    const TWO: &str = r#"listen = "nbd://127.0.0.1:10809"
peer-timeout = "7s"

[group.web]
disk = ["vda=/srv/web.qcow2", "vdb=/srv/web.raw"]
state-dir = "/var/lib/web"

[group.db]
disk = "vda=/srv/db.raw"
state-dir = "/var/lib/db"
peer-timeout = "9s"
plain-primary = false
"#;

    #[test]
    fn every_group_is_a_secondary_of_its_own_at_the_shared_address() {
        let configs = resolve(TWO).unwrap();
        let places: Vec<_> = configs.iter().map(|c| c.shared.as_ref().unwrap().group()).collect();
        assert_eq!(places, ["web", "db"]);
        assert_eq!(configs[0].disks.len(), 2);
        assert_eq!(configs[0].listen, configs[1].listen);
        let timeouts: Vec<_> = configs.iter().map(|c| c.peer_timeout.as_secs()).collect();
        assert_eq!(timeouts, [7, 9], "the group's own goes before that of all");
        assert!(!configs[1].plain_primary);
    }

    #[test]
    fn a_fault_is_told_with_its_line() {
        for (old, new, line, what) in [
            ("peer-timeout = \"9s\"", "peer-timeot = 9", 11, "peer-timeot"),
            ("peer-timeout = \"9s\"", "peer-timeout = \"soon\"", 11, "soon"),
            ("peer-timeout = \"9s\"", "listen = \"nbd://127.0.0.1:1\"", 11, "all groups share"),
            ("peer-timeout = \"9s\"", "discard-local = true", 11, "discard-local"),
            ("vda=/srv/db.raw", "vda=/srv/db.vmdk", 9, "format=raw"),
            ("state-dir = \"/var/lib/db\"", "", 8, "--state-dir"),
            ("[group.db]", "[group.\"d b\"]", 8, "d b"),
            ("[group.db]", "[group.db", 8, "db"),
        ] {
            let error = resolve(&TWO.replace(old, new)).unwrap_err();
            let is_told = error.contains(&format!("g.toml:{line}:"))
                || error.contains(&format!("line {line}"));
            assert!(is_told && error.contains(what), "{new}: {error}");
        }
        assert!(resolve("listen = \"nbd://127.0.0.1:1\"").unwrap_err().contains("[group.NAME]"));
    }
}
