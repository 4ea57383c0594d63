//! A connection against a server that follows a script: order, limits, deadlines, and every way
//! of being lost. Nothing pending may ever hang, and no error may get lost.

mod client_support;

use std::time::Duration;

use brep_block::{BlockDevice, ErrorKind, FlushLevel, Io, Result, WriteFlags};
use brep_nbd::client::{ClientError, Connection, connect_private};
use brep_nbd::proto::client::{HandshakeError, ReplyError};
use brep_nbd::proto::wire::{
    ChunkType, Command, Errno, INIT_MAGIC, OPTION_MAGIC, OptionCode, PRIVATE_OPTION_BASE,
    RequestHeader, SimpleReply,
};
use bytes::Bytes;
use client_support::pair::{PATIENCE, Pair, kind, pair, soon, write};
use client_support::pattern;
use client_support::scripted::{Export, Listener, Server};
use futures_util::future::join_all;
use futures_util::join;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn the_order_of_the_calls_is_the_order_on_the_wire() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |options| {
        options.in_flight_max = 4;
        options.in_flight_bytes_max = 2048;
    })
    .await;
    let mut pending = Vec::new();
    for index in 0..50u64 {
        let data = pattern(100 + (index as usize * 37) % 1500, index);
        pending.push(write(&disk, index << 20, &data));
        pending.push(disk.start_discard(index << 20, 4096));
    }
    // None of them has been polled. The last ones are polled first.
    pending.reverse();
    let all = tokio::spawn(join_all(pending));
    for index in 0..50u64 {
        let (header, payload) = soon(server.expect_request()).await;
        assert_eq!((header.command, header.offset), (Command::WRITE, index << 20));
        assert_eq!(payload, pattern(100 + (index as usize * 37) % 1500, index));
        server.simple(header.cookie, Errno::OK, &[]).await;
        let (header, _) = soon(server.expect_request()).await;
        assert_eq!((header.command, header.offset), (Command::TRIM, index << 20));
        server.simple(header.cookie, Errno::OK, &[]).await;
    }
    assert!(soon(all).await.expect("no panic").iter().all(Result::is_ok));
}

#[tokio::test]
async fn an_operation_that_was_dropped_is_carried_out_and_its_reply_consumed() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
    for index in 0..10 {
        drop(write(&disk, index * 512, &[1; 512]));
        drop(disk.start_read(index * 512, 512));
    }
    let last = disk.start_read(1 << 20, 4);
    let (answer, ()) = join!(last, async {
        for index in 0..10 {
            let (header, _) = soon(server.expect_request()).await;
            assert_eq!((header.command, header.offset), (Command::WRITE, index * 512));
            server.simple(header.cookie, Errno::EIO, &[]).await;
            let (header, _) = soon(server.expect_request()).await;
            server.simple(header.cookie, Errno::OK, &[0; 512]).await;
        }
        let (header, _) = soon(server.expect_request()).await;
        server.simple(header.cookie, Errno::OK, b"last").await;
    });
    assert_eq!(answer.expect("read"), "last");
    assert_eq!(disk.oldest_request_age(), None);
}

/// CVE-2022-0485: a copying client ignored the error of one of many concurrent reads.
#[tokio::test]
async fn cve_2022_0485_the_error_of_one_among_many_requests_reaches_its_caller_and_no_other() {
    for structured in [false, true] {
        for failing in [0, 1, 17, 30, 31] {
            let export = Export { structured, ..Export::default() };
            let Pair { disk, mut server, .. } = pair(export, |_| {}).await;
            let reads: Vec<_> = (0..32).map(|index| disk.start_read(index * 4096, 4096)).collect();
            let answering = async {
                let mut requests = Vec::new();
                for _ in 0..32 {
                    requests.push(soon(server.expect_request()).await.0);
                }
                // Last come, first served.
                for header in requests.into_iter().rev() {
                    let fails = header.offset == failing * 4096;
                    answer_read(&mut server, &header, structured, fails).await;
                }
            };
            let (results, ()) = join!(join_all(reads), answering);
            for (index, result) in results.into_iter().enumerate() {
                if index as u64 == failing {
                    let error = result.expect_err("this one failed");
                    assert_eq!(error.kind(), ErrorKind::NoSpace);
                    assert_eq!((error.offset(), error.length()), (failing * 4096, 4096));
                } else {
                    assert_eq!(result.expect("read"), vec![index as u8; 4096]);
                }
            }
        }
    }
}

