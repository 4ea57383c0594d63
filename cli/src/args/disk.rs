use std::path::{Path, PathBuf};
use std::str::FromStr;

use brep_block::CacheMode;
use brep_replication::config::{DiskConfig, DiskFormat};

/// What `--disk NAME=FILE[,format=...][,cache=...]` says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct DiskArg {
    pub(crate) name: String,
    pub(crate) file: PathBuf,
    pub(crate) format: DiskFormat,
    pub(crate) cache: CacheMode,
}

impl DiskArg {
    pub(crate) fn into_config(self) -> DiskConfig {
        DiskConfig {
            name: self.name,
            path: self.file,
            format: self.format,
            cache: self.cache,
            buffers: None,
        }
    }
}

impl FromStr for DiskArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut fields = split_fields(text).into_iter();
        let first = fields.next().unwrap_or_default();
        let (name, file) = first
            .split_once('=')
            .ok_or("a disk is NAME=FILE[,format=raw|qcow2][,cache=writeback|none]")?;
        check_name(name)?;
        if file.is_empty() {
            return Err(format!("no file for disk {name}"));
        }
        let file = PathBuf::from(file);
        let (mut format, mut cache) = (None, None);
        for field in fields {
            let repeated = match field.split_once('=') {
                Some(("format", value)) => format.replace(parse_format(value)?).is_some(),
                Some(("cache", value)) => cache.replace(parse_cache(value)?).is_some(),
                _ => {
                    return Err(format!(
                        "unknown disk option {field:?}: there are format=raw|qcow2 and \
                         cache=writeback|none (a comma in a file name is written twice)"
                    ));
                }
            };
            if repeated {
                return Err(format!("disk option {field:?} given twice"));
            }
        }
        let format = match format {
            Some(format) => format,
            None => format_by_name(&file).ok_or_else(|| unknown_format(&file, "format="))?,
        };
        Ok(DiskArg {
            name: name.into(),
            file,
            format,
            cache: cache.unwrap_or(CacheMode::Writeback),
        })
    }
}

/// Parses the name of a format.
pub(crate) fn parse_format(text: &str) -> Result<DiskFormat, String> {
    match text {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        _ => Err(format!("unknown format {text:?}: there are raw and qcow2")),
    }
}

/// The format that a file's name states. Contents are never looked at: a guest could write
/// itself a header.
pub(crate) fn format_by_name(file: &Path) -> Option<DiskFormat> {
    match file.extension()?.to_str()? {
        "raw" | "img" => Some(DiskFormat::Raw),
        "qcow2" => Some(DiskFormat::Qcow2),
        _ => None,
    }
}

/// What to say when a file's name states no format; `option` is what states it instead.
pub(crate) fn unknown_format(file: &Path, option: &str) -> String {
    format!(
        "the name of {} does not say its format (.raw, .img and .qcow2 do), and formats are never \
         guessed: add {option}raw or {option}qcow2",
        file.display()
    )
}

pub(super) fn parse_cache(text: &str) -> Result<CacheMode, String> {
    match text {
        "writeback" => Ok(CacheMode::Writeback),
        "none" => Ok(CacheMode::None),
        _ => Err(format!("unknown cache mode {text:?}: there are writeback and none")),
    }
}

pub(super) fn check_name(name: &str) -> Result<(), String> {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
    if (1..=64).contains(&name.len()) && name.bytes().all(plain) {
        return Ok(());
    }
    Err(format!("{name:?} is no disk name: 1 to 64 letters, digits, dashes, underscores and dots"))
}

/// Splits at commas; two commas stand for one that belongs to the text.
pub(super) fn split_fields(text: &str) -> Vec<String> {
    let mut fields = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            fields.push(String::new());
        } else if let Some(field) = fields.last_mut() {
            field.push(character);
        }
    }
    fields
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(text: &str) -> DiskArg {
        text.parse().unwrap_or_else(|error| panic!("{text}: {error}"))
    }

    #[test]
    fn the_name_of_a_file_states_its_format() {
        assert_eq!(disk("vda=/d/a.raw").format, DiskFormat::Raw);
        assert_eq!(disk("vda=a.img").format, DiskFormat::Raw);
        assert_eq!(disk("vda=a.qcow2").format, DiskFormat::Qcow2);
        assert_eq!(disk("vda=a.qcow2,format=raw").format, DiskFormat::Raw);
        assert_eq!(disk("vda=/dev/sdb,format=raw").file, Path::new("/dev/sdb"));
    }

    #[test]
    fn a_format_is_never_guessed() {
        for text in ["vda=a", "vda=a.vmdk", "vda=a.RAW", "vda=raw", "vda=/dev/sdb", "vda=.qcow2"] {
            let error = text.parse::<DiskArg>().unwrap_err();
            assert!(error.contains("format=raw"), "{text}: {error}");
        }
    }

    #[test]
    fn options_come_in_any_order_and_once() {
        let given = disk("vda=x,cache=none,format=qcow2");
        assert_eq!((given.format, given.cache), (DiskFormat::Qcow2, CacheMode::None));
        assert_eq!(disk("vda=a.raw").cache, CacheMode::Writeback);
        for text in [
            "vda=a.raw,format=vmdk",
            "vda=a.raw,cache=unsafe",
            "vda=a.raw,format=raw,format=raw",
            "vda=a.raw,foo=1",
            "vda=a.raw,",
            "vda=a.raw,readonly",
        ] {
            assert!(text.parse::<DiskArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn two_commas_are_one_comma_of_the_file_name() {
        assert_eq!(disk("vda=a,,b.raw").file, Path::new("a,b.raw"));
        let given = disk("vda=a,,,format=raw");
        assert_eq!((given.file.as_path(), given.format), (Path::new("a,"), DiskFormat::Raw));
        assert_eq!(disk("vda=a=b.raw").file, Path::new("a=b.raw"));
    }

    #[test]
    fn names_that_could_not_be_exports_are_refused() {
        let long = format!("{}=a.raw", "x".repeat(65));
        for text in ["a.raw", "=a.raw", "vda=", "v/da=a.raw", "v da=a.raw", "ü=a.raw", &long] {
            assert!(text.parse::<DiskArg>().is_err(), "{text}");
        }
        assert_eq!(disk("disk-0_a.b=a.raw").name, "disk-0_a.b");
    }
}
