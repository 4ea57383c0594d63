//! Connecting to the peer, and agreeing on a session.

use std::sync::Arc;
use std::time::Duration;

use brep_block::BlockDevice;
use brep_nbd::Stream;
use brep_nbd::client::{ClientError, ConnectOptions, Connection, connect_private};
use bytes::Bytes;
use uuid::Uuid;

use super::group::{DiskPart, Group, Terms};
use super::hello::{Decision, Refusal, decide, decide_plain, joins};
use super::link::{Link, peer_disk};
use super::plain::Plain;
use super::session::{Connections, Peer, Session};
use crate::config::{Ack, PeerAddress, PeerKind};
use crate::link::{
    CopyMode, Hello, HelloAnswer, LINK_VERSION, LinkReader, LinkWriter, Message, OPTION_BIND,
    OPTION_LINK, split, timeout_ms,
};
use crate::status::{Differences, Written};
use crate::table::Disks;
use crate::{Error, Result};

/// The secondary may have to close an older session and to make buffers before it answers.
const START_LIMIT: Duration = Duration::from_secs(35);

/// Pages of ranges that are taken from an old primary, for each disk; what is written in more places
/// is copied from there on.
const RANGE_PAGES_MAX: usize = 256;

/// What became of an attempt to connect.
pub(super) enum Attempt {
    /// A session; the group is attached.
    Session(Box<Session>),
    /// Reached, and not begun.
    Refused(Refusal),
    /// Not reached.
    Unreachable(Error),
}

/// Tries once to begin a session.
pub(super) async fn establish(group: &Arc<Group>, peer: &PeerAddress) -> Attempt {
    let attempt = async {
        // A session has to be recorded.
        group.record.check()?;
        match group.config.peer_kind {
            PeerKind::Brep => with_brep(group, peer).await,
            PeerKind::Plain => with_plain(group, peer).await,
        }
    };
    attempt.await.unwrap_or_else(Attempt::Unreachable)
}

