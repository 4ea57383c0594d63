use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use brep_block::BlockDevice;
use tokio::sync::Notify;

use crate::{Child, QuorumError};

/// A child with its name.
#[derive(Debug)]
pub(crate) struct Member {
    pub(crate) name: String,
    index: u64,
    pub(crate) device: Arc<dyn BlockDevice>,
    pub(crate) ignore_errors: bool,
}

pub(crate) type MemberList = Arc<Vec<Arc<Member>>>;

/// The children, and the operations that work with them.
#[derive(Debug)]
pub(crate) struct Members {
    state: Mutex<State>,
    /// The last operation has ended.
    idle: Notify,
    /// Operations may begin again.
    opened: Notify,
    /// One change at a time.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Debug)]
struct State {
    list: MemberList,
    next_index: u64,
    in_flight: usize,
    closed: bool,
}

impl Members {
    pub(crate) fn new(children: Vec<Child>) -> Self {
        let list: Vec<_> =
            (0u64..).zip(children).map(|(i, child)| Arc::new(member(i, child))).collect();
        let next_index = list.len() as u64;
        let state = State { list: Arc::new(list), next_index, in_flight: 0, closed: false };
        Members {
            state: Mutex::new(state),
            idle: Notify::new(),
            opened: Notify::new(),
            changing: tokio::sync::Mutex::new(()),
        }
    }

    pub(crate) fn list(&self) -> MemberList {
        Arc::clone(&self.state().list)
    }

    /// Waits until no operation is in flight. Holds nothing back.
    pub(crate) async fn drain(&self) {
        loop {
            // Created before the look, so that no wake-up is missed.
            let idle = self.idle.notified();
            if self.state().in_flight == 0 {
                return;
            }
            idle.await;
        }
    }

    /// Appends a child, with nothing in flight. Returns its name.
    pub(crate) async fn add(&self, child: Child) -> Result<String, QuorumError> {
        let _closed = self.close().await;
        let mut state = self.state();
        if state.list.iter().any(|member| Arc::ptr_eq(&member.device, &child.device)) {
            return Err(QuorumError::HasParent(child.device.name().to_owned()));
        }
        let member = Arc::new(member(state.next_index, child));
        let name = member.name.clone();
        state.next_index += 1;
        let mut list = (*state.list).clone();
        list.push(member);
        state.list = Arc::new(list);
        Ok(name)
    }

    /// Removes a child, with nothing in flight.
    pub(crate) async fn remove(
        &self,
        quorum: &str,
        name: &str,
        threshold: usize,
    ) -> Result<Arc<Member>, QuorumError> {
        let _closed = self.close().await;
        let mut state = self.state();
        let Some(position) = state.list.iter().position(|member| member.name == name) else {
            return Err(QuorumError::NoSuchChild(quorum.to_owned(), name.to_owned()));
        };
        if state.list.len() <= threshold {
            return Err(QuorumError::TooFewChildren(threshold));
        }
        let mut list = (*state.list).clone();
        let member = list.remove(position);
        state.list = Arc::new(list);
        // Only the name of the child that was added last becomes free again.
        if member.index + 1 == state.next_index {
            state.next_index = member.index;
        }
        Ok(member)
    }

    /// Holds new operations back and waits for those in flight; dropping the result, or this
    /// future, lets them go on.
    async fn close(&self) -> Closed<'_> {
        let turn = self.changing.lock().await;
        self.state().closed = true;
        let closed = Closed { members: self, _turn: turn };
        self.drain().await;
        closed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // The state is consistent whenever the lock is released, by a panic too.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn member(index: u64, child: Child) -> Member {
    let Child { device, ignore_errors } = child;
    Member { name: format!("children.{index}"), index, device, ignore_errors }
}

struct Closed<'a> {
    members: &'a Members,
    _turn: tokio::sync::MutexGuard<'a, ()>,
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.members.state().closed = false;
        self.members.opened.notify_waiters();
    }
}

/// An operation in flight, with the children that it works with.
#[derive(Debug)]
pub(crate) struct Ticket<'a> {
    members: &'a Members,
    pub(crate) list: MemberList,
}

impl<'a> Ticket<'a> {
    /// Begins an operation; waits while the children are being changed.
    pub(crate) async fn new(members: &'a Members) -> Ticket<'a> {
        loop {
            let opened = members.opened.notified();
            {
                let mut state = members.state();
                if !state.closed {
                    state.in_flight += 1;
                    return Ticket { members, list: Arc::clone(&state.list) };
                }
            }
            opened.await;
        }
    }
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut state = self.members.state();
        state.in_flight -= 1;
        if state.in_flight == 0 {
            self.members.idle.notify_waiters();
        }
    }
}
