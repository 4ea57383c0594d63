"""A primary whose disk is a quorum, by the original's command line: it is killed, its secondary takes
over, and it returns as a secondary on the quorum's own image and state directory, with what either side
wrote; then it is the primary again, as a quorum or as a disk.

Seen to fail with: an old primary whose own writes were not given up.
"""

import brep_iotest
from brep_roles import Sides

# deadline_s: 120
MIB = 1 << 20


def run(t):
    pair = Sides(t, size=32 * MIB)
    pair.start_secondary()
    quorum = ["--drive", "driver=quorum,read-pattern=fifo,id=vda,children.0.file.filename=p.raw,"
              "children.0.driver=raw,children.1.file.driver=nbd+colo,"
              f"children.1.file.path={t.dir}/s.sock,children.1.file.export=vda,"
              "children.1.driver=raw,children.1.ignore-errors=on", "--state-dir", "alpha"]

    def run_quorum():
        return t.brep_daemon("alpha", "primary", "--name", "alpha", *quorum, "--guest-listen",
                             t.uri("p.sock"), "--checkpoint-interval", "off",
                             ready=lambda: t.listens("alpha/control.sock"))

    alpha = run_quorum()
    pair.wait_promotable()
    pair.write("write -P 1 0 4M")
    pair.checkpoint()
    pair.write("write -P 2 8M 1M")
    alpha.kill9()
    pair.failover()
    pair.wait_state("beta", "promoted")
    t.qemu_io(pair.promoted(), "read -P 1 0 4M", "read -P 0 8M 1M", "write -P 3 16M 1M")
    t.log("killed and promoted to its checkpoint")

    pair.run_secondary("alpha", "--discard-local")
    pair.brep("beta", "peer", "set", t.uri("alpha-link.sock"))
    pair.wait_state("beta", "in-sync")
    sent = pair.status("beta")["counters"]["replicated-bytes"]
    t.expect(sent < 16 * MIB, f"{sent} bytes were sent")
    t.log("returned with what either side wrote")

    # And the guest goes home by a second failover.
    t.qemu_io(pair.promoted(), "write -P 4 20M 1M")
    pair.brep("beta", "checkpoint")
    pair.secondary.kill9()
    pair.brep("alpha", "failover")
    pair.wait_state("alpha", "promoted")
    pair.daemons["alpha"].stop()
    alpha = run_quorum()
    t.qemu_io(pair.guest(), "read -P 1 0 4M", "read -P 3 16M 1M", "read -P 4 20M 1M",
              "write -P 5 24M 1M")
    (t.dir / "s.sock").unlink(missing_ok=True)
    pair.start_secondary("--discard-local")
    pair.wait_state("alpha", "in-sync", deadline_s=30)
    pair.brep("alpha", "checkpoint")
    alpha.stop()
    pair.secondary.stop()
    pair.equal_files()
    t.log("the quorum is the primary again: equal")


brep_iotest.main(run)