async fn answer_read(server: &mut Server, header: &RequestHeader, structured: bool, fails: bool) {
    let data = vec![(header.offset / 4096) as u8; header.len as usize];
    match (structured, fails) {
        (false, true) => server.simple(header.cookie, Errno::ENOSPC, &[]).await,
        (false, false) => server.simple(header.cookie, Errno::OK, &data).await,
        (true, _) => {
            let half = data.len() / 2;
            let second = header.offset + half as u64;
            let chunk = [&header.offset.to_be_bytes()[..], &data[..half]].concat();
            server.chunk(header.cookie, ChunkType::OFFSET_DATA, false, &chunk).await;
            if fails {
                let error = [0, 0, 0, 28, 0, 4, b'f', b'u', b'l', b'l'];
                server.chunk(header.cookie, ChunkType::ERROR, false, &error).await;
            }
            let chunk = [&second.to_be_bytes()[..], &data[half..]].concat();
            server.chunk(header.cookie, ChunkType::OFFSET_DATA, false, &chunk).await;
            server.chunk(header.cookie, ChunkType::NONE, true, &[]).await;
        }
    }
}

#[tokio::test]
async fn a_server_that_dies_at_any_byte_of_a_reply_fails_everything_pending() {
    // A reply to the first of two reads, then one to the second; the server dies in between.
    for cut in 0..2 * (16 + 64) {
        let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
        let reads = [disk.start_read(0, 64), disk.start_read(64, 64)];
        let dying = async {
            let mut replies = Vec::new();
            for _ in 0..2 {
                let (header, _) = soon(server.expect_request()).await;
                replies.extend_from_slice(&0x6744_6698u32.to_be_bytes());
                replies.extend_from_slice(&[0; 4]);
                replies.extend_from_slice(&header.cookie.to_be_bytes());
                replies.extend_from_slice(&[7; 64]);
            }
            server.send(&replies[..cut]).await;
            drop(server);
        };
        let (results, ()) = soon(async { join!(join_all(reads), dying) }).await;
        for (index, result) in results.into_iter().enumerate() {
            if cut >= (index + 1) * 80 {
                assert_eq!(result.expect("it came whole"), vec![7; 64]);
            } else {
                assert_eq!(kind(result), ErrorKind::NotConnected, "cut at {cut}");
            }
        }
        let reason = soon(disk.failed()).await;
        assert!(matches!(reason, ClientError::ClosedByServer { .. } | ClientError::Lost { .. }));
        assert_eq!(kind(disk.read(0, 1).await), ErrorKind::NotConnected);
        assert_eq!(kind(disk.flush(FlushLevel::Process).await), ErrorKind::NotConnected);
    }
}

#[tokio::test]
async fn a_server_that_dies_while_requests_are_being_sent_fails_them_all() {
    let Pair { disk, server, .. } = pair(Export::default(), |_| {}).await;
    // More than fits into the socket and into the limits.
    let data = Bytes::from(vec![1; 1 << 20]);
    let writes: Vec<_> =
        (0..100).map(|i| disk.start_write(i << 20, data.clone(), WriteFlags::default())).collect();
    tokio::task::yield_now().await;
    drop(server);
    for result in soon(join_all(writes)).await {
        assert_eq!(kind(result), ErrorKind::NotConnected);
    }
}

