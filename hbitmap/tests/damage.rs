//! Files that are torn, foreign, or in use: each is refused with its own error, and left alone.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use brep_hbitmap::{
    AfterPowerLoss, Error, Identity, LastStop, MapSet, Options, PersistentBitmap, Role, Tag,
};

const GROUPS: u64 = 40_000;
const SIZE: u64 = GROUPS * 512 - 100;
const PAGE: usize = 4096;
const IDENTITY: Identity = Identity(*b"disk of a test..");
/// With one bank: two pages of header, one of table, two of bits.
const TABLE: usize = 2 * PAGE;
const BITS: usize = 3 * PAGE;

fn options() -> Options {
    Options::new(IDENTITY, SIZE, 9).boot_id([1; 16])
}

fn after_reboot() -> Options {
    options().boot_id([2; 16])
}

fn tag(number: u64) -> Tag {
    Tag { id: [3; 16], number }
}

struct Scratch {
    _directory: tempfile::TempDir,
    path: PathBuf,
}

fn scratch() -> Scratch {
    let directory =
        tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).expect("a directory");
    Scratch { path: directory.path().join("map"), _directory: directory }
}

/// A file with groups 1 and 39 999 set, and closed.
fn closed() -> Scratch {
    let scratch = scratch();
    let mut map = PersistentBitmap::create(&scratch.path, &options(), tag(5)).unwrap();
    map.set(512, 1);
    map.set(SIZE - 1, 1);
    map.close().unwrap();
    scratch
}

/// The same, but not closed.
fn killed() -> Scratch {
    let scratch = closed();
    drop(PersistentBitmap::open(&scratch.path, &options()).unwrap());
    scratch
}

fn edit(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(path).unwrap();
    change(&mut bytes);
    fs::write(path, bytes).unwrap();
}

/// Changes both copies of the header, and makes their checksums right again.
fn edit_header(path: &Path, change: impl Fn(&mut [u8])) {
    edit(path, |bytes| {
        for copy in [0, PAGE] {
            let header = &mut bytes[copy..copy + 256];
            change(header);
            header[12..16].fill(0);
            let crc = crc32fast::hash(header);
            header[12..16].copy_from_slice(&crc.to_le_bytes());
        }
    });
}

/// Whoever had it kept a log.
fn logged(path: &Path) {
    edit_header(path, |header| header[216] = 1);
}

/// Opening fails, and changes nothing.
fn refused(path: &Path, options: &Options) -> Error {
    let before = fs::read(path).unwrap();
    let error = PersistentBitmap::open(path, options).expect_err("must be refused");
    assert!(fs::read(path).unwrap() == before, "a refused file must be left alone");
    assert!(error.to_string().starts_with(&path.display().to_string()), "{error}");
    error
}

macro_rules! assert_refused {
    ($path:expr, $options:expr, $kind:pat, $words:expr) => {
        let error = refused($path, $options);
        assert!(matches!(error, $kind), "{error:?}");
        assert!(error.to_string().contains($words), "{error}");
    };
    ($path:expr, $kind:pat, $words:expr) => {
        assert_refused!($path, &options(), $kind, $words)
    };
}

#[test]
fn a_closed_file_comes_back_as_it_was() {
    let scratch = closed();
    let map = PersistentBitmap::open(&scratch.path, &after_reboot()).unwrap();
    assert_eq!(map.last_stop(), LastStop::Clean);
    assert_eq!(map.tag(), tag(5));
    assert_eq!(map.map().iter(0).collect::<Vec<_>>(), [512, (GROUPS - 1) * 512]);
    assert_eq!(map.map().dirty_bytes(), 512 + 412);
}

#[test]
fn a_file_that_was_not_closed_comes_back_as_it_was_under_the_same_boot() {
    let scratch = killed();
    for last in 0..3 {
        let mut map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
        assert_eq!(map.last_stop(), LastStop::Killed);
        assert_eq!(map.map().count(), (2 + last) * 512);
        map.set((10 + last) * 512, 1);
    }
}

#[test]
fn emptying_is_permanent() {
    let scratch = killed();
    let mut map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
    map.reset_all();
    map.set(512 * 7, 1);
    map.flush().unwrap();
    drop(map);
    let map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
    assert_eq!(map.map().iter(0).collect::<Vec<_>>(), [512 * 7]);
}

#[test]
fn an_empty_file_is_not_a_bitmap() {
    let scratch = scratch();
    fs::write(&scratch.path, "").unwrap();
    assert_refused!(&scratch.path, Error::NotABitmap { .. }, "no magic number");
}

