//! A primary's node over NBD, in a quorum with the primary's disk: D29, D30, and who learns of a
//! failure.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use brep_block::{BlockDevice, Memory, Operation, Replication, ReplicationMode, Rule};
use brep_nbd::Endpoint;
use brep_nbd::client::{Client, ClientStatus, ConnectOptions, ReconnectPolicy};
use brep_nbd::server::{Export, Server, ServerConfig, StaticExports};
use brep_quorum::{Child, Quorum, QuorumEvent, QuorumOptions, ReadPattern};
use brep_replication::node::{Forward, PrimaryNode, Stage};

use crate::support::*;

const PRIMARY: ReplicationMode = ReplicationMode::Primary;

/// The secondary's NBD server.
pub(crate) struct Nbd {
    server: Arc<Server>,
    exports: Arc<StaticExports>,
}

impl Nbd {
    pub(crate) async fn listen(endpoint: &Endpoint) -> Self {
        let exports = Arc::new(StaticExports::new());
        let server = Server::new(Arc::clone(&exports) as _, ServerConfig::default());
        let listener = Server::bind(endpoint).await.unwrap();
        let serving = Arc::clone(&server);
        tokio::spawn(async move { serving.serve(listener).await });
        Nbd { server, exports }
    }

    pub(crate) fn export(&self, device: Arc<dyn BlockDevice>) {
        assert!(self.exports.add(Export::new("vda", device)));
    }

    /// Connections end without an answer to what is pending.
    pub(crate) async fn kill(self) {
        self.server.shutdown(Duration::ZERO).await;
    }
}

/// A primary: local disk first, then the node.
pub(crate) struct Primary {
    disk: Probe,
    pub(crate) client: Arc<Client>,
    pub(crate) node: Arc<PrimaryNode>,
    pub(crate) quorum: Arc<Quorum>,
    events: Arc<Mutex<Vec<QuorumEvent>>>,
}

impl Primary {
    pub(crate) fn new(endpoint: Endpoint) -> Self {
        let options =
            ConnectOptions { name: "peer".into(), ..ConnectOptions::new(endpoint, "vda") };
        let client = Arc::new(Client::new(options, ReconnectPolicy::default()));
        let node = PrimaryNode::new("p", Forward::Client(Arc::clone(&client)));
        let disk = Probe::new(Memory::new("p_local", MIB));
        let children =
            vec![Child::new(disk.device()), Child::new(Arc::clone(&node) as _).ignore_errors()];
        let events = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&events);
        let options = QuorumOptions::new("quorum", 1, children)
            .read_pattern(ReadPattern::Fifo)
            .events(move |event| seen.lock().unwrap().push(event));
        Primary { disk, client, node, quorum: Quorum::new(options).unwrap(), events }
    }

    fn events(&self) -> Vec<QuorumEvent> {
        std::mem::take(&mut self.events.lock().unwrap())
    }

    async fn lost(&self) {
        self.client.wait_for_status(|s| !matches!(s, ClientStatus::Connected)).await;
    }
}

fn is_bad_disk(event: &QuorumEvent) -> bool {
    matches!(event, QuorumEvent::ReportBad { node_name, .. } if node_name == "p_local")
}

pub(crate) fn socket() -> (tempfile::TempDir, Endpoint) {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("nbd.sock");
    (scratch, Endpoint::Unix { path })
}

async fn pair(s: &S) -> (tempfile::TempDir, Nbd, Primary) {
    let (scratch, endpoint) = socket();
    let nbd = Nbd::listen(&endpoint).await;
    nbd.export(s.local());
    let p = Primary::new(endpoint);
    p.quorum.start(PRIMARY).await.unwrap();
    (scratch, nbd, p)
}

/// Row: §4.6, §7.4.
#[test]
fn d29_primary_started_before_the_export_fails_and_can_be_started_again() {
    run(async {
        let (_scratch, endpoint) = socket();
        let p = Primary::new(endpoint.clone());
        // Nobody listens.
        p.node.start(PRIMARY).await.unwrap_err();
        assert_eq!(p.node.stage(), Stage::None);
        let nbd = Nbd::listen(&endpoint).await;
        // Somebody listens and has no such export.
        let error = p.node.start(PRIMARY).await.unwrap_err();
        assert_eq!(error.node(), "p");
        assert_eq!(p.node.stage(), Stage::None);
        refused(p.node.error().await, NOT_RUNNING);
        refused(p.quorum.start(PRIMARY).await, "No child supports block replication");
        is_eio(write(&*p.node, 0, 512, 0x22).await);
        // The guest does not notice.
        write(&*p.quorum, 0, 512, 0x22).await.unwrap();

        let s = Setup::subclusters(MIB).started().await;
        nbd.export(s.local());
        p.quorum.start(PRIMARY).await.unwrap();
        write(&*p.quorum, 0, 512, 0x33).await.unwrap();
        expect(&*s.base.inner, 0, 512, 0x33).await;
        expect(&*s.node, 0, 512, 0x11).await;
        p.quorum.error().await.unwrap();
        p.quorum.stop(true).await.unwrap();
        assert!(matches!(p.client.status(), ClientStatus::Disconnected));
    });
}