/// The next request meets a closed socket before the replies that lie there have been looked at.
#[tokio::test]
async fn what_a_server_answered_before_it_went_is_told_although_nothing_can_be_sent_any_more() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
    let first = write(&disk, 0, &[1; 512]);
    let flush = disk.start_flush(FlushLevel::Durable);
    let mut requests = Vec::new();
    for _ in 0..2 {
        requests.push(soon(server.expect_request()).await.0);
    }
    server.simple(requests[0].cookie, Errno::OK, &[]).await;
    server.simple(requests[1].cookie, Errno::EIO, &[]).await;
    drop(server);
    let late = write(&disk, 512, &[2; 512]);
    soon(first).await.expect("answered");
    assert_eq!(kind(soon(flush).await), ErrorKind::Io);
    assert!(disk.flush_has_failed());
    assert_eq!(kind(soon(late).await), ErrorKind::NotConnected);
}

#[tokio::test]
async fn a_violation_ends_the_connection_and_is_told() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
    let reads = [disk.start_read(0, 64), disk.start_read(64, 64)];
    let (header, _) = soon(server.expect_request()).await;
    server.simple(header.cookie ^ 1 << 40, Errno::OK, &[0; 64]).await;
    for result in soon(join_all(reads)).await {
        assert_eq!(kind(result), ErrorKind::NotConnected);
    }
    let reason = soon(disk.failed()).await;
    assert!(reason.is_permanent());
    assert!(matches!(reason, ClientError::Violation { source: ReplyError::Cookie(_), .. }));
    // And the server notices.
    while soon(server.request()).await.is_some() {}
}

#[tokio::test(start_paused = true)]
async fn a_request_that_is_not_answered_in_time_fails_the_whole_connection() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |options| {
        options.request_timeout = Duration::from_secs(5);
        options.in_flight_max = 2;
    })
    .await;
    let answered = disk.start_read(0, 4);
    let (answered, ()) = join!(answered, async {
        let (header, _) = server.expect_request().await;
        server.simple(header.cookie, Errno::OK, b"data").await;
    });
    assert_eq!(answered.expect("read"), "data");
    tokio::time::sleep(Duration::from_secs(100)).await;
    assert!(disk.failure().is_none(), "an idle connection does not time out");

    let started = tokio::time::Instant::now();
    // The last two wait in the queue: their time counts, too.
    let pending: Vec<_> = (0..4).map(|i| disk.start_read(i * 512, 512)).collect();
    for result in join_all(pending).await {
        assert_eq!(kind(result), ErrorKind::TimedOut);
    }
    let waited = started.elapsed();
    assert!(
        waited >= Duration::from_secs(5) && waited < Duration::from_secs(6),
        "waited {waited:?}"
    );
    assert!(matches!(disk.failed().await, ClientError::RequestTimedOut { .. }));
    assert_eq!(kind(disk.read(0, 1).await), ErrorKind::TimedOut);
}

#[tokio::test(start_paused = true)]
async fn replies_to_later_requests_do_not_save_one_that_is_stuck() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |options| {
        options.request_timeout = Duration::from_secs(5);
    })
    .await;
    let stuck = disk.start_read(0, 512);
    server.expect_request().await;
    let lively = async {
        for _ in 0..20 {
            let read = disk.start_read(512, 1);
            let answer = async {
                if let Some((header, _)) = server.request().await {
                    let reply = SimpleReply { error: Errno::OK, cookie: header.cookie }.encode();
                    // The client may have given up meanwhile.
                    let _ = server.stream.write_all(&[&reply[..], &[1]].concat()).await;
                }
            };
            let (result, ()) = join!(read, answer);
            if result.is_err() {
                return;
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        panic!("the stuck request is forgotten");
    };
    let (stuck, ()) = join!(stuck, lively);
    assert_eq!(kind(stuck), ErrorKind::TimedOut);
}

#[tokio::test]
async fn the_age_of_the_oldest_request_is_known() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
    assert_eq!(disk.oldest_request_age(), None);
    let first = disk.start_read(0, 1);
    let second = disk.start_read(1, 1);
    let (header, _) = soon(server.expect_request()).await;
    let age = disk.oldest_request_age().expect("two are pending");
    server.simple(header.cookie, Errno::OK, b"x").await;
    soon(first).await.expect("read");
    assert!(disk.oldest_request_age().is_some());
    let (header, _) = soon(server.expect_request()).await;
    server.simple(header.cookie, Errno::OK, b"x").await;
    soon(second).await.expect("read");
    assert_eq!(disk.oldest_request_age(), None);
    assert!(age < PATIENCE);
}

