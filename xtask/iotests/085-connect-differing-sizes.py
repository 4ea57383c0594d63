"""Sides whose disks differ in size or name are no pair: both say which disk, nothing is written, and
with the right disk they come together.

Seen to fail with: sizes that are not compared.
"""

import brep_iotest
from brep_roles import Sides


def run(t):
    t.qemu_img("create", "-f", "raw", "small.raw", "8M")
    pair = Sides(t, disks={"vda": ("p.raw", "small.raw")})
    before = t.sha256("small.raw")
    pair.start_secondary()
    pair.start_primary()
    pair.wait_reason("alpha", "disk vda: 16777216 bytes here, 8388608 on the secondary beta")
    pair.wait_reason("beta", "8388608")
    pair.brep("beta", "failover", code=3)
    pair.stop()
    t.equal(t.sha256("small.raw"), before, "the smaller disk")
    t.log("refused, and nothing was written")

    # The right disk; the state directory of the refused one is as good as new.
    pair = Sides(t).start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    pair.stop()
    t.equal(t.sha256("p.raw"), t.sha256("s.raw"), "hashes")

    # A pair that was one: the secondary's disk has grown behind brep's back. Nothing shrinks.
    t.run("truncate", "-s", "32M", "s.raw")
    pair.start_secondary()
    pair.start_primary()
    pair.wait_reason("alpha", "16777216 bytes here, 33554432 on the secondary beta")
    t.expect(pair.status("beta")["promotable"], "beta keeps its checkpoint")
    t.log("a pair whose secondary was grown is refused, and keeps its checkpoint")
    # The primary's follows, by command, and they are a pair again.
    pair.brep("alpha", "resize", "vda", "32M")
    pair.wait_state("alpha", "in-sync")
    pair.stop()
    t.equal(t.sha256("p.raw"), t.sha256("s.raw"), "hashes")


brep_iotest.main(run)
