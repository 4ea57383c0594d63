//! What errors become elsewhere: text, NBD error numbers, exit codes.

use brep_block::{Error, ErrorKind, Operation};

fn os(errno: i32) -> Error {
    Error::from_os(Operation::Write, "disk", &std::io::Error::from_raw_os_error(errno))
}

fn of(kind: ErrorKind) -> Error {
    Error::new(Operation::Write, kind, "disk", "why")
}

#[test]
fn system_errors_map_to_kinds_and_nbd_numbers() {
    use ErrorKind::{InvalidInput, Io, NoSpace, ReadOnly, Unsupported};
    for (errno, kind, nbd) in [
        (1, ReadOnly, 1),
        (13, ReadOnly, 1),
        (30, ReadOnly, 1),
        (5, Io, 5),
        (12, Io, 12),
        (22, InvalidInput, 22),
        (27, NoSpace, 28),
        (28, NoSpace, 28),
        (122, NoSpace, 28),
        (75, Io, 75),
        (95, Unsupported, 95),
        (108, Io, 108),
        (110, Io, 5),
    ] {
        let error = os(errno);
        assert_eq!((error.kind(), error.errno()), (kind, errno));
        assert_eq!(error.nbd_errno(), nbd, "errno {errno}");
    }
    let error = Error::from_os(Operation::Read, "disk", &std::io::Error::other("no number"));
    assert_eq!((error.kind(), error.errno()), (Io, 5));
}

#[test]
fn every_kind_has_a_number_that_nbd_knows() {
    use ErrorKind::*;
    for (kind, nbd) in [
        (InvalidInput, 22),
        (ReadOnly, 1),
        (NoSpace, 28),
        (Unsupported, 95),
        (NotConnected, 5),
        (TimedOut, 5),
        (Shutdown, 108),
        (Locked, 5),
        (Corrupt, 5),
        (Sticky, 5),
        (Io, 5),
    ] {
        assert_eq!(of(kind).nbd_errno(), nbd, "{kind:?}");
    }
}

#[test]
fn exit_codes_tell_state_from_failure() {
    assert_eq!(of(ErrorKind::Locked).exit_code(), 3);
    assert_eq!(of(ErrorKind::ReadOnly).exit_code(), 3);
    assert_eq!(of(ErrorKind::Io).exit_code(), 1);
    assert_eq!(of(ErrorKind::InvalidInput).exit_code(), 1);
    let open = Error::new(Operation::Open, ErrorKind::InvalidInput, "disk", "why");
    assert_eq!(open.exit_code(), 1, "a file that is not what it should be is no usage error");
}

#[test]
fn the_text_says_which_disk_what_where_and_why() {
    let error = of(ErrorKind::Io);
    assert_eq!(error.to_string(), "disk: write: why");
    assert_eq!(error.at(4096, 512).to_string(), "disk: write of 512 bytes at 4096: why");
}

#[test]
fn a_copy_is_not_changed_through_the_original() {
    let first = of(ErrorKind::NoSpace).at(1, 2);
    let copy = first.clone();
    let outer = first.within(Operation::Flush, "image", 3, 4).with_errno(Some(122));
    assert_eq!((copy.operation(), copy.node(), copy.offset()), (Operation::Write, "disk", 1));
    assert_eq!((copy.length(), copy.errno()), (2, 28));
    assert_eq!((outer.operation(), outer.node(), outer.offset()), (Operation::Flush, "image", 3));
    assert_eq!((outer.kind(), outer.errno()), (ErrorKind::NoSpace, 122));
    assert!(outer.detail().contains("disk: write of 2 bytes at 1"), "{outer}");
}