async fn with_brep(group: &Arc<Group>, peer: &PeerAddress) -> Result<Attempt> {
    // The maps have to be complete before anything is decided by them.
    group.settled().await?;
    let limit = group.config.peer_timeout;
    let version = peer.option(&[&LINK_VERSION.to_be_bytes()]);
    let tls = group.config.tls.as_ref();
    let client = tls.map(|tls| &tls.client);
    let link = match connect_private(&peer.endpoint, client, OPTION_LINK, version, limit).await {
        Ok(link) => link,
        Err(ClientError::Unsupported { .. }) => {
            return Ok(Attempt::Refused(Refusal::new(
                format!("{peer} is an NBD server, but no brep secondary"),
                "start brep secondary there, or correct --peer; for a secondary of another make \
                 there is --peer-kind plain",
            )));
        }
        Err(error) => return Err(Error::failed(error.to_string())),
    };
    if let Some(tls) = tls {
        tls.check_peer(link.stream.tls_peer())?;
    }
    let (mut reader, mut writer) = split(link.stream, &link.rest);
    let disks = group.disks();
    let me = group.introduce();
    let hello = Hello { version: LINK_VERSION, timeout_ms: timeout_ms(limit), side: me.clone() };
    writer.send(&Message::Hello(Box::new(hello)), limit).await?;
    let answer = match reader.receive_within(limit).await? {
        Message::HelloAnswer(answer) => answer,
        Message::Refuse { reason, advice, .. } => {
            return Ok(Attempt::Refused(Refusal { advice, ..Refusal::new(reason, "") }));
        }
        other => return Err(Error::failed(format!("unexpected message {other:?}"))),
    };
    let wish = {
        let mut core = group.core();
        core.peer_disks = Some(answer.side.disks.clone());
        core.wish
    };
    let blank = answer.side.set.is_none();
    // It has the last checkpoint that this side knows of, or the one after that.
    let is_last_peer = me.com.zip(answer.side.com).is_some_and(|(mine, theirs)| {
        !answer.inconsistent && theirs.cur == mine.cur && theirs.epoch >= mine.epoch
    });
    let decision = match decide(&me, &answer, wish) {
        // One that has undone its promotion has these disks still, or their last checkpoint if they
        // have to be copied whole; any other is no proof of that.
        Decision::Start(plan)
            if group.is_superseded() && (blank || plan.is_whole() && !is_last_peer) =>
        {
            Decision::Refuse(Refusal::superseded())
        }
        decision => decision,
    };
    let plan = match decision {
        Decision::Start(plan) => plan,
        Decision::Refuse(refusal) => {
            let refusal = match refusal.has_differences() {
                true => compare_writes(group, &mut reader, &mut writer, &answer, refusal).await?,
                false => refusal,
            };
            let here = refusal.differences.as_ref().map(|d| d.here.clone());
            let refuse = Message::Refuse {
                reason: refusal.reason.clone(),
                advice: refusal.advice.clone(),
                kind: refusal.kind,
                written: here.unwrap_or_default(),
            };
            // The secondary shows the reason too; if it cannot be told, ours is enough.
            let _ = writer.send(&refuse, limit).await;
            return Ok(Attempt::Refused(refusal));
        }
    };
    let copy = plan.copy;
    if plan.with_theirs {
        // Persistent before the first copy: what the other side tells of itself may be gone by
        // the next time.
        take_over_maps(group, &mut reader, &mut writer, &answer).await?;
    }
    let epoch = me.epoch.max(answer.side.epoch).max(group.core().epoch()).next();
    let (set, cur) = group.begin_terms(epoch)?;
    group.secure_record().await?;
    let sync = group.config.ack == Ack::Sync;
    let discard_checkpoint = wish.discard_checkpoint;
    let start = Message::Start { set, cur, epoch, copy, sync, discard_checkpoint };
    writer.send(&start, limit).await?;
    let token = match reader.receive_within(limit.max(START_LIMIT)).await? {
        Message::Started { token } => token,
        Message::Refuse { reason, advice, .. } => {
            let refusal = Refusal { advice, is_secondary: true, ..Refusal::new(reason, "") };
            return Ok(Attempt::Refused(refusal));
        }
        other => return Err(Error::failed(format!("unexpected message {other:?}"))),
    };
    let connections = connect_disks(group, peer, &disks, Some(token)).await?;
    group.attach(Terms {
        cur: Some(cur),
        epoch,
        session: Some(token),
        copy,
        wish,
        trusted: copy == CopyMode::Missing && blank,
        disks: disks.clone(),
        joins: joins(&me, &answer),
        connections: connections.clone(),
        peer: &format!("{} ({peer})", answer.side.name),
        peer_durability: Some(answer.side.durability),
    })?;
    let link = Link::new(group, reader, writer, &answer);
    Ok(session(group, Peer::Brep(link), by_number(&disks, connections)))
}

type Reader = LinkReader<Stream>;
type Writer = LinkWriter<Stream>;

/// The ranges of a disk that the secondary has written itself, from `offset` on, and where those
/// that follow begin.
async fn their_ranges(
    group: &Group,
    (reader, writer): (&mut Reader, &mut Writer),
    disk: u32,
    offset: u64,
) -> Result<(Vec<(u64, u64)>, Option<u64>)> {
    let limit = group.config.peer_timeout;
    writer.send(&Message::RangesRequest { disk, offset }, limit).await?;
    match reader.receive_within(limit).await? {
        // Each answer begins after the one before it, so that there is an end.
        Message::Ranges { disk: of, ranges, next }
            if of == disk && next.is_none_or(|next| next > offset) =>
        {
            Ok((ranges, next))
        }
        other => Err(Error::failed(format!("unexpected message {other:?}"))),
    }
}

/// Takes what an old primary has written into this side's maps: it differs.
async fn take_over_maps(
    group: &Group,
    reader: &mut Reader,
    writer: &mut Writer,
    answer: &HelloAnswer,
) -> Result<()> {
    for disk in group.disks() {
        let Some(theirs) = peer_disk(answer, &disk.name) else { continue };
        let mut at = Some(0);
        for _ in 0..RANGE_PAGES_MAX {
            let Some(offset) = at else { break };
            let (ranges, next) = their_ranges(group, (reader, writer), theirs, offset).await?;
            group.mark_theirs(disk.number, &ranges);
            at = next;
        }
        if let Some(rest) = at {
            group.mark_theirs(disk.number, &[(rest, u64::MAX)]);
        }
    }
    Ok(())
}

