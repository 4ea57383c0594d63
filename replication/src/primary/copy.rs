use std::ops::Range;
use std::sync::Arc;

use brep_block::{BlockDevice, LockMode, WriteFlags, ZeroFlags, detach};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;

use super::group::{DiskPart, Group};
use super::session::Session;
use crate::change::Change;
use crate::secondary::hash_hex;
use crate::{Error, Result};

/// Bytes that are copied together, and locked meanwhile.
const PIECE_BYTES: u64 = 1 << 20;

/// Bytes of zeroes that are looked at together.
const ZERO_RUN_BYTES: u64 = 1 << 30;

/// Bytes of zeroes that are sent as one request.
const ZERO_PIECE_BYTES: u64 = 32 << 20;

/// Pieces that are on their way at a time: enough to fill the link, few enough that a guest's
/// write does not wait long behind them.
const PIECES_IN_FLIGHT: usize = 8;

/// Bytes a hash when contents are compared.
const HASH_CHUNK_BYTES: u32 = 64 << 10;

/// Sends whatever differs of some disks, in ascending order, until nothing differs any more or the
/// session is about to end. With `compare` hashes are compared first.
///
/// # Errors
/// A local read failed, or the secondary refused a write: the range differs still.
pub(super) async fn copy_differences(
    group: &Arc<Group>,
    session: &Session,
    disks: &[Arc<DiskPart>],
    compare: bool,
) -> Result<()> {
    for part in disks {
        let mut at = 0;
        let mut failure = None;
        let mut pieces = FuturesUnordered::new();
        loop {
            if !group.is_attached() {
                return Err(Error::failed("the secondary was lost during the copy"));
            }
            let next = group.next_different(part.number, at, PIECE_BYTES);
            if let Some(range) = next
                && failure.is_none()
                && !session.is_ending()
            {
                let piece = Piece::at(group, part, range).await;
                // Found again only if it fails, in the next pass.
                at = piece.range.end;
                pieces.push(piece.copy(group, session, compare));
                if pieces.len() < PIECES_IN_FLIGHT {
                    continue;
                }
            }
            match pieces.next().await {
                Some(Ok(())) => group.note_progress(),
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

/// Whole granules that differ.
struct Piece {
    part: Arc<DiskPart>,
    range: Range<u64>,
    /// They read as zeroes here.
    zero: bool,
}

impl Piece {
    /// The piece that begins there: data of the length that was found, or a long run of zeroes.
    async fn at(group: &Group, part: &Arc<DiskPart>, range: Range<u64>) -> Self {
        let (part, device) = (Arc::clone(part), &part.device);
        // An error shows again when the range is read.
        match device.block_status(range.start, part.size() - range.start).await {
            Ok(status) if status.flags.zero && status.len >= range.end - range.start => {
                let range = group.extend_range(part.number, &range, status.len.min(ZERO_RUN_BYTES));
                Piece { part, range, zero: true }
            }
            _ => Piece { part, range, zero: false },
        }
    }

    async fn copy(self, group: &Arc<Group>, session: &Session, compare: bool) -> Result<()> {
        let Piece { part, mut range, zero } = self;
        if zero {
            while !range.is_empty() && !session.is_ending() {
                // Behind what it does not have the secondary may have zeroes again.
                let lacks = skip_zeroes(group, session, &part, &range).await;
                if compare {
                    group.note_compared(lacks.end - range.start, lacks.end - lacks.start);
                }
                range.start = lacks.end;
                if !lacks.is_empty() {
                    send_range(group, session, &part, lacks).await?;
                }
            }
            return Ok(());
        }
        group.turn(range.end - range.start).await;
        if session.is_ending() {
            return Ok(());
        }
        // After a failure a range may differ although what is on its way makes it look equal.
        if !compare || group.has_failures(part.number) {
            return send_range(group, session, &part, range).await;
        }
        let different = different_on_peer(group, session, &part, &range).await?;
        let differing = different.iter().map(|part| part.end - part.start).sum();
        group.note_compared(range.end - range.start, differing);
        for range in different {
            send_range(group, session, &part, range).await?;
        }
        Ok(())
    }
}

/// Passes over what reads as zeroes on both sides. Returns what is to be sent behind that: nothing at
/// the end of the range, and never more than one request.
///
/// As with hashes the range counts as equal while the secondary is asked.
async fn skip_zeroes(
    group: &Arc<Group>,
    session: &Session,
    part: &DiskPart,
    range: &Range<u64>,
) -> Range<u64> {
    let piece = |start: u64, len: u64| {
        let end = (start + len.clamp(PIECE_BYTES, ZERO_PIECE_BYTES)).min(range.end);
        // Whole granules: a bit is cleared for all of it.
        start..range.end.min(end.next_multiple_of(group.granule_bytes(part.number)))
    };
    if group.has_failures(part.number) {
        return piece(range.start, ZERO_PIECE_BYTES);
    }
    let mut assumed = {
        let _guard = part.locks.lock(range.clone(), LockMode::Exclusive).await;
        if !is_zero(&*part.device, range).await {
            return piece(range.start, ZERO_PIECE_BYTES);
        }
        let Ok(assumed) = group.assume_equal(part.number, range.clone()).await else {
            return piece(range.start, ZERO_PIECE_BYTES);
        };
        assumed
    };
    let (mut end, mut lacking) = (range.start, ZERO_PIECE_BYTES);
    while end < range.end {
        // One that cannot say is sent the zeroes.
        let Ok(status) = session.block_status(part.number, end, range.end - end).await else {
            break;
        };
        if !status.flags.zero || status.len == 0 {
            lacking = status.len;
            break;
        }
        end = range.end.min(end + status.len);
    }
    let start = assumed.confirm_to(end);
    piece(start, lacking.saturating_add(end - start))
}

/// Reads a range under its lock and sends it in its place among the guest's writes.
async fn send_range(
    group: &Arc<Group>,
    session: &Session,
    part: &DiskPart,
    range: Range<u64>,
) -> Result<()> {
    let _not_in_a_cut = session.not_in_a_cut().await;
    let (disk, device) = (part.number, &part.device);
    let len = range.end - range.start;
    // A run of zeroes is long, and its request is short.
    let admission = group.admit(len.min(PIECE_BYTES)).await;
    // What follows is the local disk's.
    admission.pause();
    let guard = part.locks.lock(range.clone(), LockMode::Exclusive).await;
    let change = if is_zero(&**device, &range).await {
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
    let begun = group.begin_copy(&admission, disk, range.start, &change).await?;
    drop(guard);
    group.local_done(begun.ticket, range.start, len, &Ok(()));
    let (group, start) = (Arc::clone(group), range.start);
    // The session may end and give the copy up: what is on its way is taken note of all the same.
    detach(async move { group.finish_remote(begun, start, len, admission).await }).await;
    Ok(())
}

/// Whether a range reads as zeroes, as far as its device knows without reading.
async fn is_zero(device: &dyn BlockDevice, range: &Range<u64>) -> bool {
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

/// Compares the hashes of a range; it counts as equal meanwhile. Returns what is not.
///
/// The lock is held for the reading alone: a write that began before the session, and is sent to
/// nobody, must have ended by then. Every later one that is not in what was read here is on its
/// way to the peer, in order; if it fails it marks the range again.
async fn different_on_peer(
    group: &Arc<Group>,
    session: &Session,
    part: &DiskPart,
    range: &Range<u64>,
) -> Result<Vec<Range<u64>>> {
    let len = range.end - range.start;
    let disk = part.number;
    let (assumed, data) = {
        let _guard = part.locks.lock(range.clone(), LockMode::Exclusive).await;
        let assumed = group.assume_equal(disk, range.clone()).await?;
        (assumed, part.device.read(range.start, len as usize).await)
    };
    let data = data.inspect_err(|error| group.report(disk, error))?;
    let mine: Vec<String> = data.chunks(HASH_CHUNK_BYTES as usize).map(hash_hex).collect();
    let theirs = session.hashes(disk, range.start, len, HASH_CHUNK_BYTES).await?;
    if theirs.len() != mine.len() {
        return Err(Error::failed("the secondary sent another number of hashes than asked for"));
    }
    let granule = group.granule_bytes(disk);
    let mut different: Vec<Range<u64>> = Vec::new();
    let mut at = range.start;
    for (mine, theirs) in mine.iter().zip(&theirs) {
        let chunk = at..range.end.min(at + u64::from(HASH_CHUNK_BYTES));
        at = chunk.end;
        // Whole granules: a bit is cleared for all of it.
        let start = chunk.start - chunk.start % granule;
        let end = range.end.min(chunk.end.next_multiple_of(granule));
        match different.last_mut() {
            _ if mine == theirs => {}
            Some(last) if last.end >= start => last.end = end,
            _ => different.push(start..end),
        }
    }
    assumed.confirm_but(&different);
    Ok(different)
}
