//! Operations that go on without their callers, and what an `Io` is.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Waker};

use brep_block::{Error, ErrorKind, Io, Operation, detach, start};
use tokio::sync::oneshot;

fn failure() -> Error {
    Error::new(Operation::Read, ErrorKind::Io, "disk", "broken")
}

#[tokio::test]
async fn an_operation_ends_although_its_caller_has_gone() {
    let (go, wait) = oneshot::channel::<()>();
    let (ended, end) = oneshot::channel();
    {
        let mut operation = pin!(detach(async move {
            wait.await.unwrap();
            ended.send(7).unwrap();
        }));
        let poll = operation.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        assert!(poll.is_pending());
    }
    go.send(()).unwrap();
    assert_eq!(end.await, Ok(7));
}

#[tokio::test]
async fn what_the_operation_holds_is_released_by_its_end_only() {
    let held = Arc::new(());
    let (go, wait) = oneshot::channel::<()>();
    let operation = start({
        let held = Arc::clone(&held);
        async move {
            wait.await.unwrap();
            drop(held);
            Ok(())
        }
    });
    drop(operation);
    tokio::task::yield_now().await;
    assert_eq!(Arc::strong_count(&held), 2, "released by its caller");
    go.send(()).unwrap();
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert_eq!(Arc::strong_count(&held), 1);
}

#[test]
fn what_ends_at_once_needs_no_runtime() {
    let mut operation = pin!(detach(async { 3 }));
    let poll = operation.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    assert_eq!(poll, std::task::Poll::Ready(3));
    assert!(matches!(start(async { Ok(3) }), Io::Ready(Ok(3))));
    assert!(matches!(start::<(), _>(async { Err(failure()) }), Io::Ready(Err(_))));
}

#[tokio::test]
async fn an_eager_operation_starts_before_it_is_polled() {
    let done = Arc::new(AtomicBool::new(false));
    let io = start({
        let done = Arc::clone(&done);
        async move {
            tokio::task::yield_now().await;
            done.store(true, Ordering::Relaxed);
            Ok(())
        }
    });
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    assert!(done.load(Ordering::Relaxed));
    io.await.unwrap();
}

#[tokio::test]
#[should_panic(expected = "the operation's own panic")]
async fn a_panic_reaches_the_caller() {
    detach(async {
        tokio::task::yield_now().await;
        panic!("the operation's own panic");
    })
    .await
}

#[tokio::test]
async fn an_io_gives_its_result_whether_ready_or_pending() {
    assert_eq!(Io::ok(1).await.unwrap(), 1);
    assert_eq!(Io::<()>::err(failure()).await.unwrap_err().detail(), "broken");
    assert_eq!(Io::future(async { Ok(2) }).await.unwrap(), 2);
    let late = Io::future(async {
        tokio::task::yield_now().await;
        Err::<(), _>(failure())
    });
    assert_eq!(late.await.unwrap_err().kind(), ErrorKind::Io);
}

#[test]
#[should_panic(expected = "polled after completion")]
fn an_io_polled_after_its_end_panics() {
    let mut io = pin!(Io::ok(()));
    for _ in 0..2 {
        let _ = io.as_mut().poll(&mut Context::from_waker(Waker::noop()));
    }
}
