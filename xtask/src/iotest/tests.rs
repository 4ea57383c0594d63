//! The runner's own promise: what must fail fails.

use std::fs;

use tempfile::TempDir;

use super::*;

/// A folder with one test; the runner's library is not needed to misbehave.
fn folder(name: &str, body: &str, expected: Option<&str>) -> TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let script = format!("\"\"\"A test of the runner.\"\"\"\n{body}\n");
    fs::write(folder.path().join(format!("{name}.py")), script).expect("a script");
    if let Some(expected) = expected {
        fs::write(folder.path().join(format!("{name}.out")), expected).expect("its output");
    }
    folder
}

fn run_all(folder: &TempDir, options: &Options) -> Summary {
    run_folder(folder.path(), Path::new("/bin/true"), Path::new(""), options)
        .expect("the runner runs")
}

fn run_one(body: &str, expected: Option<&str>) -> Summary {
    run_all(&folder("001-one", body, expected), &Options::default())
}

#[test]
fn a_test_that_prints_what_it_should_passes() {
    assert_eq!(
        run_one("print('hello')", Some("hello\n")).to_string(),
        "1 passed, 0 failed, 0 skipped"
    );
}

#[test]
fn other_output_fails() {
    assert_eq!(run_one("print('hello')", Some("goodbye\n")).failed, 1);
}

#[test]
fn missing_expectations_fail() {
    assert_eq!(run_one("print('hello')", None).failed, 1);
}

#[test]
fn the_right_output_with_a_wrong_exit_code_fails() {
    assert_eq!(run_one("print('hello'); exit(1)", Some("hello\n")).failed, 1);
}

#[test]
fn a_test_that_hangs_is_killed_and_fails() {
    let started = std::time::Instant::now();
    let body = "# deadline_s: 1\nimport time\ntime.sleep(300)";
    assert_eq!(run_one(body, Some("")).failed, 1);
    assert!(started.elapsed().as_secs() < 60);
}

#[test]
fn a_process_left_behind_fails_even_out_of_its_group_and_is_ended() {
    let pid = tempfile::NamedTempFile::new().expect("a file");
    let body = format!(
        "import subprocess\np = subprocess.Popen(['sleep', '300'], start_new_session=True)\n\
         open({:?}, 'w').write(str(p.pid))",
        pid.path()
    );
    assert_eq!(run_one(&body, Some("")).failed, 1);
    let pid = fs::read_to_string(pid.path()).expect("a process id");
    let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    assert!(!command.starts_with(b"sleep"), "process {pid} still runs");
}

#[test]
fn a_socket_left_behind_fails() {
    let body = "import socket\ns = socket.socket(socket.AF_UNIX)\ns.bind('left.sock')";
    assert_eq!(run_one(body, Some("")).failed, 1);
}

#[test]
fn a_skip_tells_its_reason_and_is_not_a_pass() {
    let summary = run_one("print('SKIP: fio not found'); exit(77)", Some(""));
    assert_eq!(summary.to_string(), "0 passed, 0 failed, 1 skipped");
    assert_eq!(summary.skips[0].to_string(), "iotest 001-one: fio not found");
}

#[test]
fn a_skip_without_a_reason_fails() {
    assert_eq!(run_one("exit(77)", Some("")).failed, 1);
}

#[test]
fn paths_of_the_scratch_folder_are_the_same_in_every_run() {
    let body = "import os\nprint(os.getcwd() + '/a', os.environ['BREP'])";
    assert_eq!(run_one(body, Some("TEST_DIR/a brep\n")).passed, 1);
}

#[test]
fn bless_writes_what_a_passing_test_prints_and_nothing_of_a_failing_one() {
    let bless = Options { bless: true, ..Options::default() };
    let good = folder("001-one", "print('hello')", None);
    assert_eq!(run_all(&good, &bless).passed, 1);
    assert_eq!(run_all(&good, &Options::default()).passed, 1);
    let bad = folder("001-one", "print('hello'); exit(1)", None);
    assert_eq!(run_all(&bad, &bless).failed, 1);
    assert!(!bad.path().join("001-one.out").exists());
}

#[test]
fn tests_are_selected_by_number_and_by_word() {
    let folder = folder("010-create", "", Some(""));
    for selector in ["10", "010", "creat"] {
        let options = Options { select: vec![selector.into()], ..Options::default() };
        assert_eq!(run_all(&folder, &options).passed, 1, "{selector}");
    }
    let options = Options { select: vec!["11".into()], ..Options::default() };
    assert!(run_folder(folder.path(), Path::new("/bin/true"), Path::new(""), &options).is_err());
}

#[test]
fn a_diff_shows_only_what_differs_and_its_surroundings() {
    let expected: String = (0..20).map(|n| format!("{n}\n")).collect();
    let actual = expected.replace("15\n", "fifteen\n");
    let diff = diff::unified(&expected, &actual).expect("a difference");
    assert_eq!(
        diff,
        "--- expected\n+++ printed\n@@\n 12\n 13\n 14\n-15\n+fifteen\n 16\n 17\n 18\n@@\n"
    );
    assert_eq!(diff::unified(&expected, &expected), None);
}
