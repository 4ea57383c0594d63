"""A brep primary feeds QEMU's replication secondary, with checkpoints and a failover.

Seen to fail with: writes not forwarded while the guest is not held.
"""

import brep_iotest
from brep_pair import snapshot
from brep_qemu import QemuSecondary

SIZE = 16 << 20


def run(t):
    t.pattern_file("p.raw", SIZE)
    t.qemu_img("create", "-f", "raw", "s.raw", str(SIZE))
    secondary = QemuSecondary(t, "s.raw", "s.sock", export="vda")
    primary = t.brep_daemon(
        "primary", "primary", "--disk", "vda=p.raw", "--state-dir", "alpha", "--peer",
        t.uri("s.sock"), "--peer-kind", "plain", "--guest-listen", t.uri("p.sock"),
        ready=lambda: t.listens("alpha/control.sock") and t.listens("p.sock"))
    wait_state(t, "in-sync")
    t.equal(t.sha256("p.raw"), t.sha256("s.raw"), "the replica")
    t.log("copied: the files are equal")

    guest = t.uri("p.sock", "vda")
    checkpoint(t, secondary)
    t.qemu_io(guest, "write -P 1 0 1M", "write -P 2 5M 64k", "write -z 9M 100k", "discard 10M 1M",
              "flush")
    t.log("checkpoint", "taken" if checkpoint(t, secondary) else "not taken")
    at_checkpoint = t.sha256("p.raw")
    t.equal(t.sha256("s.raw"), at_checkpoint, "the replica at the checkpoint")
    t.qemu_io(guest, "write -P 3 512k 1M", "write -P 4 8M 1M", "flush")
    t.equal(secondary.status(), None, "QEMU's status")

    primary.kill9()
    secondary.failover()
    secondary.wait_merged()
    secondary.stop()
    t.equal(t.sha256("s.raw"), at_checkpoint, "the promoted disk")
    t.log("promoted to the checkpoint")

    # The primary knows no identity of such a peer: nothing is copied without being asked for.
    secondary = QemuSecondary(t, "s.raw", "s.sock", export="vda", name="qemu-again")
    primary = t.brep_daemon(
        "primary-again", "primary", "--disk", "vda=p.raw", "--state-dir", "alpha", "--peer",
        t.uri("s.sock"), "--peer-kind", "plain", "--guest-listen", t.uri("p.sock"),
        ready=lambda: t.listens("alpha/control.sock") and t.listens("p.sock"))
    t.wait_until(lambda: status(t)["link"] == "refused", "the gap is noticed")
    t.qemu_io(guest, "read -P 4 8M 1M")
    brep(t, "checkpoint", code=3)
    brep(t, "resync", "--full")
    wait_state(t, "in-sync")
    checkpoint(t, secondary)
    primary.stop()
    secondary.execute("nbd-server-stop")
    secondary.stop()
    t.equal(t.sha256("s.raw"), t.sha256("p.raw"), "after the full copy")
    t.log("back in sync by command")


def checkpoint(t, secondary):
    """With the guest stopped, on both sides, as QEMU's secondary needs it."""
    control = t.control("alpha/control.sock")
    control.execute("stop")
    secondary.do_checkpoint()
    epoch = brep(t, "checkpoint", "--json").json["epoch"]
    control.execute("cont")
    control.close()
    return epoch


def wait_state(t, state):
    t.wait_until(lambda: status(t)["disks"][0]["state"] == state, state, 30)


def brep(t, *words, code=0):
    return t.brep(*words, "--control", "alpha/control.sock", code=code)


def status(t):
    return brep(t, "status", "--json").json


brep_iotest.main(run)
