"""Failover to the last checkpoint and to the latest write, after kill -9 of the primary.

Seen to fail with: no pre-images copied.
"""

import shutil

import brep_iotest
from brep_pair import Pair, snapshot


def run(t):
    for to in ("checkpoint", "latest"):
        t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
        t.pattern_file("p.raw", 16 << 20, seed=1)
        pair = Pair(t).start()
        pair.write("write -P 1 0 1M", "write -P 2 4M 100k")
        pair.checkpoint()
        at_checkpoint = snapshot(t, pair.guest(), "checkpoint.raw")
        # Overwrites of what the checkpoint holds, and places that it never touched.
        pair.write("write -P 3 512k 64k", "write -P 4 8M 1M", "write -z 4M 4k", "discard 12M 64k",
                   "write -z -u 12M 64k", "flush")
        latest = snapshot(t, pair.guest(), "latest.raw")
        pair.primary.kill9()
        report = pair.failover(to).json
        t.expect(report["differing-bytes"] > 0, "what is given up or kept is told")
        wanted = at_checkpoint if to == "checkpoint" else latest
        t.equal(snapshot(t, pair.promoted(), "now.raw"), wanted, f"the disk after --to {to}")
        t.expect(pair.failover(to).json["repeated"], "the same failover again succeeds")
        other = "latest" if to == "checkpoint" else "checkpoint"
        pair.failover(other, code=3)
        # Guests write while the merge runs behind, and find their writes in the file.
        t.qemu_io(pair.promoted(), "write -P 7 1M 64k", "write -P 8 8M 4k", "flush")
        pair.wait_state("beta", "promoted")
        pair.secondary.stop()
        shutil.copy(f"{to}.raw", "wanted.raw")
        t.qemu_io("wanted.raw", "write -P 7 1M 64k", "write -P 8 8M 4k")
        t.qemu_img("compare", "-f", "raw", "-F", "raw", "wanted.raw", "s.raw")
        t.log(f"--to {to}: the right disk, served and merged")


brep_iotest.main(run)
