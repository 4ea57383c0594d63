use brep_nbd::Endpoint;
use brep_quorum::ReadPattern;
use brep_quorum::option_text::{ChildSource, ChildText, QuorumText};
use brep_replication::config::DiskConfig;

use super::image::ImageNode;
use super::same_file;
use super::text::Options;
use crate::args::disk::check_name;
use crate::exit::Failure;

/// The port of NBD.
const PORT: u16 = 10809;

/// One disk of a primary, and where its secondary listens.
pub(super) type PrimaryDisk = (DiskConfig, Endpoint);

/// A child of a quorum.
enum ChildNode {
    Local(ImageNode),
    Nbd { endpoint: Endpoint, export: String },
}

/// A quorum with one local image and one `nbd+colo` child. Its options are validated, and nothing
/// is opened or connected (spec: series v3, sections 2 to 4, 6).
pub(super) fn disk(mut options: Options) -> Result<PrimaryDisk, Failure> {
    let driver = super::image::take_driver(&mut options)?;
    if driver != "quorum" {
        return Err(options.error(format!(
            "driver={driver}: a primary's drive is driver=quorum, with its disk as children.0 and \
             the secondary as children.1 (file.driver=nbd+colo)"
        )));
    }
    options.take("id");
    options.take("if");
    let quorum = QuorumText::parse(options.pairs()).map_err(|error| options.error(error))?;
    let rest = Options::of_part(options.label.clone(), quorum.rest.clone());
    rest.finish()?;
    let children: Vec<_> = quorum
        .children
        .iter()
        .enumerate()
        .map(|(index, text)| child(&options.label, index, text))
        .collect::<Result<_, _>>()?;
    check_settings(&options, &quorum)?;
    let (image, endpoint, export) = pick(&options, children)?;
    check_ignored(&options, &quorum)?;
    check_name(&export).map_err(|why| options.error(format!("children.1.file.export: {why}")))?;
    let Some(format) = image.format() else {
        return Err(options.error(format!(
            "children.0.driver={}: Unknown driver; there are raw and qcow2",
            image.driver
        )));
    };
    let (path, cache) = (image.file, image.cache);
    Ok((DiskConfig { name: export, path, format, cache, buffers: None }, endpoint))
}

/// What replication demands of the quorum itself.
fn check_settings(options: &Options, quorum: &QuorumText) -> Result<(), Failure> {
    if quorum.settings.read_pattern != ReadPattern::Fifo {
        return Err(options.error(
            "invalid parameter 'read pattern': block replication needs read-pattern=fifo, so that \
             the guest reads its own disk",
        ));
    }
    if quorum.settings.vote_threshold != 1 {
        return Err(options.error(
            "vote-threshold: block replication needs 1; a guest's write fails if its own disk \
             fails, and never because of the secondary",
        ));
    }
    Ok(())
}

/// The guest's disk, and the one child that replicates behind it.
fn pick(
    options: &Options,
    children: Vec<ChildNode>,
) -> Result<(ImageNode, Endpoint, String), Failure> {
    let is_nbd = |child: &ChildNode| matches!(child, ChildNode::Nbd { .. });
    match children.iter().filter(|child| is_nbd(child)).count() {
        0 => {
            return Err(options.error(
                "no child supports block replication: one has file.driver=nbd+colo (without a \
                 secondary, use --disk)",
            ));
        }
        1 => {}
        _ => return Err(options.error("too many children support block replication")),
    }
    match <[ChildNode; 2]>::try_from(children) {
        Ok([ChildNode::Local(image), ChildNode::Nbd { endpoint, export }]) => {
            Ok((image, endpoint, export))
        }
        Ok(_) => Err(options.error(
            "children.0 is the NBD client: it must not be the first child, because reads go to \
             that one",
        )),
        Err(_) => Err(options.error("a primary has one local disk: children.0")),
    }
}

fn check_ignored(options: &Options, quorum: &QuorumText) -> Result<(), Failure> {
    let ignored: Vec<_> = quorum.children.iter().map(|child| child.ignore_errors).collect();
    match ignored[..] {
        [false, true] => Ok(()),
        [true, _] => Err(options
            .error("children.0.ignore-errors: errors of the guest's own disk are never ignored")),
        _ => Err(options.error(
            "children.1.ignore-errors=on is missing: a secondary that fails must not fail the \
             guest",
        )),
    }
}

fn child(label: &str, index: usize, text: &ChildText) -> Result<ChildNode, Failure> {
    let label = format!("{label}: children.{index}");
    let mut options = match &text.source {
        ChildSource::Reference(name) => {
            return Err(Failure::usage(format!(
                "{label}={name}: nodes that are named elsewhere are not supported; describe the \
                 child (children.{index}.driver=…, children.{index}.file.…)"
            )));
        }
        ChildSource::Inline(pairs) => Options::of_part(label, pairs.clone()),
    };
    let node = if options.get("file.driver") == Some("nbd+colo") {
        let driver = options.need("driver")?;
        if driver != "raw" {
            return Err(options.error(format!("driver={driver}: over NBD the format is raw")));
        }
        let pairs = options.take_group("file");
        let mut client = Options::of_part(format!("{}.file", options.label), pairs);
        client.take("driver");
        nbd(client)?
    } else if options.get("driver") == Some("nbd+colo") {
        let mut client = Options::of_part(options.label.clone(), options.take_all());
        client.take("driver");
        nbd(client)?
    } else {
        ChildNode::Local(ImageNode::take(&mut options)?)
    };
    options.finish()?;
    Ok(node)
}

