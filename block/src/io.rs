use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use crate::Result;

/// The outcome of a device operation: known at once, or later.
///
/// A request that can finish inline (a page-cache hit, a buffered write) returns
/// [`Io::Ready`] and costs neither an allocation nor a wake-up. Everything else returns a boxed
/// future. `Io` is itself a future, so a caller that does not care just awaits it.
///
/// Creating an `Io` may start the operation; polling it to the end completes it. Dropping a
/// pending `Io` leaves the range in an undefined state: the operation may have happened wholly,
/// partly or not at all, and may still be going on. Callers that cannot promise to poll to the
/// end use [`detach`](crate::detach).
#[must_use = "an operation is complete only when it has been polled to its end"]
pub enum Io<'a, T> {
    /// The operation has ended.
    Ready(Result<T>),
    /// The operation needs to be polled.
    Pending(Pin<Box<dyn Future<Output = Result<T>> + Send + 'a>>),
    /// The result has been taken; polling again panics, as for every completed future.
    Taken,
}

impl<'a, T> Io<'a, T> {
    /// An operation that has succeeded already.
    pub fn ok(value: T) -> Self {
        Io::Ready(Ok(value))
    }

    /// An operation that has failed already.
    pub fn err(error: crate::Error) -> Self {
        Io::Ready(Err(error))
    }

    /// An operation that a future completes.
    pub fn future(future: impl Future<Output = Result<T>> + Send + 'a) -> Self {
        Io::Pending(Box::pin(future))
    }
}

impl<T> From<Result<T>> for Io<'_, T> {
    fn from(result: Result<T>) -> Self {
        Io::Ready(result)
    }
}

// `T` is never pinned: it only moves out of `Ready`.
impl<T> Unpin for Io<'_, T> {}

impl<T> Future for Io<'_, T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        if let Io::Pending(future) = &mut *self {
            let output = std::task::ready!(future.as_mut().poll(cx));
            *self = Io::Taken;
            return Poll::Ready(output);
        }
        match std::mem::replace(&mut *self, Io::Taken) {
            Io::Ready(result) => Poll::Ready(result),
            Io::Pending(_) | Io::Taken => panic!("`Io` polled after completion"),
        }
    }
}

impl<T> std::fmt::Debug for Io<'_, T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Io::Ready(Ok(_)) => "Io::Ready(Ok)",
            Io::Ready(Err(_)) => "Io::Ready(Err)",
            Io::Pending(_) => "Io::Pending",
            Io::Taken => "Io::Taken",
        })
    }
}
