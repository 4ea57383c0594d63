use std::collections::VecDeque;
use std::future::Future;
use std::marker::PhantomData;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use brep_block::{Error, ErrorKind, Operation, Result};
use bytes::Bytes;
use tokio::sync::watch;
use tokio::time::Instant;

use super::ClientError;
use super::operation::{Call, FromCall};
use crate::proto::client::{Completion, Refusal, Request, Slab};
use crate::proto::wire::{Command, Errno};

/// What the callers and the driver of one connection share: the calls, in the order in which they
/// were made.
#[derive(Debug)]
pub(super) struct Queue {
    pub(super) name: String,
    queued_max: usize,
    queued_bytes_max: u64,
    state: Mutex<State>,
    failure: watch::Sender<Option<ClientError>>,
}

#[derive(Debug, Default)]
struct State {
    calls: Slab<Call>,
    /// Calls that have not been made into requests completely, in the order of submission.
    unsent: VecDeque<u64>,
    unsent_bytes: u64,
    /// The server could not flush: what is on stable storage is not known any more.
    flush_failed: bool,
    closing: bool,
    /// Set once: the connection is of no use any more.
    end: Option<ClientError>,
    driver: Option<Waker>,
    /// The driver has been woken and has not looked yet.
    notified: bool,
}

/// What the driver is to do next.
pub(super) enum Next {
    Send {
        key: u64,
        request: Request,
        payload: Option<Bytes>,
        transfer: u64,
    },
    /// Nothing now: wait to be woken.
    Wait,
    /// All is sent and answered, and the owner wants the connection closed.
    Close,
    /// The connection has ended without the driver's doing.
    End(ClientError),
}