#[test]
fn a_foreign_file_is_not_a_bitmap() {
    let scratch = scratch();
    fs::write(&scratch.path, vec![0x51; 5 * PAGE]).unwrap();
    assert_refused!(&scratch.path, Error::NotABitmap { .. }, "no magic number");
}

#[test]
fn another_version_is_not_read() {
    let scratch = closed();
    edit_header(&scratch.path, |header| header[8] = 99);
    assert_refused!(&scratch.path, Error::NotABitmap { .. }, "version 99");
}

#[test]
fn a_missing_file_is_an_error_of_the_system() {
    let scratch = scratch();
    let error = PersistentBitmap::open(&scratch.path, &options()).unwrap_err();
    assert!(matches!(error, Error::Io { action: "open", .. }), "{error:?}");
}

#[test]
fn a_bitmap_of_something_else_is_foreign() {
    let scratch = closed();
    let boot = [1; 16];
    let other = Options::new(Identity(*b"a different disk"), SIZE, 9).boot_id(boot);
    assert_refused!(&scratch.path, &other, Error::Foreign { .. }, "belongs to");
    let other = Options::new(IDENTITY, SIZE - 1, 9).boot_id(boot);
    assert_refused!(&scratch.path, &other, Error::Foreign { .. }, "items");
    let error = MapSet::open(&scratch.path, &options()).unwrap_err();
    assert!(matches!(error, Error::Foreign { .. }), "{error:?}");
}

#[test]
fn a_truncated_file_is_corrupt() {
    for pages in 2..5 {
        let scratch = closed();
        edit(&scratch.path, |bytes| bytes.truncate(pages * PAGE));
        assert_refused!(&scratch.path, Error::Corrupt { .. }, "bytes long instead of 20480");
    }
    let scratch = closed();
    edit(&scratch.path, |bytes| bytes.push(0));
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "20481 bytes long");
    let scratch = closed();
    edit(&scratch.path, |bytes| bytes.truncate(PAGE));
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "4096 bytes long");
}

#[test]
fn one_damaged_copy_of_the_header_does_no_harm() {
    for offset in [0, 9, 13, 30, 200, 255] {
        for copy in [0, PAGE] {
            let scratch = closed();
            edit(&scratch.path, |bytes| bytes[copy + offset] ^= 0x10);
            let map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
            assert_eq!((map.last_stop(), map.map().count()), (LastStop::Clean, 1024));
            drop(map);
            // And it is whole again.
            edit(&scratch.path, |bytes| bytes[PAGE - copy + offset] ^= 0x10);
            assert_eq!(
                PersistentBitmap::open(&scratch.path, &options()).unwrap().map().count(),
                1024
            );
        }
    }
}

#[test]
fn two_damaged_copies_of_the_header_are_corrupt() {
    let scratch = closed();
    edit(&scratch.path, |bytes| {
        bytes[100] ^= 1;
        bytes[PAGE + 50] ^= 1;
    });
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "no copy of the header");
    edit(&scratch.path, |bytes| bytes[0] = 0);
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "no copy of the header");
}

#[test]
fn headers_that_contradict_each_other_are_corrupt() {
    let scratch = closed();
    let other = closed();
    edit_header(&other.path, |header| header[120] ^= 1);
    let stray = fs::read(&other.path).unwrap();
    edit(&scratch.path, |bytes| bytes[..256].copy_from_slice(&stray[..256]));
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "contradict");
}

#[test]
fn senseless_headers_with_good_checksums_are_corrupt() {
    // The number of maps, the state, a bank, a generation.
    for (offset, value) in [(52, 0), (52, 2), (52, 99), (80, 7), (88, 1), (96, 0), (96, 9)] {
        let scratch = closed();
        edit_header(&scratch.path, |header| header[offset] = value);
        assert_refused!(&scratch.path, Error::Corrupt { .. }, "no copy of the header");
    }
}

#[test]
fn a_changed_bit_is_corrupt_even_after_an_unclean_stop() {
    for scratch in [closed(), killed()] {
        for offset in [BITS, BITS + 100, BITS + PAGE, BITS + 2 * PAGE - 1] {
            edit(&scratch.path, |bytes| bytes[offset] ^= 1);
            assert_refused!(&scratch.path, Error::Corrupt { .. }, "do not match their checksum");
            edit(&scratch.path, |bytes| bytes[offset] ^= 1);
        }
        PersistentBitmap::open(&scratch.path, &options()).unwrap();
    }
}

#[test]
fn a_page_that_was_not_written_is_corrupt() {
    let scratch = killed();
    edit(&scratch.path, |bytes| bytes[BITS..BITS + PAGE].fill(0));
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "chunk 0 of bank 0");
}

