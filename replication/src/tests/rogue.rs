//! A secondary that keeps to the form of the link, and answers when it likes.
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use brep_block::{BlockDevice, Memory};
use brep_nbd::Endpoint;
use brep_nbd::server::{
    Connection, Export, ExportDescription, Exports, OptionError, PrivateReply, Server,
    ServerConfig, TakenStream,
};
use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use uuid::Uuid;

use super::common::{MIB, Scratch, Side, connect, file};
use super::write;
use crate::config::{OnPeerLost, SideConfig};
use crate::link::{
    CopyMode, Hello, HelloAnswer, Message, OPTION_LINK, Side as Introduction, StopReason, split,
};
use crate::{Commit, Epoch, Generation, SetId};

const LIMIT: Duration = Duration::from_secs(10);

#[derive(Default)]
struct State {
    set: Option<SetId>,
    cur: Option<Generation>,
    com: Option<Commit>,
    epoch: Epoch,
    session: Option<Uuid>,
    /// On which line, and with which copy, each session was to begin.
    starts: Vec<(Generation, CopyMode)>,
    /// No session begins.
    holds_starts: bool,
    /// No cut is answered.
    holds_cuts: bool,
    /// It says again and again that it is about to be promoted.
    promoting: bool,
    /// How often the primary has said that it acknowledges nothing meanwhile.
    holding: u32,
    /// It says that it has been promoted, and then that it knows nothing.
    promotes: bool,
    /// It asks for so many switchovers.
    wishes: u64,
    /// Whoever it asked has heard all of that.
    said_all: bool,
    /// Cuts that it was asked for, and whether it could take over.
    cuts: u32,
    asked: u32,
    /// It ends the link, once.
    hangs_up: bool,
}

struct Rogue {
    disk: Arc<Memory>,
    state: Mutex<State>,
}

/// What the primary finds there.
struct RogueExports(Arc<Rogue>);

impl Exports for RogueExports {
    fn list(&self) -> Vec<ExportDescription> {
        Vec::new()
    }

    fn open(&self, _: &str, _: &Arc<Connection>) -> Result<Export, OptionError> {
        Ok(Export::new("vda", Arc::clone(&self.0.disk) as _))
    }

    fn private_option<'a>(
        &'a self,
        _: &'a Arc<Connection>,
        option: u32,
        _: Bytes,
    ) -> BoxFuture<'a, PrivateReply> {
        let rogue = Arc::clone(&self.0);
        Box::pin(async move {
            match option {
                OPTION_LINK => PrivateReply::Takeover {
                    reply: Bytes::new(),
                    then: Box::new(move |stream| Box::pin(rogue.serve_link(stream))),
                },
                _ => PrivateReply::Ack(Bytes::new()),
            }
        })
    }
}

