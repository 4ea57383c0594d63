//! Many requests, and clients that ask for more than they should.

mod server_support;

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use brep_block::{BlockDevice, Count, Fault, Io, Memory, Operation, Rule, Serialise, WriteFlags};
use brep_nbd::proto::wire::{Command, Errno, OptionCode};
use brep_nbd::server::{ContextStatus, Export, MetaContext, ServerConfig, StaticExports};
use server_support::{Fixture, Raw, meta_data, request, request_bytes, until, within};
use tokio::io::AsyncWriteExt;

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn a_thousand_requests_that_finish_out_of_order_are_all_answered_once() {
    let memory = Memory::new("memory", MIB);
    let fault = Fault::new(memory.clone());
    // Every third one takes its time, so that later ones overtake it.
    let hangs: Vec<_> = (0..10)
        .map(|i| {
            let offset = i * 3 * 512;
            fault.hang(Rule::new(Operation::Write).range(offset..offset + 512).forever())
        })
        .collect();
    let fixture = Fixture::device(fault).await;
    let mut raw = fixture.session(false).await;
    let mut bytes = Vec::new();
    for cookie in 0..1000_u64 {
        let data = [cookie as u8; 512];
        let offset = cookie * 512;
        bytes.extend(request_bytes(request(Command::WRITE, cookie, offset, 512), &data));
    }
    raw.send(&bytes).await;
    let mut answered = BTreeSet::new();
    let mut order = Vec::new();
    for _ in 0..990 {
        let (error, cookie) = raw.simple().await;
        assert_eq!(error, Errno::OK);
        assert!(answered.insert(cookie), "{cookie} was answered twice");
        order.push(cookie);
    }
    drop(hangs);
    for _ in 0..10 {
        let (error, cookie) = raw.simple().await;
        assert_eq!((error, cookie % 3), (Errno::OK, 0));
        assert!(answered.insert(cookie), "{cookie} was answered twice");
    }
    assert_eq!(answered, (0..1000).collect());
    for cookie in [0, 1, 27, 999_u64] {
        assert_eq!(memory.read(cookie * 512, 512).await.unwrap(), [cookie as u8; 512][..]);
    }
}

#[tokio::test]
async fn overlapping_writes_of_one_connection_take_effect_in_the_order_of_arrival() {
    let memory = Memory::new("memory", MIB);
    let fault = Fault::new(memory.clone());
    fault.delay(Rule::new(Operation::Write).nth(1), Duration::from_millis(50));
    // The lock is taken when the device is called.
    let fixture = Fixture::device(Serialise::new(fault)).await;
    let mut raw = fixture.session(false).await;
    let mut bytes = Vec::new();
    for cookie in 1..=100_u64 {
        let header = request(Command::WRITE, cookie, 0, 512);
        bytes.extend(request_bytes(header, &[cookie as u8; 512]));
    }
    raw.send(&bytes).await;
    for _ in 0..100 {
        assert_eq!(raw.simple().await.0, Errno::OK);
    }
    assert_eq!(memory.read(0, 512).await.unwrap(), [100; 512][..]);
}

/// Sends as much as the socket takes while nothing is received.
async fn flood(raw: &mut Raw, bytes: &[u8]) {
    loop {
        let send = tokio::time::timeout(Duration::from_millis(300), raw.stream.write_all(bytes));
        if send.await.is_err() {
            return;
        }
    }
}

