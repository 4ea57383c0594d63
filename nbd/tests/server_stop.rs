//! Stops and hand-overs come to their end in time, whatever the device does.

mod server_support;

use std::sync::Arc;
use std::time::Duration;

use brep_block::{Count, Fault, Memory, Operation, Rule};
use brep_nbd::proto::wire::{Command, CommandFlags, Errno, OptionCode, ReplyType, RequestHeader};
use brep_nbd::server::{Export, ServerConfig, StaticExports};
use server_support::{Fixture, Raw, SIZE, info_data, request, request_bytes, until, within};

const GIB: u64 = 1 << 30;

fn write(cookie: u64) -> Vec<u8> {
    request_bytes(request(Command::WRITE, cookie, 0, 4), b"late")
}

/// What is zeroed with `flags`, from half a MiB on.
fn zeroes(len: u64, flags: CommandFlags) -> RequestHeader {
    RequestHeader { flags, len, ..request(Command::WRITE_ZEROES, 1, 1 << 19, 0) }
}

#[tokio::test(start_paused = true)]
async fn what_hangs_when_a_stop_is_over_is_answered_with_shutdown() {
    let fault = Fault::new(Memory::new("memory", SIZE));
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.session(false).await;
    let connection = fixture.connection().await;
    let mut extended = fixture.extended().await;
    let hang = fault.hang(Rule::new(Operation::Write).forever());
    raw.send(&[write(1), write(2)].concat()).await;
    let header = request(Command::WRITE, 3, 0, 4);
    extended.extended_request(header, b"late").await;
    within(hang.reached(3)).await;

    let grace = Duration::from_secs(3);
    let started = tokio::time::Instant::now();
    fixture.server.shutdown(grace).await;
    assert!((grace..grace + Duration::from_secs(1)).contains(&started.elapsed()));
    let mut answered = [raw.simple().await, raw.simple().await];
    answered.sort_by_key(|(_, cookie)| *cookie);
    assert_eq!(answered, [(Errno::ESHUTDOWN, 1), (Errno::ESHUTDOWN, 2)]);
    assert!(raw.is_closed().await);
    assert_eq!(extended.extended_outcome(header).await, Errno::ESHUTDOWN);
    assert!(extended.is_closed().await);
    assert_eq!(fixture.server.bytes_in_flight(), 0);

    assert!(!connection.is_closed(), "its operations still run");
    hang.release();
    within(connection.closed()).await;
}

#[tokio::test(start_paused = true)]
async fn what_hangs_when_a_hand_over_is_over_is_answered_before_it_ends() {
    let fault = Fault::new(Memory::new("memory", SIZE));
    let exports = Arc::new(StaticExports::new());
    exports.add(Export::new("disk", fault.clone()));
    let fixture = Fixture::serve(exports.clone(), ServerConfig::default()).await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Write));
    raw.send(&write(1)).await;
    within(hang.reached(1)).await;
    let handed =
        tokio::spawn(async move { exports.hand_over("disk", Duration::from_secs(3)).await });
    assert_eq!(raw.simple().await, (Errno::ESHUTDOWN, 1));
    assert!(raw.is_closed().await);
    assert!(!handed.is_finished(), "the write may still reach the disk");
    hang.release();
    assert!(within(handed).await.unwrap());
}

#[tokio::test(start_paused = true)]
async fn a_long_zeroing_ends_with_the_stop_after_the_piece_that_it_is_at() {
    let count = Count::new(Memory::new("memory", 4 * GIB));
    let fault = Fault::new(count.clone());
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.extended().await;
    let connection = fixture.connection().await;
    for command in [Command::WRITE_ZEROES, Command::TRIM] {
        let header = RequestHeader { command, ..zeroes(GIB, CommandFlags::NONE) };
        raw.extended_request(header, &[]).await;
        assert_eq!(raw.extended_outcome(header).await, Errno::OK);
    }
    for operation in [Operation::WriteZeroes, Operation::Discard] {
        // Half a MiB more than seven whole pieces, and half a MiB less than one.
        let done = count.of(operation);
        assert_eq!((done.operations, done.bytes), (9, GIB), "{operation:?}");
    }

    let hang = fault.hang(Rule::new(Operation::WriteZeroes).nth(3));
    let header = zeroes(2 * GIB, CommandFlags::NO_HOLE);
    raw.extended_request(header, &[]).await;
    within(hang.reached(1)).await;
    fixture.server.shutdown(Duration::from_secs(3)).await;
    assert_eq!(raw.extended_outcome(header).await, Errno::ESHUTDOWN);
    assert!(raw.is_closed().await);
    hang.release();
    within(connection.closed()).await;
    assert_eq!(count.of(Operation::WriteZeroes).operations, 9 + 3, "pieces after the end");
}

#[tokio::test]
async fn a_zeroing_in_pieces_is_flushed_once_and_fails_as_one() {
    let count = Count::new(Memory::new("memory", 4 * GIB));
    let fault = Fault::new(count.clone());
    let fixture = Fixture::device(fault.clone()).await;
    let mut raw = fixture.extended().await;
    let header = zeroes(GIB, CommandFlags::FUA);
    raw.extended_request(header, &[]).await;
    assert_eq!(raw.extended_outcome(header).await, Errno::OK);
    assert_eq!(count.of(Operation::Flush).operations, 1);

    fault.fail(Rule::new(Operation::WriteZeroes).nth(2));
    raw.extended_request(header, &[]).await;
    assert_eq!(raw.extended_outcome(header).await, Errno::EIO);
    assert_eq!(count.of(Operation::WriteZeroes).operations, 9 + 1, "it went on after a failure");
    assert_eq!(count.of(Operation::Flush).operations, 1);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_waits_for_a_slot_does_not_hold_up_a_stop() {
    let config = ServerConfig::default().connections_max(1);
    let fixture = Fixture::device_with(Memory::new("memory", SIZE), config).await;
    let _user = fixture.session(false).await;
    let mut waiting = go(&fixture).await;
    until(|| (fixture.server.connections().len() == 2).then_some(())).await;
    let started = tokio::time::Instant::now();
    fixture.server.shutdown(Duration::from_secs(60)).await;
    assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
    assert!(waiting.is_closed().await);
}

/// A client that has asked for the export, and has not heard yet.
async fn go(fixture: &Fixture) -> Raw {
    let mut raw = fixture.client().await;
    raw.send(&server_support::option_bytes(OptionCode::GO, &info_data("disk", &[]))).await;
    raw
}

#[tokio::test]
async fn a_client_that_gave_up_waiting_for_a_slot_does_not_get_it() {
    let config = ServerConfig::default().connections_max(1);
    let fixture = Fixture::device_with(Memory::new("memory", SIZE), config).await;
    let user = fixture.session(false).await;
    let gone = go(&fixture).await;
    until(|| (fixture.server.connections().len() == 2).then_some(())).await;
    drop(gone);
    until(|| (fixture.server.connections().len() == 1).then_some(())).await;
    let mut next = go(&fixture).await;
    drop(user);
    let replies = next.replies(OptionCode::GO).await;
    assert_eq!(replies.last().map(|(kind, _)| *kind), Some(ReplyType::ACK));
    assert_eq!(next.read(0, 1).await, [0]);
}