#[tokio::test]
async fn closing_answers_what_is_pending_and_says_goodbye() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |options| {
        options.in_flight_max = 1;
    })
    .await;
    let writes = [write(&disk, 0, b"one"), write(&disk, 512, b"two")];
    disk.close();
    assert_eq!(kind(write(&disk, 0, b"late").await), ErrorKind::NotConnected);
    let (results, ()) = join!(join_all(writes), async {
        for expected in [b"one", b"two"] {
            let (header, payload) = soon(server.expect_request()).await;
            assert_eq!(payload, expected);
            server.simple(header.cookie, Errno::OK, &[]).await;
        }
    });
    assert!(results.iter().all(Result::is_ok));
    assert_eq!(soon(server.expect_request()).await.0.command, Command::DISC);
    assert!(soon(server.request()).await.is_none());
    assert!(matches!(soon(disk.failed()).await, ClientError::Closed { .. }));
}

#[tokio::test]
async fn dropping_the_connection_does_not_take_back_what_was_called() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |_| {}).await;
    let pending = write(&disk, 0, b"one");
    drop(write(&disk, 512, b"two"));
    drop(disk);
    for expected in [b"one", b"two"] {
        let (header, payload) = soon(server.expect_request()).await;
        assert_eq!(payload, expected);
        server.simple(header.cookie, Errno::OK, &[]).await;
    }
    soon(pending).await.expect("written");
    assert_eq!(soon(server.expect_request()).await.0.command, Command::DISC);
}

#[tokio::test]
async fn killing_fails_what_is_pending_at_once_and_sends_nothing_more() {
    let Pair { disk, mut server, .. } = pair(Export::default(), |options| {
        options.in_flight_max = 1;
    })
    .await;
    let writes = [write(&disk, 0, b"one"), write(&disk, 512, b"two")];
    soon(server.expect_request()).await;
    disk.kill();
    for io in writes {
        assert_eq!(kind(soon(io).await), ErrorKind::NotConnected);
    }
    assert!(soon(server.request()).await.is_none());
    assert!(matches!(soon(disk.failed()).await, ClientError::Closed { .. }));
}

#[tokio::test]
async fn the_queue_has_an_end() {
    let Pair { disk, .. } = pair(Export::default(), |options| {
        options.in_flight_max = 1;
        options.queued_max = 10;
        options.queued_bytes_max = 10_000;
    })
    .await;
    let many: Vec<_> = (0..11).map(|i| disk.start_read(i, 1)).collect();
    assert!(matches!(&many[10], Io::Ready(Err(error)) if error.kind() == ErrorKind::Io));
    assert!(many[..10].iter().all(|io| matches!(io, Io::Pending(_))));

    let Pair { disk, .. } = pair(Export::default(), |options| {
        options.queued_bytes_max = 10_000;
    })
    .await;
    let first = write(&disk, 0, &[0; 20_000]);
    let second = write(&disk, 0, &[0; 1]);
    assert!(matches!(first, Io::Pending(_)), "a single write is let through");
    assert!(matches!(second, Io::Ready(Err(_))));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_never_speaks_is_given_up() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    let error = Connection::connect(&options).await.expect_err("nobody answers");
    assert!(matches!(error, ClientError::HandshakeTimedOut { .. }), "{error}");
}