#[tokio::test]
async fn a_client_that_never_fetches_its_replies_costs_little_and_delays_nobody() {
    let memory = Memory::new("memory", 64 * MIB);
    memory.write(0, vec![1; 32 << 20].into(), WriteFlags::default()).await.unwrap();
    let count = Count::new(memory);
    let fixture = Fixture::device(count.clone()).await;
    let mut greedy = fixture.session(false).await;
    let requests: Vec<u8> = (0..64)
        .flat_map(|cookie| request_bytes(request(Command::READ, cookie, 0, 1 << 20), &[]))
        .collect();
    flood(&mut greedy, &requests).await;
    let read = count.of(Operation::Read).operations;
    assert!(read <= 4, "{read} MiB were read for nobody");
    assert!(fixture.server.bytes_in_flight() <= 4 * MIB);

    let mut good = fixture.session(false).await;
    assert_eq!(good.read(0, 3).await, [1; 3]);
    drop(greedy);
    until(|| (fixture.server.connections().len() == 1).then_some(())).await;
    assert_eq!(fixture.server.bytes_in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_takes_nothing_is_disconnected_where_that_is_wanted() {
    let config = ServerConfig::default().write_timeout(Some(Duration::from_secs(30)));
    let fixture = Fixture::device_with(Memory::new("memory", 64 * MIB), config).await;
    let mut greedy = fixture.session(false).await;
    greedy.request(request(Command::READ, 1, 0, 32 << 20), &[]).await;
    let connection = fixture.connection().await;
    let start = tokio::time::Instant::now();
    tokio::time::timeout(Duration::from_secs(60), connection.closed()).await.expect("closed");
    assert!(start.elapsed() >= Duration::from_secs(29), "{:?}", start.elapsed());
}

#[tokio::test]
async fn no_more_requests_are_started_than_allowed() {
    let fault = Fault::new(Memory::new("memory", MIB));
    let config = ServerConfig::default().requests_in_flight_max(4);
    let fixture = Fixture::device_with(fault.clone(), config).await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Flush).forever());
    let mut bytes = Vec::new();
    for cookie in 0..20 {
        bytes.extend(request_bytes(request(Command::FLUSH, cookie, 0, 0), &[]));
    }
    raw.send(&bytes).await;
    within(hang.reached(4)).await;
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    let connection = fixture.connection().await;
    assert_eq!(connection.counters().requests, 4);
    hang.release();
    for _ in 0..20 {
        assert_eq!(raw.simple().await.0, Errno::OK);
    }
}

/// Starts writes that hang; returns how many requests were started, of how many.
async fn started(fixture: &Fixture, raw: &mut Raw, count: u64, len: u32) -> u64 {
    let before = fixture.connection().await.counters().requests;
    for cookie in 0..count {
        let bytes = request_bytes(request(Command::WRITE, cookie, 0, len), &vec![1; len as usize]);
        let send = tokio::time::timeout(Duration::from_millis(200), raw.stream.write_all(&bytes));
        if send.await.is_err() {
            break;
        }
    }
    fixture.connection().await.counters().requests - before
}

#[tokio::test]
async fn payloads_in_flight_are_bounded_per_connection() {
    let fault = Fault::new(Memory::new("memory", 4 * MIB));
    let config = ServerConfig::default().connection_bytes_max(4 * MIB);
    let fixture = Fixture::device_with(fault.clone(), config).await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Write).forever());
    let count = started(&fixture, &mut raw, 10, 1 << 20).await;
    assert_eq!(count, 3, "three fit with their headers");
    assert!(fixture.server.bytes_in_flight() <= 4 * MIB);
    hang.release();
    drop(raw);
    until(|| fixture.server.connections().is_empty().then_some(())).await;
    assert_eq!(fixture.server.bytes_in_flight(), 0);
}

#[tokio::test]
async fn what_is_read_ahead_counts_for_what_it_holds() {
    let fault = Fault::new(Memory::new("memory", 4 * MIB));
    let config = ServerConfig::default().connection_bytes_max(4 * MIB);
    let fixture = Fixture::device_with(fault.clone(), config).await;
    let mut raw = fixture.session(false).await;
    let hang = fault.hang(Rule::new(Operation::Read).forever());
    for cookie in 0..20 {
        raw.request(request(Command::CACHE, cookie, 0, 1 << 20), &[]).await;
    }
    let connection = fixture.connection().await;
    until(|| (connection.counters().requests >= 3).then_some(())).await;
    // One after the other is taken in one go.
    assert_eq!(connection.counters().requests, 3, "three fit");
    hang.release();
    for _ in 0..20 {
        assert_eq!(raw.simple().await.0, Errno::OK);
    }
}

#[tokio::test]
async fn a_single_request_larger_than_the_limit_is_let_in() {
    let config = ServerConfig::default().connection_bytes_max(1000).server_bytes_max(1000);
    let fixture = Fixture::device_with(Memory::new("memory", 4 * MIB), config).await;
    let mut raw = fixture.session(false).await;
    assert_eq!(raw.write(0, &[3; 1 << 20]).await, Errno::OK);
    assert_eq!(raw.read(5, 1 << 20).await.len(), 1 << 20);
}