/// What each side has that the other lacks.
async fn compare_writes(
    group: &Group,
    reader: &mut Reader,
    writer: &mut Writer,
    answer: &HelloAnswer,
    refusal: Refusal,
) -> Result<Refusal> {
    let mut there = Vec::new();
    for disk in group.disks() {
        let Some(index) = peer_disk(answer, &disk.name) else { continue };
        let bytes = answer.side.maps.as_ref().and_then(|m| m.bytes.get(index as usize).copied());
        let (mut ranges, next) = match bytes {
            Some(_) => their_ranges(group, (reader, writer), index, 0).await?,
            None => (Vec::new(), Some(0)),
        };
        let complete = next.is_none() && ranges.len() <= Written::SHOWN_MAX;
        ranges.truncate(Written::SHOWN_MAX);
        there.push(Written { disk: disk.name.clone(), bytes, ranges, complete });
    }
    let differences = Some(Differences { here: group.written(), there });
    Ok(Refusal { differences, ..refusal })
}

/// A stock NBD server says nothing of what it holds: only the record and the operator know.
async fn with_plain(group: &Arc<Group>, peer: &PeerAddress) -> Result<Attempt> {
    let (wish, epoch) = {
        let core = group.core();
        (core.wish, core.epoch())
    };
    let record = group.record();
    let epoch = record.epoch.max(epoch).next();
    let copy = match decide_plain(record.primary.had_peer, wish) {
        Decision::Start(plan) => plan.copy,
        Decision::Refuse(refusal) => return Ok(Attempt::Refused(refusal)),
    };
    group.settled().await?;
    let disks = group.disks();
    let connections = connect_disks(group, peer, &disks, None).await?;
    group.attach(Terms {
        cur: None,
        epoch,
        session: None,
        copy,
        wish,
        trusted: copy == CopyMode::Missing,
        disks: disks.clone(),
        joins: Vec::new(),
        connections: connections.clone(),
        peer: &format!("plain NBD server ({peer})"),
        peer_durability: None,
    })?;
    let connections = by_number(&disks, connections);
    let plain = Plain::new(group, connections.clone());
    Ok(session(group, Peer::Plain(plain), connections))
}

fn session(group: &Arc<Group>, peer: Peer, connections: Connections) -> Attempt {
    group.heard();
    Attempt::Session(Box::new(Session::new(group, peer, connections)))
}

fn by_number(disks: &Disks<DiskPart>, connections: Vec<Arc<Connection>>) -> Connections {
    disks.iter().map(|disk| disk.number).zip(connections).collect()
}

/// One data connection a disk, bound to the session by its token if there is one.
async fn connect_disks(
    group: &Arc<Group>,
    peer: &PeerAddress,
    disks: &Disks<DiskPart>,
    token: Option<Uuid>,
) -> Result<Vec<Arc<Connection>>> {
    let config = &group.config;
    let mut connections = Vec::new();
    for (slot, disk) in disks.iter().enumerate() {
        let options = ConnectOptions {
            name: format!("{} on the secondary", disk.name),
            connect_timeout: config.peer_timeout,
            request_timeout: config.peer_timeout,
            private_options: token.map(|token| bind(peer, token, slot)).into_iter().collect(),
            // The window is the bound; nothing waits in a second queue.
            in_flight_max: config.window_requests,
            in_flight_bytes_max: config.window_bytes,
            queued_max: config.window_requests.max(16_384),
            queued_bytes_max: config.window_bytes.max(256 << 20),
            tls: config.tls.as_ref().map(|tls| tls.client.clone()),
            ..ConnectOptions::new(peer.endpoint.clone(), peer.export(&disk.name))
        };
        let connection =
            Connection::connect(&options).await.map_err(|e| Error::failed(e.to_string()))?;
        if let Some(tls) = &config.tls {
            tls.check_peer(connection.tls_peer())?;
        }
        let size = disk.size();
        if connection.export().size != size {
            return Err(Error::failed(format!(
                "disk {}: {} bytes here, {} on the secondary",
                disk.name,
                size,
                connection.export().size
            )));
        }
        if connection.limits().read_only {
            return Err(Error::failed(format!(
                "disk {}: the peer's export is read-only; export it writable",
                disk.name
            )));
        }
        connections.push(connection);
    }
    Ok(connections)
}

fn bind(peer: &PeerAddress, token: Uuid, slot: usize) -> (u32, Bytes) {
    let slot = u32::try_from(slot).unwrap_or(u32::MAX);
    (OPTION_BIND, peer.option(&[token.as_bytes(), &slot.to_be_bytes()]))
}