/// The options of `nbd+colo`: where the secondary listens, and the name of the disk there.
fn nbd(mut options: Options) -> Result<ChildNode, Failure> {
    let (host, port) = (options.take("host"), options.take("port"));
    let endpoint = match (host, options.take("path")) {
        (Some(_), Some(_)) => {
            return Err(options.error("path and host may not be used at the same time"));
        }
        (None, None) => return Err(options.error("one of path and host must be specified")),
        (None, Some(_)) if port.is_some() => {
            return Err(options.error("port belongs to host, and not to path"));
        }
        (None, Some(path)) if path.is_empty() => return Err(options.error("path is empty")),
        (None, Some(path)) => Endpoint::Unix { path: path.into() },
        (Some(host), None) if host.is_empty() => return Err(options.error("host is empty")),
        (Some(host), None) => {
            let port = match port.as_deref().map(str::parse::<u16>) {
                None => PORT,
                Some(Ok(port)) if port > 0 => port,
                Some(_) => return Err(options.error("port is a number from 1 to 65535")),
            };
            let host = host.trim_start_matches('[').trim_end_matches(']').to_owned();
            Endpoint::Tcp { host, port }
        }
    };
    let export = match options.take("export") {
        Some(export) => export,
        None => {
            return Err(options
                .error("Missing the option export: the name of the disk, equal on both sides"));
        }
    };
    options.finish()?;
    Ok(ChildNode::Nbd { endpoint, export })
}

/// The one address of the secondary; the disks' files are distinct too.
pub(super) fn common_peer(disks: &[PrimaryDisk]) -> Result<Endpoint, Failure> {
    for (index, (disk, _)) in disks.iter().enumerate() {
        if disks[..index].iter().any(|(other, _)| same_file(&other.path, &disk.path)) {
            let file = disk.path.display();
            return Err(Failure::usage(format!("--drive: {file} is given twice")));
        }
    }
    let mut endpoints = disks.iter().map(|(_, endpoint)| endpoint);
    let first = endpoints.next().ok_or_else(|| Failure::usage("no --drive given"))?;
    match endpoints.find(|endpoint| *endpoint != first) {
        Some(other) => Err(Failure::usage(format!(
            "--drive: the disks of a group go to one secondary, but {first} and {other} are given"
        ))),
        None => Ok(first.clone()),
    }
}

#[cfg(test)]
mod tests {
    use brep_block::CacheMode;
    use brep_replication::config::DiskFormat;

    use super::*;

    const LOCAL: &str = "driver=quorum,read-pattern=fifo,children.0.driver=raw,\
                         children.0.file.filename=1.raw";

    fn parse(child: &str) -> Result<PrimaryDisk, Failure> {
        let text = format!("{LOCAL},children.1.ignore-errors=on,{child}");
        disk(Options::parse(0, &text).unwrap())
    }

    /// Row: series v3, section 4: a name that cannot be resolved and a socket that does not exist
    /// are no error here, because nothing is connected.
    #[test]
    fn series_s04_options_are_validated_and_nothing_is_connected() {
        let tcp = |host: &str, port| Endpoint::Tcp { host: host.into(), port };
        let over = "children.1.driver=raw,children.1.file.driver=nbd+colo,children.1.file.export=a";
        for (address, expected) in [
            ("host=no.such.host.invalid,port=1", tcp("no.such.host.invalid", 1)),
            ("host=h", tcp("h", 10809)),
            ("host=[::1],port=65535", tcp("::1", 65535)),
            ("path=/no/such/socket", Endpoint::Unix { path: "/no/such/socket".into() }),
        ] {
            let fields = address.split(',').map(|field| format!("children.1.file.{field}"));
            let text = format!("{over},{}", fields.collect::<Vec<_>>().join(","));
            let (disk, endpoint) = parse(&text).unwrap();
            assert_eq!((disk.name.as_str(), endpoint), ("a", expected), "{text}");
            assert_eq!((disk.path, disk.format), ("1.raw".into(), DiskFormat::Raw));
            assert_eq!(disk.cache, CacheMode::Writeback);
        }
    }

    #[test]
    fn the_client_may_be_the_child_itself() {
        let (disk, endpoint) =
            parse("children.1.driver=nbd+colo,children.1.host=h,children.1.export=vda").unwrap();
        assert_eq!(disk.name, "vda");
        assert_eq!(endpoint, Endpoint::Tcp { host: "h".into(), port: 10809 });
    }

    #[test]
    fn a_format_over_nbd_is_raw_and_a_name_is_an_export() {
        for (child, said) in [
            (
                "children.1.driver=qcow2,children.1.file.driver=nbd+colo",
                "over NBD the format is raw",
            ),
            ("children.1.file.driver=nbd+colo,children.1.file.host=h", "driver is missing"),
            ("children.1.driver=nbd+colo,children.1.host=h,children.1.export=a/b", "no disk name"),
            (
                "children.1.driver=nbd+colo,children.1.path=s,children.1.port=1",
                "port belongs to host",
            ),
        ] {
            let failure = parse(child).unwrap_err();
            assert!(failure.to_string().contains(said), "{child}: {failure}");
        }
    }
}