impl Queue {
    pub(super) fn new(name: String, queued_max: usize, queued_bytes_max: u64) -> Self {
        Queue {
            name,
            queued_max,
            queued_bytes_max,
            state: Mutex::default(),
            failure: watch::Sender::new(None),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code that can panic half way through a change runs under this lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the call's place on the wire, now.
    pub(super) fn submit<T: FromCall>(self: &Arc<Self>, call: Call) -> Result<Submitted<T>> {
        let mut state = self.lock();
        if let Some(error) = self.obstacle(&state, &call) {
            return Err(error);
        }
        state.unsent_bytes += call.unsent_payload();
        let key = state.calls.insert(call);
        state.unsent.push_back(key);
        let waker = state.notify();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(Submitted { queue: Some(Arc::clone(self)), key, result: PhantomData })
    }

    fn obstacle(&self, state: &State, call: &Call) -> Option<Error> {
        if let Some(end) = &state.end {
            return Some(self.lost(call, end));
        }
        if state.closing {
            return Some(self.lost(call, &ClientError::NotConnected));
        }
        let (kind, detail) = if state.flush_failed && call.operation == Operation::Flush {
            let detail = "an earlier flush has failed; what was lost is not known";
            (ErrorKind::Sticky, detail.to_owned())
        } else if state.unsent.len() >= self.queued_max {
            (ErrorKind::Io, format!("{} operations wait to be sent already", state.unsent.len()))
        } else if state.unsent_bytes > 0
            && state.unsent_bytes.saturating_add(call.unsent_payload()) > self.queued_bytes_max
        {
            (ErrorKind::Io, format!("{} bytes wait to be sent already", state.unsent_bytes))
        } else {
            return None;
        };
        let error = Error::new(call.operation, kind, self.name.as_str(), detail);
        Some(error.at(call.offset, call.len))
    }

    fn lost(&self, call: &Call, reason: &ClientError) -> Error {
        Error::new(call.operation, reason.kind(), self.name.as_str(), reason.to_string())
            .at(call.offset, call.len)
    }

    /// The next request in order, if it moves no more than `room` bytes. `idle`: no request is
    /// outstanding. The driver asks until it gets [`Next::Wait`]: only then is it woken again.
    pub(super) fn next(&self, room: Option<u64>, idle: bool, driver: &Waker) -> Next {
        let mut state = self.lock();
        state.notified = false;
        state.register(driver);
        if let Some(reason) = &state.end {
            return Next::End(reason.clone());
        }
        let State { calls, unsent, unsent_bytes, .. } = &mut *state;
        while let Some(&key) = unsent.front() {
            let Some(call) = calls.get_mut(key).filter(|call| !call.all_sent()) else {
                // One of its requests has failed, and perhaps its caller knows already.
                unsent.pop_front();
                continue;
            };
            let transfer = call.next_transfer();
            if room.is_some_and(|room| transfer > room) {
                return Next::Wait;
            }
            let before = call.unsent_payload();
            let (request, payload) = call.next_request();
            *unsent_bytes = unsent_bytes.saturating_sub(before - call.unsent_payload());
            if call.all_sent() {
                unsent.pop_front();
            }
            return Next::Send { key, request, payload, transfer };
        }
        if state.closing && idle { Next::Close } else { Next::Wait }
    }

    /// The driver can send nothing more now, but wants to know of the connection's end.
    pub(super) fn register(&self, driver: &Waker) -> Option<ClientError> {
        let mut state = self.lock();
        state.register(driver);
        state.end.clone()
    }

    /// Hands out what the server has answered.
    pub(super) fn complete(&self, completion: Completion, wakers: &mut Vec<Waker>) {
        let mut state = self.lock();
        let key = completion.tag;
        let State { calls, unsent_bytes, flush_failed, .. } = &mut *state;
        let Some(call) = calls.get_mut(key) else { return };
        match completion.result {
            Ok(answer) => call.answered(&completion.request, answer),
            Err(refusal) => {
                // One that a leaving server has not begun has lost nothing.
                *flush_failed |= completion.request.command == Command::FLUSH
                    && refusal.errno != Errno::ESHUTDOWN;
                *unsent_bytes = unsent_bytes.saturating_sub(call.unsent_payload());
                let error = server_error(&self.name, call.operation, &refusal);
                let Request { offset, len, .. } = completion.request;
                call.refused(error.at(offset, len));
            }
        }
        if !call.is_finished() {
            return;
        }
        wakers.extend(call.waker.take());
        if call.abandoned {
            report_unheard(call);
            calls.remove(key);
        }
    }

    /// Ends the connection: every pending call fails, and every later one. Only the first reason
    /// counts.
    pub(super) fn fail(&self, reason: &ClientError) {
        let mut state = self.lock();
        if state.end.is_some() {
            return;
        }
        state.end = Some(reason.clone());
        state.unsent.clear();
        state.unsent_bytes = 0;
        let mut wakers: Vec<Waker> = state.driver.take().into_iter().collect();
        let keys: Vec<u64> = state.calls.keys().collect();
        for key in keys {
            let Some(call) = state.calls.get_mut(key) else { continue };
            if call.is_finished() {
                continue;
            }
            let error = self.lost(call, reason);
            call.abort(error);
            wakers.extend(call.waker.take());
            if call.abandoned {
                report_unheard(call);
                state.calls.remove(key);
            }
        }
        drop(state);
        self.failure.send_replace(Some(reason.clone()));
        wakers.into_iter().for_each(Waker::wake);
    }

    /// No more calls are taken; the connection ends once those that have been are answered.
    pub(super) fn close(&self) {
        let mut state = self.lock();
        state.closing = true;
        let waker = state.notify();
        drop(state);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    pub(super) fn flush_has_failed(&self) -> bool {
        self.lock().flush_failed
    }

    pub(super) fn end(&self) -> Option<ClientError> {
        self.lock().end.clone()
    }

    pub(super) fn ended(&self) -> watch::Receiver<Option<ClientError>> {
        self.failure.subscribe()
    }

    /// When the oldest call without a result was submitted.
    pub(super) fn oldest(&self) -> Option<Instant> {
        let state = self.lock();
        state.calls.values().filter(|call| !call.is_finished()).map(|call| call.submitted).min()
    }

    pub(super) fn oldest_age(&self) -> Option<Duration> {
        self.oldest().map(|submitted| submitted.elapsed())
    }
}

impl State {
    fn register(&mut self, driver: &Waker) {
        if !self.driver.as_ref().is_some_and(|waker| waker.will_wake(driver)) {
            self.driver = Some(driver.clone());
        }
    }

    /// The driver's waker, if it has to be woken.
    fn notify(&mut self) -> Option<Waker> {
        if std::mem::replace(&mut self.notified, true) { None } else { self.driver.clone() }
    }
}

/// The caller has gone: the log is the last place where its error can be seen.
fn report_unheard(call: &Call) {
    if let Some(error) = call.error() {
        tracing::warn!(%error, "a request failed that nobody waited for any more");
    }
}

fn server_error(name: &str, operation: Operation, refusal: &Refusal) -> Error {
    let Refusal { errno, message } = refusal;
    let kind = match *errno {
        Errno::EPERM => ErrorKind::ReadOnly,
        Errno::EINVAL | Errno::EOVERFLOW => ErrorKind::InvalidInput,
        Errno::ENOSPC => ErrorKind::NoSpace,
        Errno::ENOTSUP => ErrorKind::Unsupported,
        Errno::ESHUTDOWN => ErrorKind::Shutdown,
        _ => ErrorKind::Io,
    };
    let separator = if message.is_empty() { "" } else { ": " };
    Error::new(operation, kind, name, format!("the server replied {errno}{separator}{message}"))
        .with_errno(i32::try_from(errno.0).ok())
}

/// A call that has its place on the wire. Dropping it does not take the call back.
pub(super) struct Submitted<T> {
    /// `None` once the result has been taken.
    queue: Option<Arc<Queue>>,
    key: u64,
    result: PhantomData<fn() -> T>,
}

impl<T: FromCall> Future for Submitted<T> {
    type Output = Result<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<T>> {
        let queue = self.queue.as_ref().expect("polled after completion");
        let mut state = queue.lock();
        let finished = match state.calls.get_mut(self.key) {
            Some(call) if !call.is_finished() => {
                if !call.waker.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) {
                    call.waker = Some(cx.waker().clone());
                }
                return Poll::Pending;
            }
            Some(_) => state.calls.remove(self.key),
            None => None,
        };
        drop(state);
        self.queue = None;
        let call = finished.expect("a call stays until its result is taken");
        Poll::Ready(call.finish())
    }
}

impl<T> Drop for Submitted<T> {
    fn drop(&mut self) {
        let Some(queue) = self.queue.take() else { return };
        let mut state = queue.lock();
        let Some(call) = state.calls.get_mut(self.key) else { return };
        if call.is_finished() {
            report_unheard(call);
            state.calls.remove(self.key);
        } else {
            call.abandoned = true;
            call.waker = None;
        }
    }
}
