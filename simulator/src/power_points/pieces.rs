//! The pieces: what happens in them, and what has to be true when the power has come back.

use brep_replication::config::{Durability, Role};
use serde_json::{Value, json};

use super::{Done, Pair, Piece, every_operation};
use crate::network::{GUEST_PORT, REPLICA_PORT};
use crate::world::{A, B, End};

macro_rules! step {
    ($function:ident) => {
        |pair| Box::pin($function(pair))
    };
}

async fn in_sync(pair: &mut Pair) -> Done {
    pair.start(A, Role::Primary);
    pair.start(B, Role::Secondary);
    pair.until_in_sync(A).await?;
    pair.plug(A, GUEST_PORT).await?;
    pair.checkpoint(A).await
}

async fn session(pair: &mut Pair) -> Done {
    for _ in 0..3 {
        pair.write(8, 16, false).await?;
        pair.write(101, 3, false).await?;
        pair.flush().await?;
        pair.checkpoint(A).await?;
        pair.write(0, 40, true).await?;
        pair.zero(96, 40).await?;
        pair.write(200, 5, false).await?;
    }
    Ok(())
}

/// The primary is gone for good.
async fn take_over(pair: &mut Pair) -> Done {
    pair.end(A, End::Kill).await;
    pair.start(B, Role::Secondary);
    pair.until(B, "up", |_| true).await?;
    pair.command(B, "failover", &[]).await?;
    pair.until_merged(B).await?;
    pair.check_checkpoint(B)
}

#[test]
fn a_session_and_its_commits() {
    let piece = Piece { before: step!(in_sync), script: step!(session), after: step!(take_over) };
    every_operation("a_session_and_its_commits", &piece, 30);
}

async fn alone_with_more(pair: &mut Pair) -> Done {
    in_sync(pair).await?;
    session(pair).await?;
    pair.end(A, End::Kill).await;
    // From here on the disk is the checkpoint.
    let last = pair.asked.last().cloned().ok_or("no checkpoint")?;
    pair.now = last;
    pair.safe = (0..).zip(pair.now.iter().copied()).collect();
    Ok(())
}

async fn promotion(pair: &mut Pair) -> Done {
    pair.command(B, "failover", &[]).await?;
    pair.answered = true;
    pair.plug(B, REPLICA_PORT).await?;
    pair.write(9, 2, false).await?;
    pair.flush().await?;
    pair.write(13, 1, true).await?;
    pair.write(202, 1, false).await?;
    pair.until_merged(B).await?;
    pair.write(120, 9, false).await?;
    pair.flush().await?;
    pair.write(121, 3, false).await
}

async fn goes_on_promoted(pair: &mut Pair) -> Done {
    pair.start(B, Role::Secondary);
    let status = pair.until(B, "up", |_| true).await?;
    if status["role"] == "secondary" {
        if pair.answered {
            return Err("the promotion that was answered is forgotten".to_owned());
        }
        pair.command(B, "failover", &[]).await?;
    }
    pair.until_merged(B).await?;
    pair.check_flushed(B)
}

#[test]
fn a_promotion_and_its_merge() {
    let piece = Piece {
        before: step!(alone_with_more),
        script: step!(promotion),
        after: step!(goes_on_promoted),
    };
    every_operation("a_promotion_and_its_merge", &piece, 30);
}

/// With `--durability process` a loss of power may take a checkpoint, and never what the guest has
/// flushed on the disk that it is served.
async fn merged_in_process_mode(pair: &mut Pair) -> Done {
    pair.durability = Durability::Process;
    alone_with_more(pair).await?;
    pair.command(B, "failover", &[]).await?;
    pair.answered = true;
    pair.plug(B, REPLICA_PORT).await?;
    pair.write(9, 2, false).await?;
    pair.until_merged(B).await?;
    pair.flush().await
}

async fn flushes(pair: &mut Pair) -> Done {
    for first in 0..20 {
        pair.write(9 * first, 16, false).await?;
        pair.flush().await?;
    }
    pair.write(200, 5, true).await
}

#[test]
fn what_is_flushed_behind_a_merge_in_process_mode() {
    let piece = Piece {
        before: step!(merged_in_process_mode),
        script: step!(flushes),
        after: step!(goes_on_promoted),
    };
    every_operation("what_is_flushed_behind_a_merge_in_process_mode", &piece, 4);
}

/// B was the primary, and was killed; A took over and has more.
async fn superseded(pair: &mut Pair) -> Done {
    in_sync(pair).await?;
    pair.command(A, "switchover", &[]).await?;
    pair.until(A, "a secondary", |status| status["role"] == "secondary").await?;
    pair.until_in_sync(B).await?;
    pair.plug(B, REPLICA_PORT).await?;
    pair.write(30, 20, false).await?;
    pair.flush().await?;
    pair.checkpoint(B).await?;
    pair.end(B, End::Kill).await;
    pair.command(A, "failover", &[]).await?;
    pair.until_merged(A).await?;
    pair.plug(A, GUEST_PORT).await?;
    pair.write(40, 30, false).await?;
    pair.flush().await
}