#[test]
fn a_table_that_was_not_written_is_corrupt() {
    let scratch = killed();
    edit(&scratch.path, |bytes| bytes[TABLE..TABLE + PAGE].fill(0));
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "its state is not one");
}

#[test]
fn a_table_from_before_is_noticed_after_a_clean_stop() {
    let scratch = closed();
    let before = fs::read(&scratch.path).unwrap();
    let mut map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
    map.reset_all();
    map.set(0, SIZE);
    map.close().unwrap();
    edit(&scratch.path, |bytes| {
        bytes[TABLE..BITS].copy_from_slice(&before[TABLE..BITS]);
    });
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "chunk tables");
}

#[test]
fn a_header_older_than_the_chunks_is_corrupt() {
    let scratch = closed();
    let mut map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
    let before = fs::read(&scratch.path).unwrap();
    map.reset_all();
    map.set(0, 1);
    drop(map);
    edit(&scratch.path, |bytes| bytes[..TABLE].copy_from_slice(&before[..TABLE]));
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "its state is not one");
}

#[test]
fn bits_beyond_the_end_are_corrupt() {
    let scratch = killed();
    let mut map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
    map.set(SIZE - 600, 1);
    drop(map);
    edit(&scratch.path, |bytes| bytes[BITS + GROUPS as usize / 8] = 1);
    assert_refused!(&scratch.path, Error::Corrupt { .. }, "beyond the end");
}

#[test]
fn a_file_that_was_in_use_when_power_was_lost_is_refused() {
    let scratch = killed();
    assert_refused!(&scratch.path, &after_reboot(), Error::PowerLost { .. }, "power was lost");
    // What is not known is never the same.
    let unknown = options().boot_id([0; 16]);
    drop(PersistentBitmap::open(&closed().path, &unknown).unwrap());
    let scratch = closed();
    drop(PersistentBitmap::open(&scratch.path, &unknown).unwrap());
    assert_refused!(&scratch.path, &unknown, Error::PowerLost { .. }, "power was lost");
}

#[test]
fn a_log_of_other_times_does_not_vouch_for_a_file_that_was_in_use_without_one() {
    let scratch = killed();
    let accepting = after_reboot().after_power_loss(AfterPowerLoss::Accept);
    assert_refused!(&scratch.path, &accepting, Error::PowerLost { .. }, "power was lost");
    // One that was kept, and then not any more.
    logged(&scratch.path);
    drop(PersistentBitmap::open(&scratch.path, &options()).unwrap());
    assert_refused!(&scratch.path, &accepting, Error::PowerLost { .. }, "power was lost");
}

#[test]
fn after_a_power_loss_damaged_chunks_count_as_dirty() {
    let scratch = killed();
    edit(&scratch.path, |bytes| bytes[BITS + PAGE] ^= 1);
    logged(&scratch.path);
    let accepting = after_reboot().after_power_loss(AfterPowerLoss::Accept);
    let map = PersistentBitmap::open(&scratch.path, &accepting).unwrap();
    assert_eq!(map.last_stop(), LastStop::PowerLost);
    assert_eq!(map.map().iter(0).nth(1), Some(32_768 * 512));
    assert_eq!(map.map().count() / 512, 1 + GROUPS - 32_768);
    drop(map);
    // Killed before it was made good: what was hot may not have been set.
    let map = PersistentBitmap::open(&scratch.path, &accepting).unwrap();
    assert_eq!(map.last_stop(), LastStop::PowerLost);
    assert_eq!(map.map().count() / 512, 1 + GROUPS - 32_768);
    map.close().unwrap();
    let map = PersistentBitmap::open(&scratch.path, &after_reboot()).unwrap();
    assert_eq!(map.last_stop(), LastStop::Clean);
    assert_eq!(map.map().count() / 512, 1 + GROUPS - 32_768);
}

#[test]
fn after_a_power_loss_a_header_older_than_the_chunks_loses_no_bit() {
    let scratch = closed();
    let mut map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
    let before = fs::read(&scratch.path).unwrap();
    map.reset_all();
    map.set(0, 1);
    drop(map);
    edit(&scratch.path, |bytes| bytes[..TABLE].copy_from_slice(&before[..TABLE]));
    logged(&scratch.path);
    let accepting = after_reboot().after_power_loss(AfterPowerLoss::Accept);
    let mut map = PersistentBitmap::open(&scratch.path, &accepting).unwrap();
    assert_eq!(map.map().count() / 512, 32_768 + 1);
    map.reset_all();
    map.close().unwrap();
    assert!(PersistentBitmap::open(&scratch.path, &options()).unwrap().map().is_empty());
}

