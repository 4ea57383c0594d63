//! Rows of the first series' tables (series v3) that the T and D cases do not have: sections 4, 7
//! (the client that connects later), 8 (targets), 11 (the active disk's states). The names say
//! which.

use std::sync::Arc;

use brep_block::{
    BlockDevice, ErrorKind, FlushLevel, Memory, Replication, ReplicationMode, ZeroFlags,
};
use brep_nbd::Endpoint;
use brep_nbd::client::{Client, ClientStatus, ConnectOptions, ReconnectPolicy};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use brep_quorum::{Child, Quorum, QuorumOptions, ReadPattern};
use brep_replication::node::{
    Forward, PrimaryNode, ReferenceTarget, Stage, checkpoint_all, error_all, start_all, stop_all,
};

use crate::support::*;

const PRIMARY: ReplicationMode = ReplicationMode::Primary;
const SECONDARY: ReplicationMode = ReplicationMode::Secondary;
const UNSUPPORTED: &str = "this feature or command is not currently supported";

/// A node whose client has not connected, and the address that it will connect to.
fn client() -> (tempfile::TempDir, Endpoint, Arc<Client>, Arc<PrimaryNode>) {
    let scratch = tempfile::tempdir().unwrap();
    let endpoint = Endpoint::Unix { path: scratch.path().join("nbd.sock") };
    let options = ConnectOptions::new(endpoint.clone(), "vda");
    let client = Arc::new(Client::new(options, ReconnectPolicy::default()));
    let node = PrimaryNode::new("p", Forward::Client(Arc::clone(&client)));
    (scratch, endpoint, client, node)
}

async fn serve(endpoint: &Endpoint, size: u64) -> Arc<Memory> {
    let exports = Arc::new(StaticExports::new());
    let disk = Memory::new("replica", size);
    assert!(exports.add(Export::new("vda", Arc::clone(&disk) as _)));
    let listener = Server::bind(endpoint).await.unwrap();
    let server = Server::new(exports, ServerConfig::default());
    tokio::spawn(async move { server.serve(listener).await });
    disk
}

/// What changes fails and is not forwarded. A flush has nothing to make durable then, and does not
/// fail: the original's fails, and its quorum counts that as a success.
#[test]
fn s4_while_not_connected_requests_fail_and_the_length_is_0() {
    run(async {
        let (_scratch, _, client, node) = client();
        assert_eq!((node.size(), client.size()), (0, 0));
        is_eio(node.read(0, 512).await);
        is_eio(write(&*node, 0, 512, 1).await);
        is_eio(node.write_zeroes(0, 512, ZeroFlags::default()).await);
        is_eio(node.discard(0, 512).await);
        flush(&*node).await.unwrap();
        is_eio(client.flush(FlushLevel::Durable).await);
    });
}

#[test]
fn s4_an_unconnected_child_has_no_say_in_the_length_and_gets_one_when_it_connects() {
    run(async {
        let (_scratch, endpoint, client, node) = client();
        let disk = Memory::new("p_local", MIB);
        let child = Child::new(Arc::clone(&node) as _).ignore_errors();
        let options = QuorumOptions::new("quorum", 1, vec![Child::new(disk), child])
            .read_pattern(ReadPattern::Fifo);
        let quorum = Quorum::new(options).unwrap();
        assert_eq!((quorum.size(), node.size()), (MIB, 0));
        write(&*quorum, 0, 512, 0x22).await.unwrap();
        let replica = serve(&endpoint, MIB).await;
        quorum.start(PRIMARY).await.unwrap();
        assert_eq!((quorum.size(), node.size(), client.size()), (MIB, MIB, MIB));
        write(&*quorum, 0, 512, 0x33).await.unwrap();
        expect(&*replica, 0, 512, 0x33).await;
    });
}

/// The original forgets the name with the first attempt, whatever becomes of it.
#[test]
fn s4_the_export_name_outlives_a_failed_start() {
    run(async {
        let (_scratch, endpoint, client, node) = client();
        for _ in 0..2 {
            let error = node.start(PRIMARY).await.unwrap_err();
            assert_eq!((error.kind(), node.stage()), (ErrorKind::NotConnected, Stage::None));
        }
        serve(&endpoint, MIB).await;
        node.start(PRIMARY).await.unwrap();
        assert_eq!(client.size(), MIB);
    });
}

