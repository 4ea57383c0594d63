//! Who is let in when many come, and what a crowd costs the others.

mod server_support;

use std::sync::Arc;
use std::time::Duration;

use brep_block::{BlockDevice, Count, Memory, Operation, WriteFlags};
use brep_nbd::Endpoint;
use brep_nbd::proto::wire::{Command, Errno, OptionCode, ReplyType};
use brep_nbd::server::{Server, ServerConfig};
use server_support::{Fixture, Raw, SIZE, info_data, request, request_bytes, until, within};

const MIB: u64 = 1 << 20;

#[tokio::test]
async fn more_clients_than_allowed_wait_until_one_leaves() {
    let config = ServerConfig::default().connections_max(2);
    let fixture = Fixture::device_with(Memory::new("memory", SIZE), config).await;
    let first = fixture.session(false).await;
    let mut second = fixture.session(false).await;
    let mut third = fixture.client().await;
    // It may ask, but not come in.
    assert_eq!(third.outcome(OptionCode::INFO, &info_data("disk", &[])).await, ReplyType::ACK);
    third.send(&server_support::option_bytes(OptionCode::GO, &info_data("disk", &[]))).await;
    assert_eq!(second.read(0, 1).await, [0]);
    let mut byte = [0];
    let answer = tokio::io::AsyncReadExt::read(&mut third.stream, &mut byte);
    assert!(tokio::time::timeout(Duration::from_millis(50), answer).await.is_err());
    drop(first);
    let replies = third.replies(OptionCode::GO).await;
    assert_eq!(replies.last().map(|(kind, _)| *kind), Some(ReplyType::ACK));
    assert_eq!(third.read(0, 1).await, [0]);
}