#[test]
fn after_a_power_loss_a_cut_that_was_not_flushed_leaves_no_trace() {
    let scratch = scratch();
    let mut maps = MapSet::create(&scratch.path, &options(), tag(1)).unwrap();
    maps.set(Role::Open, 0, 1);
    maps.flush().unwrap();
    let flushed = fs::read(&scratch.path).unwrap();
    maps.rotate(tag(2)).unwrap();
    maps.drop_pending();
    maps.rotate(tag(3)).unwrap();
    maps.drop_pending();
    maps.rotate(tag(4)).unwrap();
    maps.set(Role::Open, 512 * 5, 1);
    drop(maps);
    edit(&scratch.path, |bytes| bytes[..2 * PAGE].copy_from_slice(&flushed[..2 * PAGE]));

    logged(&scratch.path);
    let accepting = after_reboot().after_power_loss(AfterPowerLoss::Accept);
    let mut maps = MapSet::open(&scratch.path, &accepting).unwrap();
    assert!(!maps.has_pending() && maps.map(Role::Pending).is_empty());
    assert!(maps.map(Role::Open).get(0));
    maps.set_logged(true).unwrap();
    // What is set again after the next cut must reach the file.
    maps.rotate(tag(5)).unwrap();
    maps.set(Role::Open, 512 * 5, 1);
    drop(maps);
    let maps = MapSet::open(&scratch.path, &after_reboot()).unwrap();
    assert_eq!(maps.map(Role::Open).iter(0).collect::<Vec<_>>(), [512 * 5]);
    assert!(maps.map(Role::Pending).get(0));
}

#[test]
fn two_users_of_one_file_are_one_too_many() {
    let scratch = closed();
    let map = PersistentBitmap::open(&scratch.path, &options()).unwrap();
    let error = PersistentBitmap::open(&scratch.path, &options()).unwrap_err();
    assert!(matches!(error, Error::Locked { .. }), "{error:?}");
    drop(map);
    PersistentBitmap::open(&scratch.path, &options()).unwrap();
}

#[test]
fn a_closed_file_is_free_although_other_threads_start_processes() {
    let scratch = closed();
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                std::process::Command::new("true").status().unwrap();
            }
        });
        let opened =
            (0..300).try_for_each(|_| PersistentBitmap::open(&scratch.path, &options()).map(drop));
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        opened.unwrap();
    });
}

#[test]
fn creating_replaces_nothing() {
    let scratch = closed();
    let before = fs::read(&scratch.path).unwrap();
    let error = PersistentBitmap::create(&scratch.path, &options(), tag(0)).unwrap_err();
    assert!(matches!(error, Error::Io { action: "create", .. }), "{error:?}");
    assert!(fs::read(&scratch.path).unwrap() == before);
}

#[test]
fn creating_goes_on_over_what_a_kill_left_of_an_earlier_attempt() {
    let scratch = scratch();
    let partial = scratch.path.with_file_name("map.new");
    fs::write(&partial, vec![0xff; 123_456]).unwrap();
    PersistentBitmap::create(&scratch.path, &options(), tag(0)).unwrap().close().unwrap();
    assert!(!partial.exists());
    let metadata = fs::metadata(&scratch.path).unwrap();
    assert_eq!((metadata.len(), metadata.mode() & 0o777), (5 * PAGE as u64, 0o600));
    assert!(PersistentBitmap::open(&scratch.path, &options()).unwrap().map().is_empty());
}

#[test]
fn a_copy_with_holes_is_allocated_before_it_is_used() {
    let scratch = closed();
    edit(&scratch.path, |_| {});
    let copy = scratch.path.with_file_name("copy");
    let file = fs::File::create(&copy).unwrap();
    let bytes = fs::read(&scratch.path).unwrap();
    file.set_len(bytes.len() as u64).unwrap();
    for (index, page) in bytes.chunks(PAGE).enumerate() {
        use std::os::unix::fs::FileExt;
        if page.iter().any(|byte| *byte != 0) {
            file.write_all_at(page, (index * PAGE) as u64).unwrap();
        }
    }
    let map = PersistentBitmap::open(&copy, &options()).unwrap();
    assert_eq!(map.map().count(), 1024);
    assert!(fs::metadata(&copy).unwrap().blocks() * 512 >= bytes.len() as u64);
}

