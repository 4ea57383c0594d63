//! A switchover that was cut short between the records of the two sides: both are secondaries then,
//! with the same checkpoint, and the one that made room asks the other one to take over.

use std::sync::Arc;
use std::time::Duration;

use brep_nbd::client::connect_private;

use super::failover::Wanted;
use super::group::Group;
use crate::config::PeerAddress;
use crate::link::{
    Hello, LINK_VERSION, LinkWriter, Message, OPTION_LINK, Side as Introduction, StopReason, split,
    timeout_ms,
};
use crate::{Epoch, Error, Result};

/// Pause before the other side is asked again.
const PAUSE: Duration = Duration::from_secs(2);

/// How long the other side may take to become the primary.
const TAKE_OVER_LIMIT: Duration = Duration::from_secs(30);

/// What the other side has said.
enum Told {
    /// It is the primary, and will connect.
    IsPrimary,
    /// It does not take over.
    Refused(String),
}

impl Group {
    /// Asks the other side until it is the primary, or this one is.
    pub(super) async fn finish_switchover(self: Arc<Self>) {
        let leaving = self.leaving();
        while self.made_room() && !leaving.is_cancelled() {
            let asking = async {
                if let Some(peer) = self.peer()
                    && self.session().is_none()
                {
                    self.ask_and_note(&peer).await;
                }
                // Two that ask each other at the same time do not do it again.
                tokio::time::sleep(PAUSE.mul_f64(0.75 + crate::random::fraction() / 2.0)).await;
            };
            tokio::select! {
                biased;
                () = leaving.cancelled() => return,
                () = asking => {}
            }
        }
    }

    /// Whether nobody knows yet if the other side has taken over.
    fn made_room(&self) -> bool {
        let record = self.record();
        !record.is_primary() && record.secondary.made_room
    }

    async fn ask_and_note(&self, peer: &PeerAddress) {
        // Nobody promotes this side while the other one may be about to take over.
        let _transition = self.transition.lock().await;
        if !self.made_room() {
            return;
        }
        let told = self.ask_to_take_over(peer).await;
        self.core().other_is_primary = matches!(told, Ok(Told::IsPrimary));
        let reason = match told {
            Ok(Told::IsPrimary) => None,
            Ok(Told::Refused(reason)) => Some(format!("the other side does not: {reason}")),
            Err(error) => Some(error.to_string()),
        };
        let reason = reason.map(|reason| {
            format!("this side has made room for the other one, and asks it to take over: {reason}")
        });
        self.core().reason = reason;
    }

    /// Whether this side may be promoted: not if the one that it has made room for has taken over,
    /// and still says so.
    ///
    /// # Errors
    /// It does.
    pub(super) async fn check_not_superseded(&self) -> Result<()> {
        let Some(peer) = self.peer().filter(|_| self.made_room()) else { return Ok(()) };
        if !self.core().other_is_primary {
            return Ok(());
        }
        match self.ask_to_take_over(&peer).await {
            Ok(Told::IsPrimary) => Err(Error::refused(
                "the other side has taken over, as it says: it is the primary; nothing was changed",
            )),
            Ok(Told::Refused(_)) | Err(_) => Ok(()),
        }
    }

    async fn ask_to_take_over(&self, peer: &PeerAddress) -> Result<Told> {
        let limit = self.config.peer_timeout;
        let version = peer.option(&[&LINK_VERSION.to_be_bytes()]);
        let tls = self.config.tls.as_ref();
        let client = tls.map(|tls| &tls.client);
        let link = connect_private(&peer.endpoint, client, OPTION_LINK, version, limit)
            .await
            .map_err(|e| Error::failed(e.to_string()))?;
        if let Some(tls) = tls {
            tls.check_peer(link.stream.tls_peer())?;
        }
        let (mut reader, mut writer) = split(link.stream, &link.rest);
        let side = self.introduce();
        let com = side.com;
        let hello = Hello { version: LINK_VERSION, timeout_ms: timeout_ms(limit), side };
        writer.send(&Message::Hello(Box::new(hello)), limit).await?;
        let answer = match reader.receive_within(limit).await? {
            Message::HelloAnswer(answer) => answer,
            Message::Refuse { reason, .. } => return Ok(Told::Refused(reason)),
            other => return Err(Error::failed(format!("unexpected message {other:?}"))),
        };
        if answer.side.primary {
            return Ok(Told::IsPrimary);
        }
        let Some(com) = com.filter(|_| answer.side.com == com) else {
            return Ok(Told::Refused("it does not have this side's checkpoint".to_owned()));
        };
        writer.send(&Message::TakeOver { epoch: com.epoch }, limit).await?;
        match reader.receive_within(TAKE_OVER_LIMIT).await? {
            Message::Stop { reason: StopReason::Promoted } => Ok(Told::IsPrimary),
            Message::Refuse { reason, .. } => Ok(Told::Refused(reason)),
            other => Err(Error::failed(format!("unexpected message {other:?}"))),
        }
    }

    /// The other side has made room, has the same checkpoint, and asks this one to take over.
    pub(super) async fn take_over_now<S>(
        self: &Arc<Self>,
        writer: &mut LinkWriter<S>,
        from: &Introduction,
        epoch: Epoch,
    ) -> Result<()>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite,
    {
        let refusal = self.cannot_finish(from, epoch);
        let taken_over = match refusal {
            Some(reason) => Err(Error::refused(reason)),
            None => self.failover(Wanted::CHECKPOINT).await.map(drop),
        };
        let answer = match &taken_over {
            Ok(()) => Message::Stop { reason: StopReason::Promoted },
            Err(error) => Message::refusal(error.to_string(), None),
        };
        writer.send(&answer, self.config.peer_timeout).await?;
        taken_over
    }

    fn cannot_finish(&self, from: &Introduction, epoch: Epoch) -> Option<String> {
        let record = self.record();
        let same = record.set == from.set && record.com.is_some() && record.com == from.com;
        if !from.made_room || !same || record.com.is_none_or(|com| com.epoch != epoch) {
            return Some("the two sides do not have the same checkpoint".to_owned());
        }
        let (here, there) = (self.introduce(), names_of_checkpoint(from));
        if names_of_checkpoint(&here) != there {
            return Some(format!(
                "the two sides do not have the same disks: there {}, here {}",
                there.join(", "),
                names_of_checkpoint(&here).join(", ")
            ));
        }
        if self.session().is_some() {
            return Some("a primary is connected here".to_owned());
        }
        self.cannot_take_over()
    }
}

/// The disks that are part of the side's checkpoint, by name.
fn names_of_checkpoint(side: &Introduction) -> Vec<&str> {
    let held = side.disks.iter().filter(|disk| disk.joining.is_none());
    let mut names: Vec<_> = held.map(|disk| &*disk.name).collect();
    names.sort_unstable();
    names
}
