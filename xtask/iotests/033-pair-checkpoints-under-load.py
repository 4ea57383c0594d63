"""Checkpoints under load are crash-consistent: the writer's own numbers prove each cut.

Seen to fail with: the cut sent before the writes of its epoch have ended (in every second run).
"""

import threading

import brep_iotest
from brep_pair import Pair, Writer, count_writes, snapshot

# deadline_s: 120

WRITERS = 4
BLOCK = 16 << 10
REGION = 16 << 20
BLOCKS = REGION // BLOCK
CUTS = 8


def run(t):
    for ack in ("sync", "async"):
        t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
        pair = Pair(t, size=WRITERS * REGION, primary=["--ack", ack]).start()
        writers = [Writer(t, pair.guest(), n * REGION, BLOCK) for n in range(WRITERS)]
        loads = [threading.Thread(target=w.write, args=(BLOCKS,), daemon=True)
                 for w in writers]
        for load in loads:
            load.start()
        t.wait_until(lambda: all(w.acknowledged > 4 for w in writers), "writes before")
        cuts = 0
        # However fast the writers are: no cut without load, and the last one has writes after it.
        while cuts < CUTS and all(w.acknowledged < BLOCKS // 2 for w in writers):
            before = [w.acknowledged for w in writers]
            pair.checkpoint()
            after = [w.acknowledged for w in writers]
            cuts += 1
        t.expect(cuts > 0, "a checkpoint under load")
        t.wait_until(lambda: sum(w.acknowledged for w in writers) > sum(after) + 4
                     or not any(load.is_alive() for load in loads), "writes after")
        pair.primary.kill9()
        for load in loads:
            load.join(20)
        for writer in writers:
            writer.end()
        pair.failover()
        snapshot(t, pair.promoted(), "now.raw")
        for n in range(WRITERS):
            found = count_writes(t, "now.raw", n * REGION, REGION, BLOCK)
            t.expect(before[n] <= found <= after[n] + 1,
                     f"the cut lies within its command: {before[n]} <= {found} <= {after[n]}")
        pair.secondary.stop(code=None)
        t.log(f"{ack}: the checkpoint holds the writes up to its cut, in order, and no other")


brep_iotest.main(run)
