use std::future::Future;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

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
    let mut operation = Box::pin(operation);
    // The waker of this first poll is of no use: the task that takes over polls again.
    if let Poll::Ready(output) = operation.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        return output;
    }
    let task = pin!(tokio::spawn(operation));
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
