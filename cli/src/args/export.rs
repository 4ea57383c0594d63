use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use brep_block::CacheMode;
use brep_nbd::proto::wire::STRING_LEN_MAX;
use brep_replication::config::DiskFormat;

use super::disk::{parse_cache, parse_format, split_fields};
use crate::units::parse_size;

/// An image, and how it is served.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct ExportArg {
    /// Of the export.
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    pub(crate) format: Option<DiskFormat>,
    pub(crate) cache: CacheMode,
    pub(crate) description: String,
    pub(crate) read_only: bool,
    /// In bytes, as `size`; none: to the end.
    pub(crate) offset: u64,
    pub(crate) size: Option<u64>,
    /// From the top down.
    pub(crate) backing: Vec<PathBuf>,
    pub(crate) resizable: bool,
    pub(crate) allocation_depth: bool,
    pub(crate) bitmaps: Vec<String>,
    pub(crate) all_bitmaps: bool,
    /// Not for those who speak in the clear.
    pub(crate) tls_required: bool,
    /// Whom it is for; none: those whom the command line allows in.
    pub(crate) allowed: Option<Arc<[String]>>,
}

const OPTIONS: &str = "format=, cache=, description=, read-only, offset=, size=, backing=, \
                       resizable, allocation-depth, bitmap=, all-bitmaps, tls-required and allow=";

impl ExportArg {
    /// Whether this is `NAME=FILE`, and not a file alone: one whose name has a `=` is written with
    /// its directory, as `./a=b.raw`.
    pub(crate) fn is_named(text: &str) -> bool {
        text.split_once('=').is_some_and(|(name, _)| !name.contains(['/', ',']))
    }

    /// What `NAME=FILE[,OPTION]...` says, beyond what `defaults` say of all of them.
    pub(crate) fn parse(text: &str, defaults: &ExportArg) -> Result<Self, String> {
        let mut fields = split_fields(text).into_iter();
        let first = fields.next().unwrap_or_default();
        let (name, file) = first.split_once('=').ok_or("an export is NAME=FILE[,OPTION]...")?;
        if file.is_empty() {
            return Err(format!("no file for export {name:?}"));
        }
        let mut export =
            ExportArg { name: name.into(), file: PathBuf::from(file), ..defaults.clone() };
        let mut given = BTreeSet::new();
        let mut allowed = Vec::new();
        for field in fields {
            let (option, value) = match field.split_once('=') {
                Some((option, value)) => (option, Some(value)),
                None => (field.as_str(), None),
            };
            let repeatable = ["backing", "bitmap", "allow"].contains(&option);
            if !given.insert(option.to_owned()) && !repeatable {
                return Err(format!("option {option:?} given twice"));
            }
            match (option, value) {
                ("format", Some(value)) => export.format = Some(parse_format(value)?),
                ("cache", Some(value)) => export.cache = parse_cache(value)?,
                ("description", Some(value)) => export.description = value.to_owned(),
                ("read-only", None) => export.read_only = true,
                ("offset", Some(value)) => export.offset = parse_size(value)?,
                ("size", Some(value)) => export.size = Some(parse_size(value)?),
                ("backing", Some(value)) => export.backing.push(value.into()),
                ("resizable", None) => export.resizable = true,
                ("allocation-depth", None) => export.allocation_depth = true,
                ("bitmap", Some(value)) => export.bitmaps.push(value.to_owned()),
                ("all-bitmaps", None) => export.all_bitmaps = true,
                ("tls-required", None) => export.tls_required = true,
                ("allow", Some(value)) => allowed.push(value.to_owned()),
                _ => {
                    return Err(format!(
                        "unknown option {field:?}: there are {OPTIONS} (a comma in a value is \
                         written twice)"
                    ));
                }
            }
        }
        if !allowed.is_empty() {
            export.allowed = Some(allowed.into());
        }
        Ok(export)
    }