impl Rogue {
    /// Listens where a primary looks for its secondary.
    async fn start(scratch: &Scratch) -> Arc<Self> {
        let disk = Memory::new("vda", MIB);
        let rogue = Arc::new(Rogue { disk, state: Mutex::default() });
        let server =
            Server::new(Arc::new(RogueExports(Arc::clone(&rogue))), ServerConfig::default());
        let listener = Server::bind(&scratch.endpoint("s.sock")).await.unwrap();
        tokio::spawn(async move { server.serve(listener).await });
        rogue
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    async fn until(&self, fits: impl Fn(&State) -> bool) {
        let deadline = tokio::time::Instant::now() + LIMIT;
        while !fits(&self.state()) {
            assert!(tokio::time::Instant::now() < deadline);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    async fn serve_link(self: Arc<Self>, stream: TakenStream) {
        let (mut reader, mut writer) = split(stream, &[]);
        let Ok(Message::Hello(hello)) = reader.receive().await else { return };
        let answer = Message::HelloAnswer(Box::new(self.answer(*hello)));
        writer.send(&answer, LIMIT).await.unwrap();
        let Ok(Message::Start { set, cur, epoch, copy, .. }) = reader.receive().await else {
            return;
        };
        let token = Uuid::new_v4();
        {
            let mut state = self.state();
            state.starts.push((cur, copy));
            (state.set, state.cur, state.epoch) = (Some(set), Some(cur), epoch);
            state.session = Some(token);
        }
        while self.state().holds_starts {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        if writer.send(&Message::Started { token }, LIMIT).await.is_err() {
            return;
        }
        loop {
            let message = tokio::time::timeout(Duration::from_millis(50), reader.receive()).await;
            let mut answers = Vec::new();
            let asks = {
                let mut state = self.state();
                let asks = state.wishes > 0;
                match &message {
                    Ok(Ok(Message::Cut { .. })) => state.cuts += 1,
                    Ok(Ok(Message::SwitchoverRequest)) => state.asked += 1,
                    _ => {}
                }
                match message {
                    Ok(Ok(Message::Cut { epoch, .. })) if !state.holds_cuts => {
                        state.com = Some(Commit { cur, epoch });
                        answers = vec![Message::CutDone { epoch }, Message::Committed { epoch }];
                    }
                    Ok(Ok(Message::Holding)) => state.holding += 1,
                    Ok(Ok(_)) => {}
                    Ok(Err(_)) => return,
                    Err(_) if state.promoting => answers.push(Message::Promoting),
                    Err(_) => answers.push(Message::Heartbeat),
                }
                if state.promotes {
                    *state = State::default();
                    answers = vec![Message::Stop { reason: StopReason::Promoted }];
                }
                for id in 0..std::mem::take(&mut state.wishes) {
                    answers.push(Message::SwitchoverWish { id, limit_ms: 60_000 });
                }
                if std::mem::take(&mut state.hangs_up) {
                    return;
                }
                asks
            };
            for answer in answers {
                if writer.send(&answer, LIMIT).await.is_err() {
                    return;
                }
            }
            self.state().said_all |= asks;
        }
    }

    fn answer(&self, Hello { version, timeout_ms, side }: Hello) -> HelloAnswer {
        let state = self.state();
        let side = Introduction {
            name: "rogue".into(),
            run: Uuid::new_v4(),
            set: state.set,
            cur: state.cur,
            fork: None,
            com: state.com,
            epoch: state.epoch,
            history: Vec::new(),
            primary: false,
            session: state.session,
            maps: None,
            ..side
        };
        HelloAnswer {
            version,
            timeout_ms,
            side,
            guest: false,
            inconsistent: state.com.is_none(),
            power_lost: false,
            outdated: false,
            discard_local: false,
        }
    }
}

fn config(scratch: &Scratch) -> SideConfig {
    scratch.raw("p.raw", MIB, 1);
    let mut config = scratch.primary(vec![scratch.disk("vda", "p.raw")]);
    config.peer_timeout = Duration::from_secs(1);
    config
}

/// A primary with such a secondary, in sync.
async fn in_sync(change: impl FnOnce(&mut SideConfig)) -> (Scratch, Arc<Rogue>, Side) {
    let scratch = Scratch::new();
    let rogue = Rogue::start(&scratch).await;
    let mut config = config(&scratch);
    change(&mut config);
    let primary = Side::run(config);
    primary.wait_state("in-sync").await;
    (scratch, rogue, primary)
}

/// I8: however often a secondary says that it is about to take over, a write waits for it once.
#[tokio::test]
async fn i08_a_promotion_that_is_announced_and_not_decided_holds_no_write_for_long() {
    let (scratch, rogue, primary) = in_sync(|_| {}).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    rogue.state().promoting = true;
    rogue.until(|state| state.holding > 0).await;
    let written = tokio::time::timeout(Duration::from_secs(5), write(&guest, 0, 0x11)).await;
    written.expect("it waits still").unwrap().unwrap();
    rogue.state().promoting = false;
    guest.close();
    primary.stop().await;
}

/// What the secondary is told of the line that its session is on stays true.
#[tokio::test]
async fn a_primary_that_goes_on_alone_while_a_session_is_agreed_on_begins_another_one() {
    let (_scratch, rogue, primary) = in_sync(|c| c.on_peer_lost = OnPeerLost::Suspend).await;
    {
        let mut state = rogue.state();
        (state.holds_starts, state.hangs_up) = (true, true);
    }
    rogue.until(|state| state.starts.len() == 2).await;
    primary.command("resume", json!({ "lonely": true })).await.unwrap();
    rogue.state().holds_starts = false;
    let status = primary.wait_state("in-sync").await;
    let told = rogue.state().starts.last().unwrap().0;
    assert_eq!(status["cur"], told.to_string(), "{status:#}");
    primary.stop().await;
}

/// I11: a blank secondary in the place of one that was promoted does not make the old primary one
/// again.
#[tokio::test]
async fn i11_a_primary_whose_secondary_was_promoted_serves_nobody_for_a_blank_one() {
    let (scratch, rogue, primary) = in_sync(|_| {}).await;
    let guest = connect(scratch.endpoint("p-guest.sock"), "vda").await;
    rogue.state().promotes = true;
    let refused = |s: &Value| s["link"] == "refused";
    let status = primary.wait("refused", refused).await;
    assert!(status["reason"].as_str().unwrap().contains("promoted"), "{status:#}");
    write(&guest, 0, 0x11).await.unwrap().unwrap_err();
    // Nor by a copy that is asked for.
    primary.command("resync", json!({ "full": true })).await.unwrap_err();
    guest.close();
    primary.stop().await;
}

/// It is asked for once, and not again each time that the link breaks.
#[tokio::test]
async fn a_whole_copy_goes_on_over_a_break_whatever_made_it_necessary() {
    let (scratch, rogue, primary) = in_sync(|_| {}).await;
    {
        let mut state = rogue.state();
        // It was restored from an older copy.
        state.com = state.com.map(|com| Commit { epoch: Epoch(0), ..com });
        (state.hangs_up, state.holds_cuts) = (true, true);
    }
    let refused = |s: &Value| s["advice"].as_str().is_some_and(|a| a.contains("resync --full"));
    primary.wait("refused", refused).await;
    primary.command("resync", json!({ "full": true })).await.unwrap();
    for sessions in 2..4 {
        rogue.until(|state| state.starts.len() == sessions).await;
        primary.wait("connected", |s| s["link"] == "connected").await;
        rogue.state().hangs_up = true;
    }
    // One that is not the same any more gets everything again.
    rogue.until(|state| state.starts.len() == 4).await;
    primary.wait("connected", |s| s["link"] == "connected").await;
    {
        let mut state = rogue.state();
        (state.session, state.hangs_up, state.holds_cuts) = (None, true, false);
    }
    rogue.until(|state| state.starts.len() == 5).await;
    let copies: Vec<_> = rogue.state().starts[1..].iter().map(|(_, copy)| *copy).collect();
    use CopyMode::{Changed, Full, Missing};
    assert_eq!(copies, [Full, Missing, Missing, Changed]);
    primary.wait_state("in-sync").await;
    primary.stop().await;
    assert!(rogue.disk.read(0, MIB as usize).await.unwrap() == file(&scratch.path("p.raw")));
}

#[tokio::test]
async fn a_copy_that_replication_would_have_to_be_started_for_says_so() {
    let (_scratch, rogue, primary) = in_sync(|_| {}).await;
    {
        let mut state = rogue.state();
        state.com = state.com.map(|com| Commit { epoch: Epoch(0), ..com });
        state.hangs_up = true;
    }
    primary.wait("refused", |s| s["link"] == "refused").await;
    let stop = json!({ "enable": false, "primary": true });
    primary.command("xen-set-replication", stop).await.unwrap();
    let status = primary.status().await;
    assert!(status["advice"].as_str().unwrap().starts_with("brep start;"), "{status:#}");
    let error = primary.command("resync", json!({ "full": true })).await.unwrap_err();
    assert!(error.to_string().contains("brep start"), "{error}");
    primary.stop().await;
}

#[tokio::test]
async fn another_peer_is_connected_to_although_the_old_one_does_not_answer() {
    let scratch = Scratch::new();
    let rogue = Rogue::start(&scratch).await;
    rogue.state().holds_starts = true;
    let primary = Side::run(config(&scratch));
    rogue.until(|state| state.starts.len() == 1).await;
    scratch.raw("s.raw", MIB, 2);
    let mut config = scratch.secondary(vec![scratch.disk("vda", "s.raw")]);
    config.listen = Some(scratch.endpoint("other.sock"));
    let other = Side::run(config);
    let uri = format!("nbd+unix:///?socket={}", scratch.path("other.sock").display());
    primary.command("peer-set", json!({ "uri": uri })).await.unwrap();
    let status = tokio::time::timeout(LIMIT, primary.wait_state("in-sync")).await.unwrap();
    assert!(status["peer"].as_str().unwrap().contains("other.sock"), "{status:#}");
    primary.stop().await;
    other.stop().await;
}

#[tokio::test]
async fn a_copy_that_was_asked_for_is_made_by_the_next_session_if_this_one_ends_before_it() {
    let (_scratch, rogue, primary) = in_sync(|_| {}).await;
    rogue.state().holds_cuts = true;
    let waiting = primary.command("checkpoint", json!({ "wait": "cut" }));
    let asked = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        primary.command("resync", json!({ "full": true })).await.unwrap();
        let mut state = rogue.state();
        (state.holds_cuts, state.hangs_up) = (false, true);
    };
    let (checkpoint, ()) = tokio::join!(waiting, asked);
    checkpoint.unwrap_err();
    rogue.until(|state| state.starts.len() == 2).await;
    assert_eq!(rogue.state().starts[1].1, CopyMode::Full);
    primary.wait("in sync", |s: &Value| s["disks"][0]["state"] == "in-sync").await;
    primary.stop().await;
}

/// Only while the one who asked is connected is it known that he still waits.
#[tokio::test]
async fn a_switchover_that_a_secondary_asked_for_is_not_made_when_it_has_gone_and_come_back() {
    let listen = |c: &mut SideConfig| {
        c.listen = Some(Endpoint::Unix { path: c.state_dir.with_extension("sock") });
    };
    let (_scratch, rogue, primary) = in_sync(listen).await;
    rogue.state().holds_cuts = true;
    let busy = primary.command("checkpoint", json!({}));
    let goes = async {
        let cuts = rogue.state().cuts;
        rogue.until(|state| state.cuts > cuts).await;
        rogue.state().wishes = 1;
        rogue.until(|state| state.wishes == 0).await;
        let mut state = rogue.state();
        (state.holds_cuts, state.hangs_up) = (false, true);
    };
    let (busy, ()) = tokio::join!(busy, goes);
    busy.unwrap_err();
    rogue.until(|state| state.starts.len() == 2).await;
    primary.wait("connected", |s| s["link"] == "connected").await;
    primary.wait_state("in-sync").await;
    primary.checkpoint().await;
    assert_eq!(rogue.state().asked, 0);
    // It would have been asked: it has the address, and nothing is in the way.
    rogue.state().wishes = 1;
    rogue.until(|state| state.asked == 1).await;
    primary.stop().await;
}

/// I14: whatever is asked for waits somewhere.
#[tokio::test]
async fn i14_a_secondary_that_asks_for_too_many_switchovers_is_not_listened_to() {
    let change = |c: &mut SideConfig| {
        c.listen = Some(Endpoint::Unix { path: c.state_dir.with_extension("sock") });
        c.peer_timeout = Duration::from_secs(60);
    };
    let (_scratch, rogue, primary) = in_sync(change).await;
    // It reads nothing meanwhile: no answer leaves.
    rogue.state().wishes = 20_000;
    rogue.until(|state| state.starts.len() == 2).await;
    assert!(!rogue.state().said_all, "all of them wait for their answers");
    primary.wait_state("in-sync").await;
    primary.stop().await;
}