#[test]
fn s7_start_with_another_mode_does_not_connect() {
    run(async {
        let (_scratch, endpoint, client, node) = client();
        serve(&endpoint, MIB).await;
        for mode in [SECONDARY, ReplicationMode::Unprotected] {
            let error = node.start(mode).await.unwrap_err();
            assert!(error.detail().starts_with("The parameter mode's value is invalid"), "{error}");
            assert!(matches!(client.status(), ClientStatus::Disconnected));
        }
    });
}

/// The texts are those of a node in its stages: the original has "The connection is established"
/// and "The connection is not established".
#[test]
fn s7_calls_connected_and_not() {
    run(async {
        let (_scratch, endpoint, client, node) = client();
        refused(node.checkpoint().await, NOT_RUNNING);
        refused(node.stop(false).await, NOT_RUNNING);
        let replica = serve(&endpoint, MIB).await;
        node.start(PRIMARY).await.unwrap();
        assert!(matches!(client.status(), ClientStatus::Connected));
        refused(node.start(PRIMARY).await, RUNNING_OR_DONE);
        write(&*node, 0, 512, 0x22).await.unwrap();
        node.checkpoint().await.unwrap();
        expect(&*replica, 0, 512, 0x22).await;
        node.stop(false).await.unwrap();
        assert!(matches!(client.status(), ClientStatus::Disconnected));
        is_eio(write(&*node, 0, 512, 0x33).await);
        expect(&*replica, 0, 512, 0x22).await;
    });
}

/// Patch 13: whoever calls every disk calls the target too, which has nothing to do.
#[test]
fn s8_start_checkpoint_and_stop_skip_a_target() {
    run(async {
        let s = Setup::subclusters(MIB).build().await;
        let target = ReferenceTarget::new(Arc::clone(&s.base.inner));
        let used = target.refer("s").unwrap();
        let disks = [Arc::clone(&target) as Arc<dyn BlockDevice>, Arc::clone(&s.node) as _];
        start_all(&disks, SECONDARY).await.unwrap();
        error_all(&disks).await.unwrap();
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        checkpoint_all(&disks).await.unwrap();
        expect(&*s.node, 0, 4096, 0x22).await;
        write(&*s.local(), 0, 4096, 0x44).await.unwrap();
        stop_all(&disks, true).await.unwrap();
        s.merged().await;
        expect(&*target, 0, 4096, 0x22).await;
        // Nobody refers to it any more: it is a disk that cannot replicate.
        drop(used);
        refused(start_all(&disks[..1], SECONDARY).await, UNSUPPORTED);
        for result in [
            checkpoint_all(&disks[..1]).await,
            stop_all(&disks[..1], false).await,
            error_all(&disks[..1]).await,
        ] {
            refused(result, UNSUPPORTED);
        }
    });
}

/// One that cannot start undoes what was started, and a target in between does not hinder.
#[test]
fn s8_a_start_that_fails_behind_a_target_stops_those_before_it() {
    run(async {
        let one = Setup::new(MIB).build().await;
        let two = Setup { top_id: "nobody", ..Setup::new(MIB) }.build().await;
        let target = ReferenceTarget::new(Memory::new("t", MIB));
        let _used = target.refer("one").unwrap();
        let disks =
            [Arc::clone(&one.node) as Arc<dyn BlockDevice>, target, Arc::clone(&two.node) as _];
        refused(start_all(&disks, SECONDARY).await, "No top_bs or it is invalid");
        assert_eq!([one.node.stage(), two.node.stage()], [Stage::Done, Stage::None]);
    });
}

/// Patch 14, and the operation blocker: one user at a time, who gives it back.
#[test]
fn s8_a_target_and_a_guest_devices_disk_exclude_each_other() {
    let target = ReferenceTarget::new(Memory::new("y", MIB));
    let text = |result: brep_block::Result<_>| {
        let error = result.map(drop).unwrap_err();
        assert_eq!((error.kind(), error.errno()), (ErrorKind::Locked, 16));
        error.detail().to_owned()
    };
    let guest = target.attach().unwrap();
    assert_eq!(text(target.refer("x")), "backing_hd y is used by the other device model");
    drop(guest);
    let reference = target.refer("x").unwrap();
    let busy = "Node 'y' is busy: it is used as the backing reference of x";
    assert_eq!(text(target.attach()), busy);
    assert_eq!(text(target.refer("z")), busy);
    // A refusal takes nothing away, and the close of x gives it back.
    assert_eq!(text(target.refer("z")), busy);
    drop(reference);
    drop(target.attach().unwrap());
}

