use std::ops::Range;
use std::sync::Arc;

use brep_block::{BlockDevice, LockMode, WriteFlags, ZeroFlags, detach};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::group::Group;
use super::session::Session;
use crate::change::Change;
use crate::link::CopyMode;
use crate::secondary::hash_hex;
use crate::{Error, Result};

/// Bytes that are copied together, and locked meanwhile.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes of zeroes that are sent as one request.
const ZERO_PIECE_BYTES: u64 = 32 << 20;

/// Pieces that are on their way at a time: enough to fill the link, few enough that a guest's
/// write does not wait long behind them.
const PIECES_IN_FLIGHT: usize = 8;

/// Bytes a hash when contents are compared.
const HASH_CHUNK_BYTES: u32 = 64 << 10;

/// Sends whatever differs, in ascending order, until nothing differs any more or the session is
/// about to end.
///
/// # Errors
/// A local read failed, or the secondary refused a write: the range differs still.
pub(super) async fn copy_differences(
    group: &Arc<Group>,
    session: &Session,
    mode: CopyMode,
) -> Result<()> {
    for disk in 0..group.disks().len() {
        let mut at = 0;
        let mut failure = None;
        let mut pieces = FuturesUnordered::new();
        loop {
            if !group.is_attached() {
                return Err(Error::failed("the secondary was lost during the copy"));
            }
            let next = group.next_different(disk, at, PIECE_BYTES);
            if let Some(range) = next
                && failure.is_none()
                && !session.is_ending()
            {
                // Found again only if it fails, in the next pass.
                at = range.end;
                pieces.push(copy_piece(group, session, disk, range, mode));
                if pieces.len() < PIECES_IN_FLIGHT {
                    continue;
                }
            }
            match pieces.next().await {
                Some(Ok(end)) => at = at.max(end),
                // What the others have read is sent.
                Some(Err(error)) => failure = failure.or(Some(error)),
                None => break,
            }
        }
        if let Some(error) = failure {
            return Err(error);
        }
    }
    Ok(())
}

/// Copies one piece, or more if a long run of zeroes begins there. Returns its end.
async fn copy_piece(
    group: &Arc<Group>,
    session: &Session,
    disk: usize,
    range: Range<u64>,
    mode: CopyMode,
) -> Result<u64> {
    // After a failure a range may differ although what is on its way makes it look equal.
    if mode == CopyMode::Compare
        && !group.has_failures()
        && same_on_peer(group, session, disk, &range).await?
    {
        return Ok(range.end);
    }
    send_range(group, disk, range).await
}

/// Reads a range under its lock and sends it in its place among the guest's writes.
async fn send_range(group: &Arc<Group>, disk: usize, range: Range<u64>) -> Result<u64> {
    let part = &group.disks()[disk];
    let device = part.image.device();
    let admission = group.admit(range.end - range.start).await;
    // What follows is the local disk's.
    admission.pause();
    let status = device.block_status(range.start, device.size() - range.start).await?;
    let zero = status.flags.zero && status.len >= range.end - range.start;
    let range = if zero {
        group.extend_range(disk, &range, status.len.min(ZERO_PIECE_BYTES))
    } else {
        range
    };
    let len = range.end - range.start;
    let guard = part.locks.lock(range.clone(), LockMode::Exclusive).await;
    let change = if zero && still_zero(&**device, &range).await {
        Ok(Change::Zeroes(len, ZeroFlags { may_unmap: true, ..ZeroFlags::default() }))
    } else {
        // At most ZERO_PIECE_BYTES, so it fits.
        device.read(range.start, len as usize).await.map(|data| change_of(data, len))
    };
    let change = match change {
        Ok(change) => change,
        Err(error) => {
            group.report(disk, &error);
            return Err(error.into());
        }
    };
    admission.resume();
    let begun = group.begin_copy(disk, range.start, &change)?;
    drop(guard);
    group.local_done(begun.ticket, range.start, len, &Ok(()));
    let (group, start) = (Arc::clone(group), range.start);
    // The session may end and give the copy up: what is on its way is taken note of all the same.
    detach(async move { group.finish_remote(begun, start, len, admission).await }).await;
    Ok(range.end)
}

async fn still_zero(device: &dyn BlockDevice, range: &Range<u64>) -> bool {
    let len = range.end - range.start;
    matches!(
        device.block_status(range.start, len).await,
        Ok(status) if status.flags.zero && status.len >= len
    )
}

fn change_of(data: bytes::Bytes, len: u64) -> Change {
    if brep_block::is_zero(&data) {
        Change::Zeroes(len, ZeroFlags { may_unmap: true, ..ZeroFlags::default() })
    } else {
        Change::Write(data, WriteFlags::default())
    }
}

/// Compares the hashes of a range; it counts as equal meanwhile.
///
/// The lock is held for the reading alone: a write that began before the session, and is sent to
/// nobody, must have ended by then. Every later one that is not in what was read here is on its
/// way to the peer, in order; if it fails it marks the range again.
async fn same_on_peer(
    group: &Arc<Group>,
    session: &Session,
    disk: usize,
    range: &Range<u64>,
) -> Result<bool> {
    let len = range.end - range.start;
    let part = &group.disks()[disk];
    let (assumed, data) = {
        let _guard = part.locks.lock(range.clone(), LockMode::Exclusive).await;
        let assumed = group.assume_equal(disk, range.clone());
        (assumed, part.image.device().read(range.start, len as usize).await?)
    };
    let mine: Vec<String> = data.chunks(HASH_CHUNK_BYTES as usize).map(hash_hex).collect();
    let theirs = session.hashes(disk, range.start, len, HASH_CHUNK_BYTES).await?;
    if theirs.len() != mine.len() {
        return Err(Error::failed("the secondary sent another number of hashes than asked for"));
    }
    let same = mine == theirs;
    if same {
        assumed.confirm();
    }
    Ok(same)
}