#[tokio::test]
async fn those_that_hold_much_leave_room_for_those_that_hold_little() {
    let fault = Fault::new(Memory::new("memory", 4 * MIB));
    let config = ServerConfig::default().server_bytes_max(16 * MIB);
    let fixture = Fixture::device_with(fault.clone(), config).await;
    let hang = fault.hang(Rule::new(Operation::Write).range(0..MIB).forever());
    let mut greedy = Vec::new();
    for _ in 0..4 {
        let mut raw = fixture.session(false).await;
        let count = started(&fixture, &mut raw, 20, 1 << 20).await;
        assert!(count >= 1);
        greedy.push(raw);
    }
    assert!(fixture.server.bytes_in_flight() <= 17 * MIB);
    let mut modest = fixture.session(false).await;
    assert_eq!(modest.write(2 * MIB, &[3; 4096]).await, Errno::OK);
    assert_eq!(modest.read(2 * MIB, 4096).await, [3; 4096]);
    hang.release();
}

#[tokio::test]
async fn an_idle_connection_is_served_again_after_a_very_large_write() {
    let fixture = Fixture::device(Memory::new("memory", 64 * MIB)).await;
    let mut raw = fixture.session(false).await;
    for _ in 0..3 {
        assert_eq!(raw.write(7, &vec![9; 20 << 20]).await, Errno::OK);
        assert_eq!(raw.write(7, b"small").await, Errno::OK);
        assert_eq!(raw.read(6, 7).await, b"\0small\x09");
    }
}

/// Of every byte something else; or nothing, and for ever.
#[derive(Debug, Default)]
struct Fine {
    hangs: bool,
    asked: AtomicUsize,
}

impl MetaContext for Fine {
    fn status(&self, offset: u64, _: u64) -> Io<'_, ContextStatus> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.hangs {
            return Io::future(std::future::pending());
        }
        // Three bytes share a state, and are told one by one.
        Io::ok(ContextStatus { len: 1, flags: (offset / 3) as u32 })
    }
}

/// A client that has selected the same context under many names.
async fn selecting(context: &Arc<Fine>, names: usize, config: ServerConfig) -> (Fixture, Raw) {
    let mut export = Export::new("disk", Memory::new("memory", MIB));
    let names: Vec<String> = (0..names).map(|number| format!("x:{number}")).collect();
    for name in &names {
        export = export.context(name, Arc::clone(context) as _);
    }
    let exports = StaticExports::new();
    exports.add(export);
    let fixture = Fixture::serve(Arc::new(exports), config).await;
    let mut raw = fixture.client().await;
    raw.structured().await;
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    raw.option(OptionCode::SET_META_CONTEXT, &meta_data("disk", &names)).await;
    raw.go("disk").await;
    (fixture, raw)
}

#[tokio::test]
async fn a_block_status_counts_for_what_it_may_answer() {
    let context = Arc::new(Fine { hangs: true, ..Fine::default() });
    let config = ServerConfig::default().connection_bytes_max(4 * MIB);
    let (fixture, mut raw) = selecting(&context, 100, config).await;
    for cookie in 0..64 {
        raw.request(request(Command::BLOCK_STATUS, cookie, 0, 4096), &[]).await;
    }
    let in_flight = || fixture.server.bytes_in_flight();
    until(|| (in_flight() > 3 * MIB).then_some(())).await;
    // 100 contexts of 1024 extents of 16 bytes, twice.
    assert!((3 * MIB..4 * MIB).contains(&in_flight()), "{}", in_flight());
    tokio::task::yield_now().await;
    assert_eq!(context.asked.load(Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_block_status_of_many_contexts_ends_soon_and_leaves_the_thread_to_others() {
    let context = Arc::new(Fine::default());
    let (_fixture, mut raw) = selecting(&context, 8, ServerConfig::default()).await;
    let asked = {
        let context = Arc::clone(&context);
        move || context.asked.load(Ordering::SeqCst)
    };
    let others = tokio::spawn({
        let asked = asked.clone();
        async move {
            let mut seen = BTreeSet::new();
            while asked() < 4096 {
                seen.insert(asked());
                tokio::task::yield_now().await;
            }
            seen.len()
        }
    });
    raw.request(request(Command::BLOCK_STATUS, 1, 0, 1 << 20), &[]).await;
    for _ in 0..8 {
        // 512 questions each, three about every extent.
        let (_, payload) = raw.chunk().await;
        assert_eq!(payload.len(), 4 + 8 * 512_usize.div_ceil(3));
    }
    assert_eq!(asked(), 4096);
    let turns = within(others).await.unwrap();
    assert!(turns > 10, "others had {turns} turns");
}
