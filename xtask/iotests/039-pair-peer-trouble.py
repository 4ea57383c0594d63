"""A secondary that is absent, late, or stopped: the guest waits no longer than it should.

Seen to fail with: a peer timeout a hundred times as long.
"""

import time

import brep_iotest
from brep_pair import Pair

# deadline_s: 120


def run(t):
    # Absent, then late: the first copy starts when it comes.
    pair = Pair(t, primary=["--peer-timeout", "3s"])
    pair.start_primary()
    t.wait_until(lambda: t.listens("p.sock"), "the guest's socket")
    pair.write("write -P 1 0 1M", "read -P 1 0 1M")
    pair.brep("alpha", "checkpoint", code=3)
    t.log("absent: the guest is served")
    pair.start_secondary()
    pair.wait_promotable()
    pair.checkpoint()
    t.log("late: copied")

    # Stopped: reads go on, writes wait at most for the timeout, then go on alone.
    pair.secondary.pause()
    # One that may write flushes at its end, and a FLUSH waits for the secondary as writes do.
    read = lambda: t.qemu_io(pair.guest(), "read -P 1 0 1M", readonly=True)
    t.expect(seconds(read) < 2.5, "reads do not wait for the peer")
    took_s = seconds(lambda: pair.write("write -P 2 0 64k", "write -P 3 1M 64k", "flush"))
    t.expect(took_s < 12, f"writes waited {took_s:.1f} s in all, with a timeout of 3 s")
    t.expect(seconds(lambda: pair.status("alpha")) < 1, "status answers")
    pair.wait_state("alpha", "disconnected")
    pair.secondary.resume()
    pair.wait_state("alpha", "in-sync", deadline_s=30)
    pair.wait_promotable()
    pair.checkpoint()
    pair.stop()
    pair.equal_files()
    t.log("stopped: the guest goes on, and what was missed is copied")


def seconds(action):
    started = time.monotonic()
    action()
    return time.monotonic() - started


brep_iotest.main(run)
