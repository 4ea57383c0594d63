use std::path::PathBuf;

use brep_replication::config::DiskFormat;

use super::image::{ImageNode, take_driver, take_file};
use super::same_file;
use super::text::Options;
use crate::exit::Failure;

const COLO: &str = "qcow2+colo";
const GROUP: &str = "backing_reference";

/// One disk of a secondary: an active disk, over a hidden disk, over the disk that it refers to.
#[derive(Debug)]
pub(super) struct SecondaryDisk {
    /// What errors call the drive of the active disk.
    pub(super) label: String,
    /// Checked late, as the original does.
    pub(super) export: Option<String>,
    pub(super) target: ImageNode,
    pub(super) target_format: DiskFormat,
    pub(super) active: PathBuf,
    pub(super) hidden: Hidden,
}

/// The hidden disk, as `backing_reference.hidden-disk.*` describes it.
#[derive(Debug)]
pub(super) struct Hidden {
    pub(super) driver: String,
    pub(super) file: PathBuf,
    pub(super) writable: bool,
}

/// A drive, before it is known what it belongs to.
#[derive(Debug)]
struct Drive {
    /// For errors: everything else has been taken out of it.
    label: String,
    id: Option<String>,
    /// QEMU gives a drive to a guest device unless `if=none` says that it does not.
    guest_device: bool,
    node: Node,
}

#[derive(Debug)]
enum Node {
    /// What can be referred to.
    Image { image: ImageNode, format: DiskFormat },
    /// What refers to another drive.
    Active { file: PathBuf, export: Option<String>, drive_id: String, hidden: Hidden },
}

impl Drive {
    fn error(&self, why: impl std::fmt::Display) -> Failure {
        Failure::usage(format!("{}: {why}", self.label))
    }

    fn drive_id(&self) -> Option<&str> {
        match &self.node {
            Node::Image { .. } => None,
            Node::Active { drive_id, .. } => Some(drive_id),
        }
    }
}

/// Puts the drives together, after the checks that need no file (spec: series v3, section 8).
pub(super) fn disks(options: Vec<Options>) -> Result<Vec<SecondaryDisk>, Failure> {
    let mut drives = Vec::new();
    for options in &options {
        // Before anything is understood: a group one level down belongs to a node of its own.
        check_groups(options)?;
    }
    let backings = backings(&options);
    for options in options {
        drives.push(drive(options)?);
    }
    check_ids(&drives)?;
    let mut disks = Vec::new();
    for (index, active) in drives.iter().enumerate() {
        let Some(drive_id) = active.drive_id() else { continue };
        let target = check_target(&drives, index, drive_id, &backings)?;
        disks.push((index, target));
    }
    check_unused(&drives, &disks)?;
    check_files(&drives)?;
    if disks.is_empty() {
        return Err(Failure::usage(
            "--drive: no drive has driver=qcow2+colo; a secondary's disk is an active disk with \
             backing_reference.drive_id=… and backing_reference.hidden-disk.…",
        ));
    }
    Ok(join(drives, &disks))
}

/// Makes disks of the drives; every drive belongs to one of them.
fn join(drives: Vec<Drive>, disks: &[(usize, usize)]) -> Vec<SecondaryDisk> {
    let mut drives: Vec<_> = drives.into_iter().map(Some).collect();
    let mut take = |index: usize| drives.get_mut(index).and_then(Option::take);
    disks.iter().filter_map(|(active, target)| disk(take(*active)?, take(*target)?)).collect()
}

fn disk(active: Drive, target: Drive) -> Option<SecondaryDisk> {
    let Node::Active { file, export, hidden, .. } = active.node else { return None };
    let Node::Image { image, format } = target.node else { return None };
    Some(SecondaryDisk {
        label: active.label,
        export,
        target: image,
        target_format: format,
        active: file,
        hidden,
    })
}

/// `backing_reference` and `backing` of one node, at whatever level, exclude each other.
fn check_groups(options: &Options) -> Result<(), Failure> {
    for key in options.keys() {
        let parts: Vec<_> = key.split('.').collect();
        let Some(level) = parts.iter().position(|part| *part == GROUP) else { continue };
        let is_backing = |other: &str| {
            let others: Vec<_> = other.split('.').collect();
            others.len() > level && others[..level] == parts[..level] && others[level] == "backing"
        };
        if options.keys().any(is_backing) {
            return Err(
                options.error("\"backing_reference.*\" and \"backing.*\" cannot be used together")
            );
        }
    }
    Ok(())
}

/// Who has which drive as its backing file.
fn backings(options: &[Options]) -> Vec<(String, String)> {
    let of = |options: &Options| {
        let drive = options.get("backing")?.to_owned();
        Some((options.label.clone(), drive))
    };
    options.iter().filter_map(of).collect()
}

