"""A planned change: the primary is stopped after a checkpoint, its secondary promoted, and it returns
without anybody's consent, for it has written nothing that the other lacks. Then back again.

Seen to fail with: an old primary without writes that is asked for consent.
"""

import brep_iotest
from brep_roles import Sides


def run(t):
    pair = Sides(t).start()
    pair.write("write -P 1 0 1M", "write -P 2 4M 64k")
    pair.checkpoint()
    pair.primary.stop()
    pair.failover()
    pair.wait_state("beta", "promoted")
    pair.daemons["beta"].stop()
    pair.run_secondary("alpha")
    pair.run_primary("beta", "alpha")
    pair.wait_state("beta", "in-sync")
    t.equal(pair.status("beta")["counters"]["replicated-bytes"], 0, "bytes sent")
    t.qemu_io(pair.guest_of("beta"), "read -P 1 0 1M", "write -P 3 8M 64k")
    pair.wait_state("alpha", "in-sync")
    t.expect(pair.status("alpha")["promotable"], "the old primary can be promoted now")
    pair.brep("beta", "checkpoint")
    t.log("alpha is beta's secondary, with nothing to copy")

    # The same the other way round.
    pair.daemons["beta"].stop()
    pair.brep("alpha", "failover")
    pair.t.wait_until(lambda: pair.is_merged("alpha"), "alpha is promoted and merged")
    pair.daemons["alpha"].stop()
    pair.run_secondary("beta")
    pair.run_primary("alpha", "beta")
    pair.wait_state("alpha", "in-sync")
    t.equal(pair.status("alpha")["counters"]["replicated-bytes"], 0, "bytes sent")
    t.qemu_io(pair.guest_of("alpha"), "read -P 3 8M 64k", "write -P 4 9M 64k")
    pair.stop_equal("alpha")
    t.log("and back, equal")


brep_iotest.main(run)