/// Row: §14.48.
#[test]
fn d30_connection_lost_while_running_does_not_disturb_the_guest() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let (_scratch, nbd, p) = pair(&s).await;
        write(&*p.quorum, 0, 4096, 0x22).await.unwrap();
        p.quorum.error().await.unwrap();
        // One write is under way when the connection is lost.
        let hang = s.base.fault.hang(Rule::new(Operation::Write));
        let quorum = Arc::clone(&p.quorum);
        let pending = tokio::spawn(async move { write(&*quorum, 4096, 4096, 0x22).await });
        hang.reached(1).await;
        nbd.kill().await;
        pending.await.unwrap().unwrap();
        p.lost().await;
        write(&*p.quorum, 8192, 4096, 0x22).await.unwrap();
        expect(&*p.quorum, 0, 12 * KIB, 0x22).await;
        reports_io_error(p.quorum.error().await);
        assert_eq!(p.node.stage(), Stage::Running);
        assert_eq!(p.events(), [], "the guest's disk has not failed");
        expect(&*s.base.inner, 8192, 4096, 0x11).await;
        // The manager fails over here: stop, then out of the quorum.
        p.quorum.stop(true).await.unwrap();
        p.quorum.remove_child("children.1").await.unwrap();
        write(&*p.quorum, 0, 4096, 0x44).await.unwrap();
        expect(&*p.quorum, 0, 4096, 0x44).await;
        hang.release();
    });
}

/// Row: §14.47.
#[test]
fn who_learns_primary_disk_read_error_the_guest_and_the_manager() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let (_scratch, _nbd, p) = pair(&s).await;
        p.disk.fault.fail(Rule::new(Operation::Read));
        is_eio(p.quorum.read(0, 512).await);
        assert!(p.events().iter().any(is_bad_disk));
        p.quorum.error().await.unwrap();
    });
}

/// The guest's part is the quorum's result: with a threshold of 1 a write that was forwarded
/// counts. With one of 2 it is the guest who learns.
///
/// Row: §14.47.
#[test]
fn who_learns_primary_disk_write_error_the_quorum_decides() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        let (_scratch, _nbd, p) = pair(&s).await;
        let children = vec![Child::new(p.disk.device()), Child::new(Arc::clone(&p.node) as _)];
        let options = QuorumOptions::new("strict", 2, children).read_pattern(ReadPattern::Fifo);
        let strict = Quorum::new(options).unwrap();
        p.disk.fault.fail(Rule::new(Operation::Write).forever());
        is_eio(write(&*strict, 0, 512, 0x22).await);
        write(&*p.quorum, 0, 512, 0x22).await.unwrap();
        assert!(p.events().iter().any(is_bad_disk));
        p.quorum.error().await.unwrap();
    });
}

/// Of the copy, of the disk: the primary's manager learns of both through the primary's node, and
/// neither guest nor the secondary's manager does.
///
/// Row: §13.9, §14.49, §14.50, §14.54.
#[test]
fn who_learns_secondary_failure_under_the_primarys_write_the_primarys_manager() {
    run(async {
        for of_the_copy in [true, false] {
            let s = Setup::subclusters(MIB).started().await;
            let (_scratch, _nbd, p) = pair(&s).await;
            let fault = if of_the_copy { &s.hidden.fault } else { &s.base.fault };
            fault.fail(Rule::new(Operation::Write).forever());
            write(&*p.quorum, 0, 4096, 0x22).await.unwrap();
            reports_io_error(p.quorum.error().await);
            assert_eq!(p.events(), []);
            s.node.error().await.unwrap();
            expect(&*s.node, 0, MIB, 0x11).await;
            expect(&*s.base.inner, 0, MIB, 0x11).await;
        }
    });
}

/// Row: §14.50.
#[test]
fn who_learns_secondary_disk_or_hidden_error_under_a_guest_read_the_guest() {
    run(async {
        let s = Setup::subclusters(MIB).started().await;
        write(&*s.local(), 0, 4096, 0x22).await.unwrap();
        s.base.fault.fail(Rule::new(Operation::Read));
        is_eio(s.node.read(64 << 10, 512).await);
        s.hidden.fault.fail(Rule::new(Operation::Read));
        is_eio(s.node.read(0, 512).await);
        s.active.fault.fail(Rule::new(Operation::Write).forever());
        is_eio(write(&*s.node, 0, 4096, 0x33).await);
        s.node.error().await.unwrap();
        expect(&*s.node, 0, MIB, 0x11).await;
    });
}
