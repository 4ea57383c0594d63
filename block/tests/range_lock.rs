//! Range locks: order, sharing, waiters that give up, and agreement with a model.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use brep_block::{LockMode, RangeGuard, RangeLock};
use proptest::prelude::*;

type Waiting = Pin<Box<dyn Future<Output = RangeGuard> + Send>>;

fn ask(lock: &RangeLock, range: std::ops::Range<u64>, mode: LockMode) -> Waiting {
    Box::pin(lock.lock(range, mode))
}

fn poll(waiting: &mut Waiting) -> Option<RangeGuard> {
    match waiting.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(guard) => Some(guard),
        Poll::Pending => None,
    }
}

use LockMode::{Exclusive, Shared};

#[test]
fn overlapping_requests_are_granted_in_the_order_of_asking() {
    let lock = RangeLock::new();
    let mut first = ask(&lock, 0..10, Exclusive);
    let mut second = ask(&lock, 5..15, Exclusive);
    let mut third = ask(&lock, 12..20, Exclusive);
    assert!(poll(&mut third).is_none(), "the second comes before it, although it waits itself");
    let guard = poll(&mut first).expect("nobody came before");
    drop(guard);
    assert!(poll(&mut third).is_none());
    let guard = poll(&mut second).expect("the first has ended");
    assert!(poll(&mut third).is_none());
    drop(guard);
    assert!(poll(&mut third).is_some());
}

#[test]
fn ranges_that_touch_do_not_overlap() {
    let lock = RangeLock::new();
    let _first = lock.try_lock(0..10, Exclusive).unwrap();
    let _second = lock.try_lock(10..20, Exclusive).unwrap();
    assert!(lock.try_lock(9..10, Shared).is_none());
    assert!(lock.try_lock(5..5, Exclusive).is_some(), "an empty range overlaps nothing");
}

#[test]
fn readers_share_and_do_not_overtake_a_waiting_writer() {
    let lock = RangeLock::new();
    let reader = lock.try_lock(0..10, Shared).unwrap();
    let second = lock.try_lock(0..10, Shared).expect("readers share");
    let mut writer = ask(&lock, 0..10, Exclusive);
    let mut late = ask(&lock, 0..10, Shared);
    assert!(poll(&mut writer).is_none());
    assert!(poll(&mut late).is_none(), "or the writer would starve");
    drop(reader);
    assert!(poll(&mut writer).is_none(), "one reader is left");
    drop(second);
    let writer = poll(&mut writer).unwrap();
    assert!(poll(&mut late).is_none());
    drop(writer);
    assert!(poll(&mut late).is_some());
}

#[test]
fn a_dropped_waiter_no_longer_stands_in_the_way() {
    let lock = RangeLock::new();
    let holder = lock.try_lock(0..10, Exclusive).unwrap();
    let waiter = ask(&lock, 5..20, Exclusive);
    let mut last = ask(&lock, 15..30, Exclusive);
    assert!(poll(&mut last).is_none());
    drop(waiter);
    assert!(poll(&mut last).is_some());
    drop(holder);
    assert!(lock.try_lock(0..u64::MAX, Exclusive).is_some(), "nothing is left behind");
}

#[test]
fn a_granted_waiter_that_is_dropped_unpolled_releases() {
    let lock = RangeLock::new();
    let holder = lock.try_lock(0..10, Exclusive).unwrap();
    let waiter = ask(&lock, 0..10, Exclusive);
    drop(holder);
    assert!(lock.try_lock(0..10, Exclusive).is_none(), "it was granted to the waiter");
    drop(waiter);
    assert!(lock.try_lock(0..10, Exclusive).is_some());
}

#[tokio::test]
async fn a_waiting_task_is_woken() {
    let lock = RangeLock::new();
    let guard = lock.lock(0..10, Exclusive).await;
    let task = tokio::spawn(lock.lock(0..10, Exclusive));
    tokio::task::yield_now().await;
    drop(guard);
    let guard = task.await.unwrap();
    assert!(lock.try_lock(0..10, Shared).is_none(), "held by the task");
    drop(guard);
}

/// What a request is in the model: it may hold once no earlier request conflicts.
struct Modelled {
    range: std::ops::Range<u64>,
    mode: LockMode,
    state: State,
}

enum State {
    Waiting(Waiting),
    Held { _guard: RangeGuard },
}

fn conflict(a: &Modelled, b: &Modelled) -> bool {
    a.range.start < b.range.end
        && b.range.start < a.range.end
        && (a.mode == Exclusive || b.mode == Exclusive)
}

#[derive(Debug, Clone)]
enum Step {
    Ask(u64, u64, bool),
    Drop(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u64..60, 1_u64..30, any::<bool>()).prop_map(|(s, l, x)| Step::Ask(s, l, x)),
        2 => any::<usize>().prop_map(Step::Drop),
    ]
}

proptest! {
    #[test]
    fn who_holds_is_who_the_model_says(steps in prop::collection::vec(step(), 1..80)) {
        let lock = RangeLock::new();
        let mut requests: Vec<Modelled> = Vec::new();
        for step in steps {
            match step {
                Step::Ask(start, len, exclusive) => {
                    let (range, mode) = (start..start + len, if exclusive { Exclusive } else { Shared });
                    let state = State::Waiting(ask(&lock, range.clone(), mode));
                    requests.push(Modelled { range, mode, state });
                }
                Step::Drop(index) if !requests.is_empty() => {
                    let index = index % requests.len();
                    requests.remove(index);
                }
                Step::Drop(_) => {}
            }
            for index in 0..requests.len() {
                let (earlier, rest) = requests.split_at_mut(index);
                let request = &mut rest[0];
                let expected = !earlier.iter().any(|other| conflict(other, request));
                if let State::Waiting(waiting) = &mut request.state
                    && let Some(guard) = poll(waiting)
                {
                    request.state = State::Held { _guard: guard };
                }
                let held = matches!(&request.state, State::Held { .. });
                prop_assert_eq!(held, expected, "request {} of {}", index, requests.len());
            }
        }
    }
}
