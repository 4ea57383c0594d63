use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use brep_block::{Io, Result};

/// Completes operations that have been called already, all at the same time. The results are in
/// the order of the operations.
pub(crate) async fn join<T>(operations: Vec<Io<'_, T>>) -> Vec<Result<T>> {
    let mut operations: Vec<_> =
        operations.into_iter().map(|io| Slot { io, result: None }).collect();
    poll_fn(|cx| {
        let mut all = true;
        for slot in &mut operations {
            all &= slot.poll(cx);
        }
        if all { Poll::Ready(()) } else { Poll::Pending }
    })
    .await;
    operations.into_iter().filter_map(|slot| slot.result).collect()
}

struct Slot<'a, T> {
    io: Io<'a, T>,
    result: Option<Result<T>>,
}

impl<T> Slot<'_, T> {
    /// Whether it has ended.
    fn poll(&mut self, cx: &mut Context<'_>) -> bool {
        if self.result.is_none()
            && let Poll::Ready(result) = Pin::new(&mut self.io).poll(cx)
        {
            self.result = Some(result);
        }
        self.result.is_some()
    }
}

/// Polls an operation once at once. It is not detached: dropping it must be harmless.
pub(crate) fn inline<'a, T>(operation: impl Future<Output = Result<T>> + Send + 'a) -> Io<'a, T> {
    let mut operation = Box::pin(operation);
    // The waker of this first poll is of no use: whoever awaits the result polls again.
    match operation.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Io::Ready(output),
        Poll::Pending => Io::Pending(operation),
    }
}