#[tokio::test]
async fn a_server_that_closes_during_the_handshake_is_reported() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    let (error, ()) = join!(Connection::connect(&options), async {
        let mut stream = listener.accept_raw().await;
        stream.write_u64(INIT_MAGIC).await.expect("sent");
    });
    let error = error.expect_err("closed");
    assert!(matches!(error, ClientError::HandshakeClosed { .. }), "{error}");
}

#[tokio::test]
async fn no_server_at_all_is_an_error_that_names_the_address() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let options = listener.options();
    drop(listener);
    let error = Connection::connect(&options).await.expect_err("nobody is there");
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    assert!(error.to_string().contains("scripted.sock"), "{error}");
}

#[tokio::test]
async fn a_private_option_turns_the_connection_into_something_else() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let option = PRIVATE_OPTION_BASE + 1;
    let endpoint = listener.options().endpoint;
    let hello = Bytes::from_static(b"hello");
    let connecting = connect_private(&endpoint, None, option, hello, PATIENCE);
    let (private, mut server) = join!(connecting, async {
        let mut stream = listener.accept_raw().await;
        let mut greeting = [INIT_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
        greeting.extend([0, 3]);
        stream.write_all(&greeting).await.expect("sent");
        let mut asked = [0; 4 + 16 + 5];
        soon(stream.read_exact(&mut asked)).await.expect("the option");
        assert_eq!(asked[20..], *b"hello");
        let mut replies = Vec::new();
        for (kind, data) in [(PRIVATE_OPTION_BASE, &b"welcome"[..]), (1, &[])] {
            replies.extend(0x0003_e889_0455_65a9u64.to_be_bytes());
            replies.extend(option.to_be_bytes());
            replies.extend(kind.to_be_bytes());
            replies.extend((data.len() as u32).to_be_bytes());
            replies.extend(data);
        }
        replies.extend(b"first words");
        stream.write_all(&replies).await.expect("sent");
        stream
    });
    let mut private = private.expect("connected");
    assert_eq!((&private.reply[..], &private.rest[..]), (&b"welcome"[..], &b"first words"[..]));
    private.stream.write_all(b"answer").await.expect("sent");
    let mut answer = [0; 6];
    soon(server.read_exact(&mut answer)).await.expect("received");
    assert_eq!(answer, *b"answer");
}

#[tokio::test]
async fn a_server_that_does_not_know_the_private_option_is_told_apart() {
    let directory = tempfile::tempdir().expect("a directory");
    let listener = Listener::bind(directory.path());
    let mut options = listener.options();
    let number = PRIVATE_OPTION_BASE + 1;
    let plain = connect_private(&options.endpoint, None, number, Bytes::new(), PATIENCE);
    let serving = tokio::spawn(async move {
        // The scripted server refuses what it does not know, and then waits for more.
        loop {
            let mut stream = listener.accept_raw().await;
            tokio::spawn(async move {
                let greeting = [INIT_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat();
                stream.write_all(&greeting).await.expect("sent");
                stream.write_u16(3).await.expect("sent");
                let mut asked = [0; 20];
                stream.read_exact(&mut asked).await.expect("the option");
                let mut reply = 0x0003_e889_0455_65a9u64.to_be_bytes().to_vec();
                reply.extend(&asked[12..16]);
                reply.extend([0x80, 0, 0, 1, 0, 0, 0, 0]);
                stream.write_all(&reply).await.expect("sent");
                stream.read_u8().await
            });
        }
    });
    let error = soon(plain).await.expect_err("unsupported");
    assert!(matches!(error, ClientError::Unsupported { .. }), "{error}");
    options.private_options = vec![(number, Bytes::new())];
    let error = soon(Connection::connect(&options)).await.expect_err("unsupported");
    let ClientError::Handshake { source, .. } = error else { panic!("{error}") };
    assert_eq!(source, HandshakeError::Unsupported(OptionCode(number)));
    serving.abort();
}
