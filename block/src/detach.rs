use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, Waker};

use tokio::task::JoinHandle;

use crate::{Io, Result};

/// Runs an operation to its end, whatever happens to the caller.
///
/// The future is polled once inline. Only if it is still pending is it moved to a task of the
/// current tokio runtime, where it goes on even when the future returned here is dropped. So
/// locks that the operation holds are released by its end and never by its caller's.
///
/// # Panics
/// Outside a tokio runtime, if the operation does not complete at once; and if the operation
/// itself panics.
pub async fn detach<F>(operation: F) -> F::Output
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    match poll_once(Box::pin(operation)) {
        Ok(output) => output,
        Err(operation) => join(tokio::spawn(operation)).await,
    }
}

/// As [`detach`], but the operation starts now and not when the result is first polled; what
/// ends at once is [`Io::Ready`].
///
/// # Panics
/// As for [`detach`], here and not in the future.
pub fn start<T, F>(operation: F) -> Io<'static, T>
where
    F: Future<Output = Result<T>> + Send + 'static,
    T: Send + 'static,
{
    match poll_once(Box::pin(operation)) {
        Ok(result) => Io::Ready(result),
        Err(operation) => Io::future(join(tokio::spawn(operation))),
    }
}

fn poll_once<F: Future>(mut operation: Pin<Box<F>>) -> std::result::Result<F::Output, Pin<Box<F>>> {
    // The waker of this first poll is of no use: the task that takes over polls again.
    match operation.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => Ok(output),
        Poll::Pending => Err(operation),
    }
}

async fn join<T>(task: JoinHandle<T>) -> T {
    match task.await {
        Ok(output) => output,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => {
                // Only a runtime that is shutting down cancels the task: there is nobody left to
                // give an answer to.
                std::future::pending().await
            }
        },
    }
}
