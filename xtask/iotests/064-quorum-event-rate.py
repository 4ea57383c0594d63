"""Many failures in a second: the first event comes at once, the last when the second is over.

Seen to fail with: the second instead of the last event delivered; no limit at all.
"""

import time

import brep_iotest
from brep_mirror import Mirror

WRITES = 60


def run(t):
    for file in ["a.raw", "b.raw"]:
        t.qemu_img("create", "-f", "raw", file, "4M")
    server = t.qemu_nbd("server", "b.raw", "b.sock")
    mirror = Mirror(t, "vote-threshold=2,children.1.node-name=remote", "a.raw", t.uri("b.sock"))
    server.kill9()

    # Each fails for the node and for the mirror, at a place of its own; then the client flushes.
    sectors = [at * 8 for at in range(WRITES)]
    mirror.io(*(f"write {sector * 512} 512" for sector in sectors), code=1)
    for name, last in [("QUORUM_REPORT_BAD", ("flush", 0)), ("QUORUM_FAILURE", (None, sectors[-1]))]:
        t.wait_until(lambda: told(mirror, name)[-1] == last, f"the last {name}")
        t.equal(told(mirror, name)[0][1], 0, f"place of the first {name}")
        times = [when(event) for event in mirror.events() if event["event"] == name]
        # The clock of the machine may be set: not to the millisecond.
        gaps = [after - before for before, after in zip(times, times[1:])]
        t.expect(all(gap > 0.9 for gap in gaps), f"{name} at most once a second: {gaps}")
        t.expect(len(times) < WRITES / 4, f"{len(times)} {name} for {WRITES} failures")
        t.log(f"{name}: the first, the last, and few between")

    # After a quiet second the next one comes at once again: before the write is answered.
    quiet = when(mirror.events()[-1]) + 2
    t.wait_until(lambda: time.time() > quiet, "two quiet seconds")
    before = len(mirror.events())
    mirror.io("write 2M 512", code=1)
    answered = time.time()
    t.wait_until(lambda: len(mirror.events()) >= before + 2, "both events")
    for event in mirror.events()[before:before + 2]:
        t.equal(event["data"]["sector-num"], 4096, "place")
        t.expect(when(event) <= answered, f"at once, not {when(event) - answered:.1f} s later")
    t.log("at once again after a quiet second")
    mirror.execute("quit")
    t.equal(mirror.daemon.wait(), 1, "exit code: what was written is not on two children")


def told(mirror, name):
    """What these events tell of, in order."""
    return [(event["data"].get("type"), event["data"]["sector-num"])
            for event in mirror.events() if event["event"] == name]


def when(event):
    return event["timestamp"]["seconds"] + event["timestamp"]["microseconds"] / 1e6


brep_iotest.main(run)
