use std::path::Path;
use std::sync::Arc;

use brep_block::{BlockDevice, RawFile, RawFileOptions};
use brep_qcow2::{CreateOptions, Qcow2};

use super::secondary;
use crate::cmd::runtime::current_thread;

const SIZE: u64 = 1 << 20;

fn create(path: &Path, size: u64) -> Arc<dyn BlockDevice> {
    let options =
        RawFileOptions { create: Some(size), growable: true, ..RawFileOptions::default() };
    RawFile::open(path, options).unwrap()
}

fn image(path: &Path) {
    let file = create(path, 0);
    current_thread().unwrap().block_on(Qcow2::create(&file, &CreateOptions::new(SIZE))).unwrap();
}

/// Each line has what is wrong in the lines below it too, as far as both can be.
///
/// Row: §8.14.
#[test]
fn series_s08_of_several_reasons_to_refuse_the_first_is_named() {
    let scratch = tempfile::tempdir().unwrap();
    let path = |name: &str| scratch.path().join(name);
    drop(create(&path("disk"), SIZE));
    image(&path("active"));
    image(&path("hidden"));
    let file = |name: &str| path(name).display().to_string();
    let active = |more: &str| format!("driver=qcow2+colo,file={},{more}", file("active"));
    let disk = |more: &str| format!("driver=raw,file={}{more}", file("disk"));
    let reference = |drive: &str, driver: &str, hidden: &str| {
        let hidden = format!("driver={driver},file.filename={}", file(hidden));
        let hidden = hidden.replace(',', ",backing_reference.hidden-disk.");
        format!("backing_reference.drive_id={drive},backing_reference.hidden-disk.{hidden}")
    };
    let nonsense = "backing_reference.nonsense=1";
    let both = format!("{nonsense},backing.file.filename=x");
    let user = format!("if=none,id=user,backing=y,driver=raw,file={}", file("user"));
    let drives = |list: &[String]| list.to_vec();
    let missing = reference("y", "raw", "missing");
    for (said, drives) in [
        ("\"backing_reference.*\" and \"backing.*\" cannot", drives(&[active(&both)])),
        ("needs option drive_id", drives(&[active(nonsense)])),
        (
            "needs option hidden-disk.*",
            drives(&[active(&format!("backing_reference.drive_id=nobody,{nonsense}"))]),
        ),
        (
            "doesn't support option 'nonsense'",
            drives(&[active(&format!("{},{nonsense}", reference("nobody", "raw", "missing")))]),
        ),
        (
            "DeviceNotFound: Device 'nobody'",
            drives(&[active(&reference("nobody", "raw", "missing"))]),
        ),
        (
            "backing_hd y is used by the other device model",
            drives(&[disk(",id=y"), user.clone(), active(&missing)]),
        ),
        (
            "Backing reference itself: y",
            drives(&[user.clone(), active(&format!("id=y,{missing}"))]),
        ),
        ("Node 'y' is busy", drives(&[disk(",id=y,if=none"), user.clone(), active(&missing)])),
        ("missing", drives(&[disk(",id=y,if=none"), active(&missing)])),
        (
            "doesn't support backing files",
            drives(&[disk(",id=y,if=none"), active(&reference("y", "raw", "hidden"))]),
        ),
        (
            "the backup job cannot start",
            drives(&[disk(",id=y,if=none"), active(&reference("y", "qcow2", "hidden"))]),
        ),
        (
            "Missing the option export",
            drives(&[
                disk(",id=y,if=none"),
                active(&format!(
                    "{},backing_reference.hidden-disk.allow-write-backing-file=on",
                    reference("y", "qcow2", "hidden")
                )),
            ]),
        ),
    ] {
        let failure = secondary(&drives, None).unwrap_err().to_string();
        assert!(failure.contains(said), "{drives:?}: {failure}, and not {said}");
    }
}
