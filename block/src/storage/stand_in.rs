use std::cell::RefCell;
use std::rc::Rc;

use super::Storage;

thread_local! {
    static INSTALLED: RefCell<Option<Rc<dyn Storage>>> = const { RefCell::new(None) };
}

/// From now on this thread opens its files there; with `None`, in the file system again.
pub fn install(storage: Option<Rc<dyn Storage>>) {
    INSTALLED.set(storage);
}

pub(super) fn installed() -> Option<Rc<dyn Storage>> {
    INSTALLED.with_borrow(Clone::clone)
}