fn drive(mut options: Options) -> Result<Drive, Failure> {
    let id = options.take("id");
    let guest_device = options.take("if").is_none_or(|bus| bus != "none");
    let refers = options.keys().any(|key| key.split('.').next() == Some(GROUP));
    let reference = if refers { Some(reference(&mut options)?) } else { None };
    // Left for the end: who refers to the drive that it names is told first.
    let backing = options.take("backing");
    let node = match (options.get("driver").or(options.get("format")), reference) {
        (Some(COLO), Some((drive_id, hidden))) => {
            take_driver(&mut options)?;
            let file = take_file(&mut options)?;
            Node::Active { file, export: options.take("export"), drive_id, hidden }
        }
        (Some(COLO), None) => {
            return Err(options.error(
                "this feature or command is not currently supported: qcow2+colo without \
                 backing_reference.drive_id and backing_reference.hidden-disk.*",
            ));
        }
        (_, Some(_)) => {
            return Err(options
                .error("backing_reference.* needs driver=qcow2+colo; formats are never guessed"));
        }
        (Some("quorum" | "nbd+colo" | "nbd"), None) => {
            return Err(options.error(
                "a quorum with its NBD client is a primary's drive (brep primary); a secondary \
                 has driver=raw or qcow2, and driver=qcow2+colo",
            ));
        }
        _ => image(&mut options)?,
    };
    options.finish()?;
    let drive = Drive { label: options.label, id, guest_device, node };
    match (backing, &drive.node) {
        (Some(_), Node::Image { .. }) | (None, _) => Ok(drive),
        (Some(_), Node::Active { .. }) => Err(drive.error("unknown option backing")),
    }
}

fn image(options: &mut Options) -> Result<Node, Failure> {
    let image = ImageNode::take(options)?;
    match image.format() {
        Some(format) => Ok(Node::Image { image, format }),
        None => Err(options.error(format!(
            "Unknown driver '{}'; there are raw, qcow2 and qcow2+colo",
            image.driver
        ))),
    }
}

/// Takes the group, and checks it in the original's order.
fn reference(options: &mut Options) -> Result<(String, Hidden), Failure> {
    let pairs = options.take_group(GROUP);
    let mut group = Options::of_part(options.label.clone(), pairs);
    let drive_id = match group.take("drive_id") {
        Some(id) if !id.is_empty() => id,
        _ => return Err(group.error("backing_reference needs option drive_id")),
    };
    let pairs = group.take_group("hidden-disk");
    if pairs.is_empty() {
        return Err(group.error("backing_reference needs option hidden-disk.*"));
    }
    if let Some(name) = group.keys().next() {
        return Err(group.error(format!("backing_reference group doesn't support option '{name}'")));
    }
    let mut hidden = Options::of_part(format!("{}: hidden-disk", options.label), pairs);
    let writable = hidden.take_switch("allow-write-backing-file")?;
    let image = ImageNode::take(&mut hidden)?;
    hidden.finish()?;
    Ok((drive_id, Hidden { driver: image.driver, file: image.file, writable }))
}

fn check_ids(drives: &[Drive]) -> Result<(), Failure> {
    for (index, drive) in drives.iter().enumerate() {
        let same = |other: &Drive| drive.id.is_some() && other.id == drive.id;
        if drives[..index].iter().any(same) {
            return Err(drive.error("the id is the name of two drives"));
        }
    }
    Ok(())
}

fn position(drives: &[Drive], id: &str) -> Option<usize> {
    drives.iter().position(|drive| drive.id.as_deref() == Some(id))
}

/// Whether the references lead from one drive to another. They may go round in a circle beside it.
fn reaches(drives: &[Drive], from: usize, to: usize) -> bool {
    let mut at = Some(from);
    for _ in drives {
        match at {
            Some(index) if index == to => return true,
            Some(index) => at = drives[index].drive_id().and_then(|id| position(drives, id)),
            None => return false,
        }
    }
    false
}

/// The drive that an active disk refers to, and whether it may.
fn check_target(
    drives: &[Drive],
    active: usize,
    drive_id: &str,
    backings: &[(String, String)],
) -> Result<usize, Failure> {
    let from = &drives[active];
    let Some(target) = position(drives, drive_id) else {
        return Err(from.error(format!(
            "DeviceNotFound: Device '{drive_id}' not found; another --drive has id={drive_id}"
        )));
    };
    let node = &drives[target];
    if node.guest_device && matches!(node.node, Node::Image { .. }) {
        let why = if target < active {
            format!("backing_hd {drive_id} is used by the other device model")
        } else {
            format!("{drive_id} is a backing reference's target and cannot go to a guest device")
        };
        return Err(from.error(format!("{why}; give it if=none")));
    }
    if reaches(drives, target, active) {
        return Err(from.error(format!("Backing reference itself: {drive_id}")));
    }
    let blocked = |by: &str, what: &str| {
        Err(from.error(format!("Node '{drive_id}' is busy: it is used as the {what} of {by}")))
    };
    if let Some((by, _)) = backings.iter().find(|(_, backing)| backing == drive_id) {
        return blocked(by, "backing file");
    }
    if let Some(other) = drives[..active].iter().find(|d| d.drive_id() == Some(drive_id)) {
        return blocked(&other.label, "backing reference");
    }
    if let Node::Active { .. } = node.node {
        return Err(from.error(format!(
            "{drive_id} is an active disk itself; the disk that receives the primary's writes has \
             driver=raw or driver=qcow2"
        )));
    }
    Ok(target)
}

