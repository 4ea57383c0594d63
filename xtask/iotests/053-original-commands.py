"""The commands of QEMU's block replication, in a manager's order: both failovers, and a new start.

Seen to fail with: COLO_EXIT told again by the failover after a loss.
"""

import brep_iotest
from brep_control import Control
from brep_pair import Pair

# deadline_s: 120


def run(t):
    pair = Pair(t)
    pair.start_secondary("--no-start")
    pair.start_primary("--no-start")
    alpha, beta = (Control(t, f"{side}/control.sock") for side in ("alpha", "beta"))
    t.log("before:", beta.ask("query-xen-replication-status"))
    t.log(beta.refusal("xen-set-replication", enable=False, primary=False))
    t.log(beta.refusal("x-colo-lost-heartbeat"))
    t.log(beta.refusal("xen-set-replication", enable=True, primary=False, failover=False))
    t.log(beta.refusal("xen-set-replication", enable=True, primary=True))

    # The secondary's server runs from the start; stopped and started again it is the manager's.
    address = {"type": "unix", "data": {"path": str(t.dir / "s.sock")}}
    t.log(beta.refusal("nbd-server-start", addr=address))
    t.log(beta.refusal("nbd-server-add", device="vda", writable=True))
    beta.ask("nbd-server-stop")
    t.log("BLOCK_EXPORT_DELETED", beta.event("BLOCK_EXPORT_DELETED"))
    t.log(beta.refusal("nbd-server-stop"), "|", beta.refusal("nbd-server-add", device="vda"))
    beta.ask("nbd-server-start", addr=address)
    t.log(beta.refusal("nbd-server-add", device="vdx", writable=True))
    beta.ask("nbd-server-add", device="vda", writable=True)
    t.log("exports", beta.ask("query-block-exports"))

    # The secondary first, then the primary.
    beta.ask("xen-set-replication", enable=True, primary=False)
    alpha.ask("xen-set-replication", enable=True, primary=True)
    t.log(alpha.refusal("xen-set-replication", enable=True, primary=True))
    pair.wait_promotable()
    t.log("copied:", alpha.event("BLOCK_JOB_COMPLETED"))
    for control in (alpha, beta):
        t.log("running:", control.ask("query-colo-status"),
              control.ask("query-xen-replication-status"))
        t.log("nodes:", [(n["node-name"], n["drv"], n["backing_file_depth"])
                         for n in control.ask("query-named-block-nodes")])
        t.log("jobs:", control.ask("query-block-jobs"))
        t.log(control.refusal("block-job-cancel", device="vda"))
    pair.write("write -P 1 0 64k")
    alpha.ask("xen-colo-do-checkpoint")
    beta.ask("xen-colo-do-checkpoint")

    # The primary goes on alone, and comes back.
    for arguments in ({"child": "children.1", "node": "vda-peer"}, {}, {"child": "children.7"},
                      {"child": "children.0"}, {"node": "vda-peer"}, {"node": "other"}):
        t.log(alpha.refusal("x-blockdev-change", parent="vda", **arguments))
    t.log(alpha.refusal("x-blockdev-change", parent="vdx", child="children.1"))
    alpha.ask("x-blockdev-change", parent="vda", child="children.1")
    t.log(alpha.refusal("x-blockdev-change", parent="vda", child="children.1"))
    alpha.ask("x-colo-lost-heartbeat")
    t.log("COLO_EXIT", alpha.event("COLO_EXIT"), alpha.ask("query-colo-status"))
    t.log(alpha.refusal("x-colo-lost-heartbeat"))
    pair.write("write -P 2 0 64k")
    t.equal(pair.status("alpha")["replication"], "done", "the primary goes on alone")
    alpha.ask("x-blockdev-change", parent="vda", node="vda-peer")
    pair.wait_state("alpha", "in-sync", deadline_s=30)
    pair.wait_promotable()
    alpha.ask("xen-colo-do-checkpoint")
    t.log("attached again, and copied")

    # The secondary takes over.
    pair.write("write -P 3 0 64k")
    beta.ask("query-version")
    beta.events.clear()
    pair.primary.kill9()
    t.log("COLO_EXIT", beta.event("COLO_EXIT"), beta.ask("query-colo-status"))
    beta.ask("nbd-server-stop")
    t.expect(not t.listens("s.sock"), "the primary's door is closed")
    beta.events.clear()
    beta.ask("x-colo-lost-heartbeat")
    t.log("failover:", beta.ask("query-colo-status"))
    t.expect(all(e["event"] != "COLO_EXIT" for e in beta.events), "an exit is told once")
    t.qemu_io(pair.promoted(), "read -P 2 0 64k", "write -P 4 0 64k", "read -P 4 0 64k")
    t.log("promoted to the checkpoint, and served")
    t.wait_until(lambda: beta.ask("query-block-jobs") == [], "the merge has ended")
    beta.ask("xen-set-replication", enable=False, primary=False)
    beta.ask("xen-set-replication", enable=True, primary=True)
    t.log("after:", beta.ask("query-xen-replication-status"),
          beta.refusal("x-colo-lost-heartbeat"))
    beta.ask("quit")
    t.log("SHUTDOWN", beta.event("SHUTDOWN"))
    pair.secondary.wait()


brep_iotest.main(run)