#[tokio::test]
async fn a_listener_that_nobody_connects_to_takes_no_slot() {
    let config = ServerConfig::default().connections_max(1);
    let fixture = Fixture::device_with(Memory::new("memory", SIZE), config).await;
    let path = fixture.path.with_extension("second");
    let listener = Server::bind(&Endpoint::Unix { path: path.clone() }).await.expect("a socket");
    let server = Arc::clone(&fixture.server);
    tokio::spawn(async move { server.serve(listener).await });
    for _ in 0..2 {
        for path in [&fixture.path, &path] {
            let stream = tokio::net::UnixStream::connect(path).await.expect("a connection");
            let mut raw = Raw { stream };
            raw.greet().await;
            raw.go("disk").await;
            assert_eq!(raw.read(0, 1).await, [0]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn half_open_strangers_make_room_for_the_next_client_oldest_first() {
    let config = ServerConfig::default().handshakes_max(3);
    let fixture = Fixture::device_with(Memory::new("memory", SIZE), config).await;
    let mut strangers = Vec::new();
    for _ in 0..3 {
        let mut stranger = fixture.connect().await;
        stranger.greeting().await;
        strangers.push(stranger);
    }
    let started = tokio::time::Instant::now();
    let mut good = fixture.session(false).await;
    assert_eq!(good.read(0, 1).await, [0]);
    let waited = started.elapsed();
    assert!((900..1100).contains(&waited.as_millis()), "each has its second: {waited:?}");
    assert!(strangers.remove(0).is_closed().await);
    // The others have room again, now that the good one is in.
    for stranger in &mut strangers {
        stranger.send(&[0, 0, 0, 3]).await;
        stranger.go("disk").await;
        assert_eq!(stranger.read(0, 1).await, [0]);
    }
}

#[tokio::test(start_paused = true)]
async fn who_waits_for_a_slot_is_not_pushed_aside_by_strangers() {
    let config = ServerConfig::default().connections_max(1).handshakes_max(2);
    let fixture = Fixture::device_with(Memory::new("memory", SIZE), config).await;
    let user = fixture.session(false).await;
    let mut waiting = fixture.client().await;
    waiting.send(&server_support::option_bytes(OptionCode::GO, &info_data("disk", &[]))).await;
    let mut strangers = Vec::new();
    for _ in 0..5 {
        let mut stranger = fixture.connect().await;
        stranger.greeting().await;
        strangers.push(stranger);
    }
    drop(user);
    let replies = waiting.replies(OptionCode::GO).await;
    assert_eq!(replies.last().map(|(kind, _)| *kind), Some(ReplyType::ACK));
}

/// Enough descriptors for both ends of many connections.
fn may_open_many_files(test: &str) -> bool {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let enough = limit.maximum.is_none_or(|max| max >= 4000)
        && setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, ..limit }).is_ok();
    if !enough {
        eprintln!("SKIP: {test}: at least 4000 open files not found");
    }
    enough
}

/// Idle clients, half-open ones, and one that takes none of its replies.
struct Crowd(#[allow(dead_code)] Vec<Raw>);

impl Crowd {
    const LEN: usize = 1101;

    async fn gather(fixture: &Fixture) -> Self {
        let mut crowd = Vec::new();
        for _ in 0..1000 {
            crowd.push(fixture.session(false).await);
        }
        for index in 0..100 {
            let mut half_open = fixture.connect().await;
            half_open.send(&[0, 0, 0, 3, b'I'][..index % 6]).await;
            crowd.push(half_open);
        }
        let mut deaf = fixture.session(false).await;
        for cookie in 0..64 {
            let bytes = request_bytes(request(Command::READ, cookie, 0, 1 << 20), &[]);
            deaf.send(&bytes).await;
        }
        crowd.push(deaf);
        Crowd(crowd)
    }
}

async fn full(size: u64) -> Arc<Count> {
    let memory = Memory::new("memory", size);
    memory.write(0, vec![1; 32 << 20].into(), WriteFlags::default()).await.expect("written");
    Count::new(memory)
}

#[tokio::test]
async fn a_crowd_of_idle_half_open_and_deaf_clients_costs_little_and_delays_nobody() {
    let test = "a_crowd_of_idle_half_open_and_deaf_clients_costs_little_and_delays_nobody";
    if !may_open_many_files(test) {
        return;
    }
    let count = full(64 * MIB).await;
    let fixture = Fixture::device(count.clone()).await;
    let crowd = Crowd::gather(&fixture).await;
    let read =
        until(|| Some(count.of(Operation::Read).operations).filter(|count| *count > 0)).await;
    assert_eq!(fixture.server.connections().len(), Crowd::LEN);

    // Each answer is awaited before the next request: none waits for the crowd.
    let mut good = fixture.session(false).await;
    for index in 0..1000_u64 {
        assert_eq!(good.write(40 * MIB + index, &[index as u8]).await, Errno::OK);
        assert_eq!(good.read(40 * MIB + index, 1).await, [index as u8]);
    }
    let for_the_deaf = count.of(Operation::Read).operations - 1000;
    assert!(read <= for_the_deaf && for_the_deaf <= 4, "{for_the_deaf} MiB were read for nobody");
    assert!(fixture.server.bytes_in_flight() <= 4 * MIB);
    drop(crowd);
    until(|| (fixture.server.connections().len() == 1).then_some(())).await;
    assert_eq!(fixture.server.bytes_in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_thousand_half_open_strangers_keep_nobody_out() {
    let test = "a_thousand_half_open_strangers_keep_nobody_out";
    if !may_open_many_files(test) {
        return;
    }
    let fixture = Fixture::device(Memory::new("memory", SIZE)).await;
    let mut strangers = Vec::new();
    for _ in 0..1024 {
        strangers.push(fixture.connect().await);
    }
    let mut good = within(fixture.session(false)).await;
    assert_eq!(good.read(0, 1).await, [0]);
    assert!(fixture.server.connections().len() <= 257, "more handshakes at a time than allowed");
}

/// Median latency of one client's reads, in the crowd and alone, in interleaved rounds: 1.5 times at
/// most. Long, because of the wall clock.
#[test]
fn the_crowd_does_not_slow_a_client_down() {
    let test = "the_crowd_does_not_slow_a_client_down";
    if std::env::var_os("BREP_LONG").is_none() || !may_open_many_files(test) {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let fixture = Fixture::device(full(64 * MIB).await).await;
        let (mut alone, mut crowded) = (Vec::new(), Vec::new());
        for _ in 0..5 {
            let mut good = fixture.session(false).await;
            alone.push(median_us(&mut good).await);
            let crowd = Crowd::gather(&fixture).await;
            crowded.push(median_us(&mut good).await);
            drop(crowd);
            until(|| (fixture.server.connections().len() == 1).then_some(())).await;
        }
        let (alone, crowded) = (median(alone), median(crowded));
        println!("4 KiB read, depth 1: alone {alone:.1} us, in the crowd {crowded:.1} us");
        assert!(crowded <= 1.5 * alone, "alone {alone:.1} us, in the crowd {crowded:.1} us");
    });
}

async fn median_us(raw: &mut Raw) -> f64 {
    let mut times = Vec::new();
    for index in 0..5000 {
        let start = std::time::Instant::now();
        raw.read(index * 4096, 4096).await;
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    median(times)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
