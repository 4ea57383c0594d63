"""A resync over a link that breaks every second makes progress, and so does one that either side's
kill interrupts, while the guest writes; in the end both disks are equal.

Seen to fail with: everything copied again after each break.
"""

import time

import brep_iotest
from brep_link import Relay
from brep_pair import Pair, Writer

# deadline_s: 150

MIB = 1 << 20


def run(t):
    pair = Pair(t, size=96 * MIB, primary=["--peer-timeout", "2s", "--resync-rate", "24M"])
    t.pattern_file("p.raw", 96 * MIB, seed=1)
    relay = Relay(t.dir / "r.sock", t.dir / "s.sock")
    pair.start_secondary()
    pair.start_primary("--peer", t.uri("r.sock"), peer=False)
    t.wait_until(lambda: t.listens("p.sock"), "the guest's socket")
    writer = Writer(t, pair.guest())

    # Far less can be copied between two breaks than there is, at this rate.
    left = []
    for _ in range(12):
        t.wait_until(lambda: is_resyncing(pair) or in_sync(pair), "a session", deadline_s=20)
        t.wait_until(Elapsed(1.0), "a second")
        t.expect(writer.write(5), "the guest writes")
        left.append(pair.disk_status("alpha")["bytes-behind"])
        relay.cut()
        if in_sync(pair):
            break
    t.expect(left[-1] < 16 * MIB, f"the copy went on after each break: {left}")
    # The last break may not have been noticed yet.
    t.wait_until(lambda: pair.brep("alpha", "checkpoint", code=None).code == 0, "a checkpoint", 30)
    t.log("a link that breaks every second: the first copy ended")

    # Both sides killed in the middle of a resync, the guest writing.
    pair.secondary.kill9()
    pair.wait_state("alpha", "disconnected")
    pair.write("write -P 5 32M 60M")
    pair.start_secondary()
    t.wait_until(lambda: is_resyncing(pair), "a resync")
    t.wait_until(Elapsed(0.7), "a part of it")
    t.expect(writer.write(5), "the guest writes during a resync")
    t.expect(pair.status("beta")["promotable"], "promotable to the last checkpoint meanwhile")
    pair.secondary.kill9()
    pair.start_secondary()
    t.wait_until(lambda: is_resyncing(pair), "the resync again")
    t.wait_until(Elapsed(0.7), "another part of it")
    behind = pair.disk_status("alpha")["bytes-behind"]
    t.expect(behind < 50 * MIB, f"it went on where it was: {behind}")
    writer.end()
    pair.primary.kill9()
    pair.start_primary("--peer", t.uri("r.sock"), peer=False)
    pair.wait_state("alpha", "in-sync", deadline_s=30)
    pair.wait_promotable()
    pair.checkpoint()
    t.log("killed on each side: the resync ended")
    pair.stop()
    relay.close()
    pair.equal_files()
    t.log("equal")


def is_resyncing(pair):
    return pair.disk_status("alpha")["state"] == "resyncing"


def in_sync(pair):
    return pair.disk_status("alpha")["state"] == "in-sync"


class Elapsed:
    """True from so many seconds after the first call on."""

    def __init__(self, seconds):
        self.seconds, self.begun = seconds, None

    def __call__(self):
        self.begun = self.begun or time.monotonic()
        return time.monotonic() - self.begun >= self.seconds


brep_iotest.main(run)