async fn rejoin(pair: &mut Pair) -> Done {
    pair.start_with(B, Role::Secondary, true);
    pair.until_in_sync(A).await?;
    pair.write(8, 16, false).await?;
    pair.checkpoint(A).await?;
    pair.write(8, 20, false).await
}

/// The operator starts B as before; once it has returned it has nothing to give up any more.
async fn comes_back(pair: &mut Pair) -> Done {
    pair.start_with(B, Role::Secondary, true);
    if let Err(why) = pair.until(B, "up", |_| true).await {
        if !why.contains("nothing is to be discarded here") {
            return Err(why);
        }
        pair.end(B, End::Kill).await;
        return in_the_end_equal(pair).await;
    }
    equal(pair).await
}

/// The primary is there still, and brings B to its line.
async fn in_the_end_equal(pair: &mut Pair) -> Done {
    pair.world.set_link(|link| link.down = false);
    pair.start(B, Role::Secondary);
    equal(pair).await
}

async fn equal(pair: &mut Pair) -> Done {
    let status = pair.until(B, "up", |_| true).await?;
    if status["promotable"] == true {
        // What it could be promoted to is checked by the others.
        pair.world.count("promotable after its power was lost");
    }
    let told = |status: &Value| {
        status["advice"] == "brep resync --full" || status["disks"][0]["state"] == "in-sync"
    };
    let told = pair.until(A, "in sync, or told what to do", told).await?;
    if told["advice"] == "brep resync --full" {
        pair.command(A, "resync", &[("full", json!(true))]).await?;
    }
    pair.until_in_sync(A).await?;
    pair.plug(A, GUEST_PORT).await?;
    pair.write(60, 3, false).await?;
    pair.checkpoint(A).await?;
    if pair.file(A)? != pair.file(B)? {
        return Err("I7: in sync, and not equal".to_owned());
    }
    // On A nothing was lost.
    match pair.file(A)? == pair.now {
        true => Ok(()),
        false => Err("I1: the primary's disk is not what the guest has written".to_owned()),
    }
}

#[test]
fn the_return_of_an_old_primary() {
    let piece =
        Piece { before: step!(superseded), script: step!(rejoin), after: step!(comes_back) };
    every_operation("the_return_of_an_old_primary", &piece, 30);
}

/// The pair is apart, and the secondary has pre-images.
async fn apart(pair: &mut Pair) -> Done {
    in_sync(pair).await?;
    session(pair).await?;
    pair.world.set_link(|link| link.down = true);
    pair.world.cut_link();
    pair.write(0, 300, false).await?;
    let behind = |status: &Value| status["disks"][0]["state"] == "disconnected";
    pair.until(A, "behind", behind).await.map(drop)
}

async fn discard_checkpoint(pair: &mut Pair) -> Done {
    pair.command(A, "resync", &[("discard-checkpoint", json!(true))]).await?;
    pair.world.set_link(|link| link.down = false);
    pair.until_in_sync(A).await?;
    pair.write(8, 20, false).await
}

#[test]
fn a_checkpoint_that_is_given_up() {
    let piece = Piece {
        before: step!(apart),
        script: step!(discard_checkpoint),
        after: step!(in_the_end_equal),
    };
    every_operation("a_checkpoint_that_is_given_up", &piece, 30);
}

async fn written_to(pair: &mut Pair) -> Done {
    in_sync(pair).await?;
    pair.write(8, 16, false).await?;
    pair.flush().await
}

/// B's disks are slow: everybody has been told, and the guest is there, before anything is flushed
/// that need not have been flushed before.
async fn switchover(pair: &mut Pair) -> Done {
    pair.slow_disks(B);
    pair.command(A, "switchover", &[]).await?;
    pair.answered = true;
    pair.plug(B, REPLICA_PORT).await?;
    pair.write(50, 5, false).await?;
    pair.flush().await?;
    pair.until_in_sync(B).await?;
    pair.checkpoint(B).await?;
    pair.write(52, 5, false).await
}

/// Nobody, or one side, is the primary; what was flushed is there.
async fn one_primary(pair: &mut Pair) -> Done {
    pair.start(B, Role::Secondary);
    let b = pair.until(B, "up", |_| true).await?;
    let primary = |status: &Value| status["role"] != "secondary";
    let settled =
        |status: &Value| status["role"] == "secondary" || status["disks"][0]["state"] == "in-sync";
    if pair.answered && !primary(&b) {
        return Err("the switchover that was answered is forgotten".to_owned());
    }
    if primary(&b) {
        pair.until_merged(B).await?;
        pair.until(A, "a secondary", |status| status["role"] == "secondary").await?;
        return pair.check_flushed(B);
    }
    let a = pair.until(A, "settled", settled).await?;
    if !primary(&a) {
        pair.command(B, "failover", &[]).await?;
        pair.until_merged(B).await?;
        return pair.check_flushed(B);
    }
    pair.check_flushed(A)
}

#[test]
fn a_switchover() {
    let piece =
        Piece { before: step!(written_to), script: step!(switchover), after: step!(one_primary) };
    every_operation("a_switchover", &piece, 60);
}
