use tokio::sync::{Semaphore, SemaphorePermit};

/// Most bytes that the copies of one filter hold at a time, for the guest's requests and in the
/// background together.
const COPY_BYTES_MAX: u64 = 128 << 20;

/// The memory that copies may use.
#[derive(Debug)]
pub(crate) struct CopyMemory(Semaphore);

impl Default for CopyMemory {
    fn default() -> Self {
        CopyMemory(Semaphore::new(COPY_BYTES_MAX as usize))
    }
}

impl CopyMemory {
    /// Waits until there is room for `len` bytes, which are given back by dropping. Whoever holds
    /// some must not ask for more.
    pub(crate) async fn take(&self, len: u64) -> Option<SemaphorePermit<'_>> {
        // The semaphore is never closed.
        self.0.acquire_many(len.min(COPY_BYTES_MAX) as u32).await.ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn copies_beyond_128_mib_wait_for_others_to_end() {
        let memory = CopyMemory::default();
        let mut held = Vec::new();
        for _ in 0..128 {
            held.push(memory.take(1 << 20).await);
        }
        let mut next = Box::pin(memory.take(512));
        assert!(futures_poll(next.as_mut()).is_none());
        held.pop();
        assert!(next.await.is_some());
        drop(held);
        assert!(memory.take(1 << 30).await.is_some(), "one copy alone always has room");
    }

    fn futures_poll<F: Future>(future: std::pin::Pin<&mut F>) -> Option<F::Output> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.poll(&mut context) {
            std::task::Poll::Ready(output) => Some(output),
            std::task::Poll::Pending => None,
        }
    }
}