    /// Refuses what makes no sense together.
    pub(crate) fn check(&self) -> Result<(), String> {
        let refuse = |why: &str| Err(format!("{}: {why}", self.file.display()));
        for (what, text) in [("name", &self.name), ("description", &self.description)] {
            if text.len() > STRING_LEN_MAX {
                let len = text.len();
                return refuse(&format!(
                    "a {what} of {len} bytes; at most {STRING_LEN_MAX} can be sent"
                ));
            }
        }
        let has_bitmaps = self.all_bitmaps || !self.bitmaps.is_empty();
        let is_part = self.offset > 0 || self.size.is_some();
        if is_part && (self.resizable || self.allocation_depth || has_bitmaps) {
            return refuse(
                "a part of a disk (offset, size) cannot be resized, and tells neither depths nor \
                 bitmaps",
            );
        }
        if self.resizable && self.read_only {
            return refuse("resizable and read-only");
        }
        if has_bitmaps && !self.read_only {
            return refuse("bitmaps are served with read-only: writes would not be in them");
        }
        if self.all_bitmaps && !self.bitmaps.is_empty() {
            return refuse("either all bitmaps, or those that are named");
        }
        Ok(())
    }

    /// Whether it is kept from some who may connect.
    pub(crate) fn is_for_tls_only(&self) -> bool {
        self.tls_required || self.allowed.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<ExportArg, String> {
        assert!(ExportArg::is_named(text), "{text}");
        let export = ExportArg::parse(text, &ExportArg::default())?;
        export.check().map(|()| export)
    }

    #[test]
    fn an_export_has_a_name_a_file_and_options() {
        let plain = parse("vda=a=b.raw").unwrap();
        let expected =
            ExportArg { name: "vda".into(), file: "a=b.raw".into(), ..ExportArg::default() };
        assert_eq!(plain, expected);
        assert_eq!(parse("=a.raw").unwrap().name, "", "the default export");
        let full = parse(
            "x=a.img,format=qcow2,cache=none,description=one,, two,read-only,backing=b.qcow2,\
             backing=c.raw,allocation-depth,bitmap=n,bitmap=m,tls-required,allow=CN=a,,O=b,allow=CN=c",
        );
        let expected = ExportArg {
            name: "x".into(),
            file: "a.img".into(),
            format: Some(DiskFormat::Qcow2),
            cache: CacheMode::None,
            description: "one, two".into(),
            read_only: true,
            backing: vec!["b.qcow2".into(), "c.raw".into()],
            allocation_depth: true,
            bitmaps: vec!["n".into(), "m".into()],
            tls_required: true,
            allowed: Some(["CN=a,O=b".to_owned(), "CN=c".to_owned()].into()),
            ..ExportArg::default()
        };
        assert_eq!(full.unwrap(), expected);
        let part = parse("p=a.raw,offset=1M,size=64K").unwrap();
        assert_eq!((part.offset, part.size), (1 << 20, Some(64 << 10)));
    }

    #[test]
    fn what_is_said_of_all_exports_holds_unless_one_says_otherwise() {
        let defaults = ExportArg {
            read_only: true,
            cache: CacheMode::None,
            allowed: Some(["CN=all".to_owned()].into()),
            ..ExportArg::default()
        };
        let export = ExportArg::parse("a=a.raw", &defaults).unwrap();
        assert_eq!((export.read_only, export.cache), (true, CacheMode::None));
        assert_eq!(export.allowed, defaults.allowed);
        let export = ExportArg::parse("a=a.raw,cache=writeback,allow=CN=one", &defaults).unwrap();
        assert_eq!(export.cache, CacheMode::Writeback);
        assert_eq!(export.allowed, Some(["CN=one".to_owned()].into()));
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        let long = format!("{}=a.raw", "x".repeat(4097));
        for text in [
            "a=",
            "a=a.raw,",
            "a=a.raw,readonly",
            "a=a.raw,read-only=yes",
            "a=a.raw,format=vmdk",
            "a=a.raw,offset=x",
            "a=a.raw,cache=none,cache=none",
            "a=a.raw,read-only,resizable",
            "a=a.raw,offset=1M,resizable",
            "a=a.qcow2,size=1M,allocation-depth",
            "a=a.qcow2,bitmap=x",
            "a=a.qcow2,all-bitmaps",
            "a=a.qcow2,read-only,all-bitmaps,bitmap=x",
            &long,
        ] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_file_with_its_directory_is_no_name() {
        for text in ["a.raw", "./a=b.raw", "/d=e/a.raw", "d/a=b.raw", "a,b=c.raw"] {
            assert!(!ExportArg::is_named(text), "{text}");
        }
    }
}
