"""The primary is killed under load, and the way back is interrupted on either side: consent, and what
is still to be copied, outlive that. `--force-lonely` serves a guest without the secondary.

Seen to fail with: consent that a restart of the loser forgets.
"""

import brep_iotest
from brep_roles import Sides

# deadline_s: 120


def run(t):
    pair = Sides(t, size=64 << 20).start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    pair.write("write -P 2 0 32M")
    pair.primary.kill9()
    pair.failover()
    pair.wait_state("beta", "promoted")
    t.qemu_io(pair.promoted(), "write -P 3 40M 16M")
    pair.daemons["beta"].kill9()

    pair.run_primary("beta", "alpha")
    pair.run_secondary("alpha", "--discard-local")
    t.wait_until(lambda: pair.status("beta")["counters"]["replicated-bytes"] > 0
                 or pair.disk_status("beta")["state"] == "in-sync", "the copy runs")
    pair.daemons["alpha"].kill9()
    pair.run_secondary("alpha")
    t.wait_until(lambda: pair.disk_status("beta")["state"] in ("resyncing", "in-sync"),
                 "it goes on")
    pair.daemons["beta"].kill9()
    pair.run_primary("beta", "alpha")
    pair.wait_state("beta", "in-sync", deadline_s=40)
    t.qemu_io(pair.guest_of("beta"), "read -P 3 40M 16M", "read -P 1 0 1M", "read -P 0 1M 31M")
    t.log("interrupted on both sides, and ended")

    # Started without its secondary, it waits for it, unless it is told not to.
    pair.daemons["beta"].kill9()
    pair.daemons["alpha"].kill9()
    pair.run_primary("beta", "alpha")
    pair.wait_reason("beta", "the guest is not served")
    pair.daemons["beta"].stop()
    pair.run_primary("beta", "alpha", "--force-lonely")
    t.qemu_io(pair.guest_of("beta"), "write -P 4 60M 64k")
    pair.run_secondary("alpha")
    pair.wait_state("beta", "in-sync")
    pair.stop_equal()
    t.log("alone, and together again: equal")


brep_iotest.main(run)
