//! `brep image`, with qemu-img as the judge.
mod common;

use common::{Dir, qemu_img};

#[test]
fn an_image_is_created_once_and_described() {
    let dir = Dir::new();
    let run = dir.brep(&["image", "create", "a.qcow2", "64M", "--extended-l2"]);
    assert_eq!((run.code, run.stdout.as_str()), (0, "a.qcow2: qcow2, 64 MiB\n"), "{}", run.stderr);
    let again = dir.brep(&["image", "create", "a.qcow2", "1M"]);
    assert_eq!(again.code, 1, "{}", again.stderr);
    assert!(again.stderr.contains("a.qcow2"), "{}", again.stderr);

    let info = dir.brep(&["image", "info", "a.qcow2", "--json"]);
    let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    assert_eq!(info["virtual-size"], 64 << 20);
    assert_eq!(info["qcow2"]["extended-l2"], true);
    let path = dir.file("a.qcow2");
    let Some(check) = qemu_img("an_image_is_created", &["check", path.to_str().unwrap()]) else {
        return;
    };
    assert!(check.status.success(), "{check:?}");
}

#[test]
fn compare_tells_equal_different_and_unreadable_apart() {
    let dir = Dir::new();
    let mut contents = vec![5; 100_000];
    std::fs::write(dir.file("a.raw"), &contents).unwrap();
    std::fs::write(dir.file("b.img"), &contents).unwrap();
    let equal = dir.brep(&["image", "compare", "a.raw", "b.img"]);
    assert_eq!((equal.code, equal.stdout.as_str()), (0, "The images are equal.\n"));

    contents[70_000] = 6;
    contents[70_002] = 6;
    std::fs::write(dir.file("b.img"), &contents).unwrap();
    let different = dir.brep(&["image", "compare", "a.raw", "b.img"]);
    assert_eq!(different.code, 1);
    assert!(different.stdout.contains("offset 70000, 2 bytes"), "{}", different.stdout);

    let missing = dir.brep(&["image", "compare", "a.raw", "missing.raw"]);
    assert_eq!(missing.code, 2);
    assert!(missing.stderr.contains("missing.raw"), "{}", missing.stderr);
}

#[test]
fn check_ends_with_the_codes_of_qemu_img() {
    let dir = Dir::new();
    std::fs::write(dir.file("a.raw"), [0; 512]).unwrap();
    std::fs::write(dir.file("noise.qcow2"), [7; 4096]).unwrap();
    for (file, code) in [("a.raw", 63), ("missing.qcow2", 1), ("noise.qcow2", 1)] {
        let run = dir.brep(&["image", "check", file]);
        assert_eq!(run.code, code, "{file}: {}", run.stderr);
        assert!(run.stderr.contains(file), "{}", run.stderr);
        let path = dir.file(file);
        let format = if file.ends_with("raw") { "raw" } else { "qcow2" };
        let args = ["check", "-f", format, path.to_str().unwrap()];
        let Some(theirs) = qemu_img("check_ends", &args) else { return };
        assert_eq!(theirs.status.code(), Some(code), "{file}");
    }
}

#[test]
fn a_name_inside_an_image_is_shown_and_never_followed() {
    let dir = Dir::new();
    std::fs::write(dir.file("secret.raw"), vec![9; 1 << 20]).unwrap();
    let (overlay, secret) = (dir.file("overlay.qcow2"), dir.file("secret.raw"));
    let (overlay, secret) = (overlay.to_str().unwrap(), secret.to_str().unwrap());
    let args = ["create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, overlay];
    let Some(created) = qemu_img("a_name_inside_an_image", &args) else { return };
    assert!(created.status.success(), "{created:?}");

    let info = dir.brep(&["image", "info", "overlay.qcow2"]);
    assert_eq!(info.code, 0, "{}", info.stderr);
    assert!(info.stdout.contains("secret.raw"), "{}", info.stdout);
    let compared = dir.brep(&["image", "compare", "overlay.qcow2", "secret.raw"]);
    assert_eq!(compared.code, 2, "{}", compared.stdout);
    assert!(compared.stderr.contains("secret.raw"), "{}", compared.stderr);
}
