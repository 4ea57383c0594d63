"""A merge is killed while a new secondary is attached: the disk goes on with it, the secondary gets back
in sync, and in the end both are what they should be.

Seen to fail with: a guest's write, to what is merged already, that goes to the top layer alone.
"""

import brep_iotest
from brep_pair import Pair, snapshot

# deadline_s: 120
SIZE = 192 << 20


def run(t):
    t.pattern_file("p.raw", SIZE, seed=3)
    pair = Pair(t, size=SIZE).start()
    pair.checkpoint()
    snapshot(t, pair.guest(), "wanted.raw")
    for at in range(0, 192, 3):
        pair.write(f"write -P {at + 2} {at}M 2M")
    pair.primary.kill9()
    (t.dir / "p.sock").unlink()
    t.qemu_img("create", "-f", "raw", "g.raw", str(SIZE))
    gamma = t.brep_daemon("gamma", "secondary", "--name", "gamma", "--state-dir", "gamma",
                          "--listen", t.uri("gamma.sock"), "--disk", "vda=g.raw",
                          ready=lambda: t.listens("gamma/control.sock"))
    pair.brep("beta", "peer", "set", t.uri("gamma.sock"))
    pair.failover()
    interrupted = 0
    for round_ in range(4):
        if round_ > 1:
            wait_served(t, pair)
            commands = [f"write -P {100 + round_} {round_ * 40}M 300k", "flush"]
            t.qemu_io(pair.promoted(), *commands)
            t.qemu_io("wanted.raw", *commands)
        interrupted += pair.disk_status("beta")["merging"] is not None
        pair.secondary.kill9()
        (t.dir / "s.sock").unlink()
        pair.start_secondary("--checkpoint-interval", "off")
    wait_served(t, pair)
    t.qemu_img("compare", "-f", "raw", "-F", "raw", pair.promoted(), "wanted.raw")
    t.expect(interrupted > 0, "a merge was interrupted")
    pair.wait_state("beta", "in-sync", deadline_s=60)
    t.wait_until(lambda: pair.disk_status("beta")["merging"] is None, "the merge has ended", 60)
    t.qemu_io(pair.promoted(), "write -P 9 20M 1M")
    t.qemu_io("wanted.raw", "write -P 9 20M 1M")
    pair.brep("beta", "checkpoint")
    pair.secondary.stop()
    gamma.stop()
    for file in ("s.raw", "g.raw"):
        t.equal(t.sha256(file), t.sha256("wanted.raw"), f"hash of {file}")
    t.log("merged and in sync")


def wait_served(t, pair):
    """A primary that had a peer when it was killed asks that one first whether it is the disk now."""
    t.wait_until(lambda: t.qemu_io(pair.promoted(), "read 0 512", code=None).code == 0,
                 "the guest is served")


brep_iotest.main(run)
