use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use brep_block::{Io, Result};

/// Starts an operation that holds locks. It is polled once inline; if it is then still pending it
/// becomes a task, which runs to its end whatever happens to the returned `Io`.
///
/// # Panics
/// Outside a tokio runtime, if the operation does not complete at once.
pub(crate) fn start<T: Send + 'static>(
    operation: impl Future<Output = Result<T>> + Send + 'static,
) -> Io<'static, T> {
    let operation = match poll_once(Box::pin(operation)) {
        Ok(output) => return Io::Ready(output),
        Err(operation) => operation,
    };
    let task = tokio::spawn(operation);
    Io::future(async move {
        match task.await {
            Ok(output) => output,
            Err(error) => match error.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // A runtime that is shutting down cancels its tasks: nobody is left to answer.
                Err(_) => std::future::pending().await,
            },
        }
    })
}

/// Polls an operation once inline. It is not detached: dropping it must be harmless.
pub(crate) fn inline<'a, T>(operation: impl Future<Output = Result<T>> + Send + 'a) -> Io<'a, T> {
    match poll_once(Box::pin(operation)) {
        Ok(output) => Io::Ready(output),
        Err(operation) => Io::Pending(operation),
    }
}

type Boxed<F> = Pin<Box<F>>;

fn poll_once<F: Future>(mut operation: Boxed<F>) -> std::result::Result<F::Output, Boxed<F>> {
    // The waker of this first poll is of no use: whoever takes over polls again.
    match operation.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => Err(operation),
    }
}
