use std::path::PathBuf;

use brep_block::CacheMode;
use brep_replication::config::DiskFormat;

use super::text::Options;
use crate::exit::Failure;

/// A local image: its driver, its file, and how that is read and written.
#[derive(Debug, Clone)]
pub(super) struct ImageNode {
    pub(super) driver: String,
    pub(super) file: PathBuf,
    pub(super) cache: CacheMode,
}

impl ImageNode {
    /// Takes the options of an image. The driver, alias format, is never guessed.
    pub(super) fn take(options: &mut Options) -> Result<Self, Failure> {
        let driver = take_driver(options)?;
        let file = take_file(options)?;
        let cache = take_cache(options)?;
        Ok(ImageNode { driver, file, cache })
    }

    /// The image's format, if its driver is one.
    pub(super) fn format(&self) -> Option<DiskFormat> {
        match self.driver.as_str() {
            "raw" => Some(DiskFormat::Raw),
            "qcow2" => Some(DiskFormat::Qcow2),
            _ => None,
        }
    }
}

/// Takes `driver`, or `format`, which says the same.
pub(super) fn take_driver(options: &mut Options) -> Result<String, Failure> {
    match (options.take("driver"), options.take("format")) {
        (Some(_), Some(_)) => Err(options.error("Cannot specify both 'driver' and 'format'")),
        (Some(driver), None) | (None, Some(driver)) => Ok(driver),
        (None, None) => Err(options.error(
            "option driver is missing: formats are never guessed (driver=raw, driver=qcow2)",
        )),
    }
}

/// Takes `file`, or `file.filename`, which says the same.
pub(super) fn take_file(options: &mut Options) -> Result<PathBuf, Failure> {
    let file = match (options.has("file"), options.has("file.filename")) {
        (true, true) => {
            return Err(options.error("file and file.filename say the same; give one of them"));
        }
        (true, false) => options.need("file")?,
        _ => options.need("file.filename")?,
    };
    match options.take("file.driver").as_deref() {
        None | Some("file" | "host_device") => Ok(file.into()),
        Some(driver) => Err(options.error(format!(
            "file.driver={driver}: a disk of brep's is a file or a block special file \
             (file.driver=file)"
        ))),
    }
}

fn take_cache(options: &mut Options) -> Result<CacheMode, Failure> {
    let named = match options.take("cache").as_deref() {
        None => None,
        Some("writeback") => Some(CacheMode::Writeback),
        Some("none") => Some(CacheMode::None),
        Some(cache) => {
            return Err(options.error(format!(
                "cache={cache}: there are writeback and none; what a guest flushes is on stable \
                 storage with both"
            )));
        }
    };
    if options.has("cache.direct") {
        if named.is_some() {
            return Err(options.error("cache and cache.direct say the same; give one of them"));
        }
        let direct = options.take_switch("cache.direct")?;
        return Ok(if direct { CacheMode::None } else { CacheMode::Writeback });
    }
    Ok(named.unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(text: &str) -> Result<ImageNode, Failure> {
        let mut options = Options::parse(0, text)?;
        let image = ImageNode::take(&mut options)?;
        options.finish().map(|()| image)
    }

    #[test]
    fn one_file_has_several_spellings() {
        for text in [
            "driver=raw,file=1.raw",
            "file.filename=1.raw,driver=raw",
            "format=raw,file.driver=file,file.filename=1.raw",
        ] {
            let image = image(text).unwrap();
            assert_eq!((image.file, image.driver.as_str()), ("1.raw".into(), "raw"), "{text}");
        }
        for (text, cache) in [
            ("cache=none", CacheMode::None),
            ("cache.direct=on", CacheMode::None),
            ("cache.direct=off", CacheMode::Writeback),
            ("cache=writeback", CacheMode::Writeback),
        ] {
            let image = image(&format!("driver=qcow2,file=a,{text}")).unwrap();
            assert_eq!((image.cache, image.format()), (cache, Some(DiskFormat::Qcow2)), "{text}");
        }
    }

    #[test]
    fn what_contradicts_itself_or_is_missing_is_refused() {
        for (text, said) in [
            ("file=1.raw", "driver is missing"),
            ("driver=raw", "file.filename is missing"),
            ("driver=raw,file=", "file is empty"),
            ("driver=raw,format=raw,file=a", "'driver' and 'format'"),
            ("driver=raw,file=a,file.filename=a", "say the same"),
            ("driver=raw,file=a,file.driver=nbd", "file.driver=nbd"),
            ("driver=raw,file=a,cache=unsafe", "cache=unsafe"),
            ("driver=raw,file=a,cache=none,cache.direct=on", "say the same"),
            ("driver=raw,file=a,aio=native", "unknown option aio"),
        ] {
            let failure = image(text).unwrap_err();
            assert!(failure.to_string().contains(said), "{text}: {failure}");
        }
    }
}
