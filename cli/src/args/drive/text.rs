use crate::args::disk::split_fields;
use crate::exit::Failure;

/// The options of one `--drive`: dotted names with their values. Whoever understands an option
/// takes it out; what is left at the end is unknown.
#[derive(Debug)]
pub(super) struct Options {
    /// What errors call the drive.
    pub(super) label: String,
    pairs: Vec<(String, String)>,
}

impl Options {
    /// Splits a text at its commas, two of which are one that belongs to a value. `index` is the
    /// drive's place on the command line, from 0.
    pub(super) fn parse(index: usize, text: &str) -> Result<Self, Failure> {
        let mut this = Options { label: format!("--drive number {}", index + 1), pairs: vec![] };
        for field in split_fields(text) {
            let Some((key, value)) = field.split_once('=') else {
                return Err(this.error(format!(
                    "{field:?} is no option: write NAME=VALUE, with commas in between; a comma in \
                     a value is written twice"
                )));
            };
            if key.split('.').any(str::is_empty) {
                return Err(this.error(format!("{key:?} is no name of an option")));
            }
            if this.has(key) {
                return Err(this.error(format!("option {key} is given twice")));
            }
            this.pairs.push((key.to_owned(), value.to_owned()));
        }
        if let Some(id) = this.get("id") {
            if id.is_empty() {
                return Err(this.error("option id is empty"));
            }
            this.label = format!("--drive {id}");
        }
        Ok(this)
    }

    /// Options that belong to a part of a drive; `label` says which.
    pub(super) fn of_part(label: String, pairs: Vec<(String, String)>) -> Self {
        Options { label, pairs }
    }

    /// A usage error that names the drive.
    pub(super) fn error(&self, why: impl std::fmt::Display) -> Failure {
        Failure::usage(format!("{}: {why}", self.label))
    }

    pub(super) fn pairs(&self) -> &[(String, String)] {
        &self.pairs
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.pairs.iter().map(|(key, _)| key.as_str())
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    pub(super) fn get(&self, key: &str) -> Option<&str> {
        self.pairs.iter().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    pub(super) fn take(&mut self, key: &str) -> Option<String> {
        let position = self.pairs.iter().position(|(k, _)| k == key)?;
        Some(self.pairs.remove(position).1)
    }

    /// Takes a value that must be there.
    pub(super) fn need(&mut self, key: &str) -> Result<String, Failure> {
        match self.take(key) {
            Some(value) if !value.is_empty() => Ok(value),
            Some(_) => Err(self.error(format!("option {key} is empty"))),
            None => Err(self.error(format!("option {key} is missing"))),
        }
    }

    /// Takes a switch that is off unless it is given.
    pub(super) fn take_switch(&mut self, key: &str) -> Result<bool, Failure> {
        match self.take(key).as_deref() {
            None | Some("off" | "no" | "false") => Ok(false),
            Some("on" | "yes" | "true") => Ok(true),
            Some(value) => Err(self.error(format!("option {key}={value}: expects on or off"))),
        }
    }

    /// Takes every option below `prefix.`, without it.
    pub(super) fn take_group(&mut self, prefix: &str) -> Vec<(String, String)> {
        let below = |key: &str| {
            key.strip_prefix(prefix).and_then(|k| k.strip_prefix('.')).map(str::to_owned)
        };
        let mut group = Vec::new();
        self.pairs.retain(|(key, value)| match below(key) {
            Some(rest) => {
                group.push((rest, value.clone()));
                false
            }
            None => true,
        });
        group
    }

    /// Takes everything.
    pub(super) fn take_all(&mut self) -> Vec<(String, String)> {
        std::mem::take(&mut self.pairs)
    }

    /// Refuses what nobody has taken, by its name.
    pub(super) fn finish(&self) -> Result<(), Failure> {
        match self.keys().next() {
            Some(key) => Err(self.error(format!(
                "unknown option {key}: brep has nothing like it here; leave it out"
            ))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(text: &str) -> String {
        Options::parse(1, text).unwrap_err().to_string()
    }

    #[test]
    fn options_are_names_and_values_between_commas() {
        let mut options = Options::parse(0, "if=none,file=a,,b=c.raw,x.y.z=,id=d0").unwrap();
        assert_eq!(options.label, "--drive d0");
        assert_eq!(options.take("file").as_deref(), Some("a,b=c.raw"));
        assert_eq!(options.get("x.y.z"), Some(""));
        assert!(!options.has("x.y"));
        assert_eq!(options.take_group("x"), [("y.z".to_owned(), String::new())]);
        assert_eq!(options.keys().collect::<Vec<_>>(), ["if", "id"]);
        let unknown = options.finish().unwrap_err();
        assert_eq!(unknown.code, crate::exit::USAGE);
        assert!(unknown.to_string().contains("--drive d0: unknown option if"), "{unknown}");
    }

    #[test]
    fn texts_that_are_no_options_are_refused() {
        for text in ["", "file", "a=1,", ",a=1", "a=1,b", ".a=1", "a..b=1", "a.=1", "=1", "a,,=1,b"]
        {
            assert!(said(text).starts_with("--drive number 2: "), "{text}");
        }
        assert!(said("a=1,b=2,a=3").contains("option a is given twice"));
        assert!(said("id=x,id=x").contains("option id is given twice"));
    }

    #[test]
    fn switches_are_on_or_off() {
        for (text, on) in [
            ("on", true),
            ("yes", true),
            ("true", true),
            ("off", false),
            ("no", false),
            ("false", false),
        ] {
            let mut options = Options::parse(0, &format!("a={text}")).unwrap();
            assert_eq!(options.take_switch("a").unwrap(), on, "{text}");
            assert!(!options.take_switch("a").unwrap(), "gone, and off by default");
        }
        for text in ["", "ON", "1", "maybe"] {
            let mut options = Options::parse(0, &format!("a={text}")).unwrap();
            assert!(options.take_switch("a").is_err(), "{text}");
        }
    }
}
