//! The NBD child that connects when replication starts (series, §4 and §7), and as a child that
//! a quorum gets while it runs (§13).

use std::sync::Arc;

use brep_block::{BlockDevice, Replication, ReplicationMode};
use brep_nbd::Endpoint;
use brep_nbd::client::ClientStatus;
use brep_quorum::{Child, Quorum, QuorumOptions, ReadPattern};
use brep_replication::node::Stage;
use tokio::net::UnixListener;

use crate::primary_nbd::{Nbd, Primary, socket};
use crate::support::*;

const PRIMARY: ReplicationMode = ReplicationMode::Primary;

/// A secondary that runs, its server, and a primary that has not been started.
async fn ready() -> (S, tempfile::TempDir, Nbd, Primary) {
    let s = Setup::subclusters(MIB).started().await;
    let (scratch, endpoint) = socket();
    let nbd = Nbd::listen(&endpoint).await;
    nbd.export(s.local());
    let p = Primary::new(endpoint);
    (s, scratch, nbd, p)
}

fn is_disconnected(p: &Primary) -> bool {
    matches!(p.client.status(), ClientStatus::Disconnected)
}

/// Row: §4.1, §4.2, §4.3.
#[test]
fn series_s04_nothing_is_connected_before_the_start() {
    run(async {
        let (_scratch, endpoint) = socket();
        let Endpoint::Unix { path } = &endpoint else { panic!("not a path: {endpoint}") };
        let listener = UnixListener::bind(path).unwrap();
        let p = Primary::new(endpoint.clone());
        assert_eq!(p.node.size(), 0);
        is_eio(p.node.read(0, 512).await);
        is_eio(write(&*p.node, 0, 512, 0x22).await);
        is_eio(p.node.discard(0, 512).await);
        is_eio(write(&*p.client, 0, 512, 0x22).await);
        is_eio(flush(&*p.client).await);
        // The quorum's disk is as long as its local child, and its guest is served.
        assert_eq!(p.quorum.size(), MIB);
        write(&*p.quorum, 0, 512, 0x22).await.unwrap();
        flush(&*p.quorum).await.unwrap();
        settle().await;
        tokio::select! {
            biased;
            accepted = listener.accept() => panic!("a connection before the start: {accepted:?}"),
            () = settle() => {}
        }
    });
}

/// Row: §4.5, §7.3.
#[test]
fn series_s07_start_connects_and_the_length_is_the_exports() {
    run(async {
        let (_s, _scratch, _nbd, p) = ready().await;
        assert_eq!(p.node.size(), 0);
        p.node.start(PRIMARY).await.unwrap();
        assert!(matches!(p.client.status(), ClientStatus::Connected));
        assert_eq!((p.node.size(), p.quorum.size()), (MIB, MIB));
    });
}

/// When connected, it is the state that is named, and not the mode.
///
/// Row: §7.1, §7.2.
#[test]
fn series_s07_start_in_another_mode_is_refused() {
    run(async {
        let (_s, _scratch, _nbd, p) = ready().await;
        for (mode, number) in
            [(ReplicationMode::Secondary, "1"), (ReplicationMode::Unprotected, "-1")]
        {
            let text = format!("The parameter mode's value is invalid, needs 0, but got {number}");
            refused(p.node.start(mode).await, &text);
            assert!(is_disconnected(&p), "{mode:?}");
            assert_eq!(p.node.stage(), Stage::None);
        }
        p.node.start(PRIMARY).await.unwrap();
        for mode in [ReplicationMode::Secondary, ReplicationMode::Unprotected] {
            refused(p.node.start(mode).await, RUNNING_OR_DONE);
        }
        assert_eq!(p.node.stage(), Stage::Running);
    });
}

/// The quorum discards what its child says.
///
/// Row: §6.10, §7.5.
#[test]
fn series_s07_start_when_connected_is_refused_and_changes_nothing() {
    run(async {
        let (s, _scratch, _nbd, p) = ready().await;
        p.quorum.start(PRIMARY).await.unwrap();
        refused(p.node.start(PRIMARY).await, RUNNING_OR_DONE);
        refused(p.quorum.start(PRIMARY).await, "No child supports block replication");
        write(&*p.quorum, 0, 512, 0x22).await.unwrap();
        expect(&*s.base.inner, 0, 512, 0x22).await;
        p.quorum.stop(true).await.unwrap();
    });
}

/// Row: §7.6, §7.7, §7.8, §7.9.
#[test]
fn series_s07_checkpoint_and_stop_when_disconnected_and_connected() {
    run(async {
        let (s, _scratch, _nbd, p) = ready().await;
        refused(p.node.checkpoint().await, NOT_RUNNING);
        refused(p.node.stop(true).await, NOT_RUNNING);
        p.node.start(PRIMARY).await.unwrap();
        s.base.count.reset();
        s.hidden.count.reset();
        p.node.checkpoint().await.unwrap();
        assert_eq!((s.base.changes(), s.hidden.changes()), (0, 0), "it does nothing");
        p.node.stop(true).await.unwrap();
        assert!(is_disconnected(&p));
        // It is done: a new node is made for a new start.
        refused(p.node.start(PRIMARY).await, CANNOT_RESTART);
        p.node.stop(true).await.unwrap();
        assert!(is_disconnected(&p));
    });
}

/// The way of the series from its seventh version on.
///
/// Row: §13.2.
#[test]
fn series_s13_a_replicating_child_comes_and_goes_while_the_guest_writes() {
    run(async {
        let (s, _scratch, _nbd, p) = ready().await;
        let disk = Probe::new(brep_block::Memory::new("p_local", MIB));
        fill(&*disk.inner, 0, MIB, 0x11).await;
        let children = vec![Child::new(disk.device())];
        let options = QuorumOptions::new("alone", 1, children).read_pattern(ReadPattern::Fifo);
        let quorum = Quorum::new(options).unwrap();
        refused(quorum.start(PRIMARY).await, "No child supports block replication");
        p.client.connect().await.unwrap();
        let added = Child::new(Arc::clone(&p.node) as _).ignore_errors();
        let name = quorum.add_child(added).await.unwrap();
        quorum.start(PRIMARY).await.unwrap();
        write(&*quorum, 0, 4096, 0x22).await.unwrap();
        expect(&*s.base.inner, 0, 4096, 0x22).await;
        expect(&*s.node, 0, 4096, 0x11).await;
        quorum.stop(false).await.unwrap();
        quorum.remove_child(&name).await.unwrap();
        write(&*quorum, 0, 4096, 0x44).await.unwrap();
        expect(&*s.base.inner, 0, 4096, 0x22).await;
    });
}
