use std::future::Future;
use std::task::{Context, Poll, Waker};

use brep_block::{Io, Result};

/// Polls an operation once at once. It is not detached: dropping it must be harmless.
pub(crate) fn inline<'a, T>(operation: impl Future<Output = Result<T>> + Send + 'a) -> Io<'a, T> {
    let mut operation = Box::pin(operation);
    // The waker of this first poll is of no use: whoever awaits the result polls again.
    match operation.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Io::Ready(output),
        Poll::Pending => Io::Pending(operation),
    }
}