fn check_unused(drives: &[Drive], disks: &[(usize, usize)]) -> Result<(), Failure> {
    for (index, drive) in drives.iter().enumerate() {
        let used = disks.iter().any(|(active, target)| [*active, *target].contains(&index));
        if !used {
            return Err(drive.error(
                "nothing refers to this drive; a secondary serves only what replication needs \
                 (backing_reference.drive_id of a qcow2+colo drive)",
            ));
        }
    }
    Ok(())
}

/// No file may be two nodes: each has its writer.
fn check_files(drives: &[Drive]) -> Result<(), Failure> {
    let mut files: Vec<(&PathBuf, &Drive)> = Vec::new();
    for drive in drives {
        match &drive.node {
            Node::Image { image, .. } => files.push((&image.file, drive)),
            Node::Active { file, hidden, .. } => {
                files.extend([(file, drive), (&hidden.file, drive)]);
            }
        }
    }
    for (index, (file, drive)) in files.iter().enumerate() {
        if files[..index].iter().any(|(other, _)| same_file(other, file)) {
            return Err(drive.error(format!(
                "{} is given twice; active disk, hidden disk and the disk below them are \
                 different files",
                file.display()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn active(file: &str, target: &str) -> String {
        format!(
            "driver=qcow2+colo,file={file},export=e,backing_reference.drive_id={target},\
             backing_reference.hidden-disk.driver=qcow2,\
             backing_reference.hidden-disk.file.filename=h{file}"
        )
    }

    fn parse(texts: &[&str]) -> Result<Vec<SecondaryDisk>, Failure> {
        let options = texts.iter().enumerate().map(|(index, text)| Options::parse(index, text));
        disks(options.collect::<Result<_, _>>()?)
    }

    #[test]
    fn every_active_disk_finds_its_target_whatever_the_order() {
        let (a, b) = (active("a,,a", "ta"), active("b", "tb"));
        let (ta, tb) = ("if=none,id=ta,driver=raw,file=1", "id=tb,if=none,driver=qcow2,file=2");
        for order in [[ta, tb, &a, &b], [&a, tb, &b, ta], [&b, &a, ta, tb]] {
            let disks = parse(&order).unwrap();
            let mut found: Vec<_> = disks
                .iter()
                .map(|d| {
                    [&d.active, &d.hidden.file, &d.target.file].map(|p| p.display().to_string())
                })
                .collect();
            found.sort();
            assert_eq!(found, [["a,a", "ha,a", "1"], ["b", "hb", "2"]], "{order:?}");
        }
    }

    #[test]
    fn groups_exclude_each_other_only_on_their_own_level() {
        let below = active("a", "t") + ",backing_reference.hidden-disk.backing.driver=raw";
        let failure = parse(&["if=none,id=t,driver=raw,file=1", &below]).unwrap_err();
        assert!(failure.to_string().contains("unknown option backing.driver"), "{failure}");
    }

    /// Whatever is typed is understood or refused.
    #[test]
    fn no_text_makes_the_parser_panic() {
        let words = [
            "if=none",
            "id=t",
            "id=",
            "driver=raw",
            "driver=qcow2+colo",
            "driver=quorum",
            "file=1",
            "file.filename=2",
            "export=e",
            "backing_reference.drive_id=t",
            "backing_reference=t",
            "backing_reference.hidden-disk.driver=qcow2",
            "backing_reference.hidden-disk.file=h",
            "backing=t",
            "backing.file=x",
            "file.backing_reference.drive_id=t",
            "file.backing=x",
            "children.0.driver=raw",
            "children.0=a",
            "children.1.file.driver=nbd+colo",
            "children.1.file.host=h",
            "children.99999999999999999999.x=1",
            "children..x=1",
            "read-pattern=fifo",
            "vote-threshold=-1",
            "cache=none",
            "",
            ",",
            "=",
            "x",
            "ü=ü,,",
        ];
        let mut seed = 7u64;
        let mut random = move |below: usize| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (seed >> 33) as usize % below
        };
        for _ in 0..5000 {
            let mut line = || {
                let count = 1 + random(9);
                (0..count).map(|_| words[random(words.len())]).collect::<Vec<_>>().join(",")
            };
            let lines = [line(), line(), line()];
            let _ = parse(&lines.each_ref().map(String::as_str));
            if let Ok(options) = Options::parse(0, &lines[0]) {
                let _ = super::super::primary::disk(options);
            }
        }
    }
}