#[test]
fn no_space_is_an_error_when_the_file_is_made() {
    const PATH: &str = "BREP_HBITMAP_NO_SPACE_PATH";
    if let Some(path) = std::env::var_os(PATH) {
        let error = PersistentBitmap::create(&path, &options(), tag(0)).unwrap_err();
        assert!(matches!(error, Error::Io { action: "write", .. }), "{error:?}");
        let left: Vec<_> = fs::read_dir(Path::new(&path).parent().unwrap()).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
        return;
    }
    // A process that may not write files longer than a page or two stands for a full disk.
    let scratch = scratch();
    let name = "no_space_is_an_error_when_the_file_is_made";
    let status = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$0\" --exact \"$1\""])
        .arg(std::env::current_exe().unwrap())
        .arg(name)
        .env(PATH, &scratch.path)
        .status()
        .unwrap();
    assert!(status.success());
}

#[test]
fn a_senseless_request_in_flight_is_corrupt() {
    let scratch = scratch();
    // Beyond the end, and of no length.
    for word in [u64::MAX, 5 << 23] {
        let _ = fs::remove_file(&scratch.path);
        let mut maps = MapSet::create(&scratch.path, &options(), tag(1)).unwrap();
        maps.set(Role::Open, 0, 512);
        let _request = maps.begin_in_flight(0, 512, 1);
        drop(maps);
        edit(&scratch.path, |bytes| {
            bytes[2 * PAGE + 8..2 * PAGE + 16].copy_from_slice(&word.to_le_bytes());
        });
        let error = MapSet::open(&scratch.path, &options()).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }), "{error:?}");
        assert!(error.to_string().contains("in flight"), "{error}");
    }
}

#[test]
fn roles_change_as_a_checkpoint_needs_it() {
    let scratch = scratch();
    let mut maps = MapSet::create(&scratch.path, &options(), tag(1)).unwrap();
    let dirty = |maps: &MapSet, role| maps.map(role).iter(0).map(|i| i / 512).collect::<Vec<_>>();
    maps.set(Role::Open, 0, 1024);
    assert!(!maps.has_pending());
    maps.rotate(tag(2)).unwrap();
    assert!(matches!(maps.rotate(tag(3)), Err(Error::State { .. })), "one cut at a time");
    maps.set(Role::Open, 512, 512);
    assert_eq!(dirty(&maps, Role::Pending), [0, 1]);
    assert_eq!(dirty(&maps, Role::Open), [1]);
    assert_eq!((maps.tag(Role::Pending), maps.tag(Role::Open)), (tag(1), tag(2)));

    maps.void_pending();
    assert_eq!((maps.has_pending(), maps.tag(Role::Open)), (false, tag(1)));
    assert_eq!(dirty(&maps, Role::Open), [0, 1]);

    maps.rotate(tag(3)).unwrap();
    maps.set(Role::Open, 512 * 9, 1);
    maps.drop_pending();
    assert_eq!(dirty(&maps, Role::Open), [9]);
    assert!(maps.map(Role::Pending).is_empty());

    maps.set(Role::Differs, 512 * 20, 512 * 5);
    maps.transfer(Role::Differs, Role::Open, 512 * 22, 512 * 2);
    assert_eq!(dirty(&maps, Role::Differs), [20, 21, 24]);
    assert_eq!(dirty(&maps, Role::Open), [9, 22, 23]);
    maps.rotate(tag(4)).unwrap();
    maps.set(Role::Open, 0, 1);
    maps.all_to_differs();
    assert_eq!(dirty(&maps, Role::Differs), [0, 9, 20, 21, 22, 23, 24]);
    assert!(maps.map(Role::Open).is_empty() && !maps.has_pending());
}

#[test]
#[should_panic(expected = "no cut is outstanding")]
fn nothing_is_set_in_a_pending_map_that_does_not_exist() {
    let scratch = scratch();
    let mut maps = MapSet::create(&scratch.path, &options(), tag(1)).unwrap();
    maps.set(Role::Pending, 0, 1);
}

#[test]
fn three_idle_maps_of_a_large_disk_cost_little_memory() {
    let scratch = scratch();
    let options = Options::new(IDENTITY, 16 << 40, 16);
    let mut maps = MapSet::create(&scratch.path, &options, tag(1)).unwrap();
    assert!(maps.memory_bytes() < 4096, "{}", maps.memory_bytes());
    maps.set(Role::Open, 0, 16 << 40);
    maps.rotate(tag(2)).unwrap();
    maps.drop_pending();
    maps.shrink();
    assert!(maps.memory_bytes() < 64 << 10, "{}", maps.memory_bytes());
    assert!(fs::metadata(&scratch.path).unwrap().len() < 97 << 20);
}