#[test]
fn s8_a_target_keeps_its_size_as_long_as_it_is_one() {
    run(async {
        let target = ReferenceTarget::new(Memory::new_growable("y", MIB));
        let used = target.refer("x").unwrap();
        let error = target.truncate(2 * MIB).await.unwrap_err();
        assert_eq!((error.errno(), target.size()), (16, MIB));
        drop(used);
        target.truncate(2 * MIB).await.unwrap();
        assert_eq!(target.size(), 2 * MIB);
    });
}

#[test]
fn a_target_obeys_the_rules_of_every_device() {
    run(async {
        let make =
            async |size: u64| ReferenceTarget::new(Memory::new("y", size)) as Arc<dyn BlockDevice>;
        let options = brep_block::conformance::Options::default().operations(100);
        brep_block::conformance::run(make, options).await.unwrap();
    });
}

#[test]
fn s11_io_none_every_request_fails() {
    run(async {
        let s = Setup::new(MIB).build().await;
        is_eio(s.node.read(0, 512).await);
        is_eio(write(&*s.node, 0, 512, 1).await);
        is_eio(s.node.write_zeroes(0, 512, ZeroFlags::default()).await);
        is_eio(s.node.discard(0, 512).await);
        is_eio(flush(&*s.node).await);
    });
}

#[test]
fn s11_io_done_requests_go_to_the_secondary_disk() {
    run(async {
        let s = Setup::new(MIB).started().await;
        write(&*s.node, 0, 512, 0x33).await.unwrap();
        s.node.stop(true).await.unwrap();
        s.merged().await;
        s.active.count.reset();
        s.hidden.count.reset();
        write(&*s.node, 4096, 512, 0x44).await.unwrap();
        s.node.write_zeroes(8192, 512, ZeroFlags::default()).await.unwrap();
        s.node.discard(16384, 512).await.unwrap();
        flush(&*s.node).await.unwrap();
        for (at, byte) in [(0, 0x33), (4096, 0x44), (8192, 0), (16384, 0)] {
            expect(&*s.base.inner, at, 512, byte).await;
            expect(&*s.node, at, 512, byte).await;
        }
        assert_eq!(s.active.changes() + s.hidden.changes(), 0);
    });
}

#[test]
fn s11_start_running_and_done_are_refused() {
    run(async {
        let s = Setup::new(MIB).started().await;
        refused(s.node.start(SECONDARY).await, RUNNING_OR_DONE);
        s.node.stop(true).await.unwrap();
        s.merged().await;
        refused(s.node.start(SECONDARY).await, CANNOT_RESTART);
    });
}

/// The export is closed before anything is merged: what a client still sends is not carried out.
#[test]
fn s11_stop_closes_the_export_first() {
    run(async {
        for failover in [false, true] {
            let s = Setup::new(MIB).started().await;
            let export = s.local();
            s.node.stop(failover).await.unwrap();
            assert!(s.node.local().is_none());
            is_eio(write(&*export, 0, 512, 0x22).await);
            s.merged().await;
            is_eio(write(&*export, 0, 512, 0x22).await);
            expect(&*s.base.inner, 0, MIB, 0x11).await;
        }
    });
}

/// The original's second stop acts on an export that is gone.
#[test]
fn s11_stop_in_every_state_but_running() {
    run(async {
        let s = Setup::new(MIB).build().await;
        refused(s.node.stop(true).await, NOT_RUNNING);
        refused(s.node.stop(false).await, NOT_RUNNING);
        s.start().await.unwrap();
        s.node.stop(false).await.unwrap();
        write(&*s.node, 0, 512, 0x22).await.unwrap();
        s.node.stop(true).await.unwrap();
        expect(&*s.base.inner, 0, 512, 0x22).await;
    });
}

/// Rows "job gone" of start and stop: the job is begun by start itself, and without it a stop with
/// failover still leads to the last checkpoint.
#[test]
fn s11_stop_without_the_job_leads_to_the_last_checkpoint() {
    run(async {
        let s = Setup::new(MIB).started().await;
        write(&*s.local(), 0, 512, 0x22).await.unwrap();
        write(&*s.node, 8192, 512, 0x33).await.unwrap();
        s.node.cancel_job();
        refused(s.node.checkpoint().await, JOB_CANCELLED);
        s.node.stop(true).await.unwrap();
        s.merged().await;
        expect(&*s.base.inner, 0, 8192, 0x11).await;
        expect(&*s.base.inner, 8192, 512, 0x33).await;
    });
}
