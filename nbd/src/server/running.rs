use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio_util::sync::ReusableBoxFuture;

use crate::proto::server::{Content, Failure, RequestId};
use crate::proto::wire::Errno;

/// What a request does to the device.
pub(super) type Operation = ReusableBoxFuture<'static, Result<Content, Failure>>;

/// The operations of a connection that did not finish at once.
#[derive(Debug, Default)]
pub(super) struct Running(FuturesUnordered<One>);

#[derive(Debug)]
struct One {
    id: RequestId,
    cost: u64,
    operation: Operation,
}

/// The outcome of an operation.
#[derive(Debug)]
pub(super) struct Completion {
    pub(super) id: RequestId,
    pub(super) cost: u64,
    pub(super) result: Result<Content, Failure>,
}

impl Running {
    /// Bounded by the limit on requests in flight.
    pub(super) fn push(&mut self, id: RequestId, cost: u64, operation: Operation) {
        self.0.push(One { id, cost, operation });
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Which these are, and what each counts for.
    pub(super) fn each(&self) -> impl Iterator<Item = (RequestId, u64)> {
        self.0.iter().map(|one| (one.id, one.cost))
    }

    /// Waits for the end of all, whatever it is.
    pub(super) async fn end(&mut self) {
        while self.0.next().await.is_some() {}
    }

    /// One that has ended; none: the task is woken when one may have.
    pub(super) fn poll_next(&mut self, cx: &mut Context<'_>) -> Option<Completion> {
        match self.0.poll_next_unpin(cx) {
            Poll::Ready(completion) => completion,
            Poll::Pending => None,
        }
    }
}

/// One that panics is an error to its client, and harms no other of the connection: nothing of it is
/// looked at again.
pub(super) fn poll(
    operation: &mut Operation,
    cx: &mut Context<'_>,
) -> Poll<Result<Content, Failure>> {
    catch_unwind(AssertUnwindSafe(|| operation.poll(cx)))
        .unwrap_or_else(|_| Poll::Ready(Err(Failure::new(Errno::EIO, "the operation was lost"))))
}

impl Future for One {
    type Output = Completion;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Completion> {
        let One { id, cost, operation } = &mut *self;
        let result = ready!(poll(operation, cx));
        Poll::Ready(Completion { id: *id, cost: *cost, result })
    }
}
