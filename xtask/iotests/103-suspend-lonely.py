"""`--on-peer-lost suspend` with `--force-lonely`: a primary that is started again without its secondary
serves its guest, and holds no write, for this time; what was written alone is sent when the secondary is
back, and from then on a loss holds writes again.

Seen to fail with: the same start without --force-lonely.
"""

import threading

import brep_iotest
from brep_pair import Writer
from brep_roles import Sides

# deadline_s: 120
SUSPEND = ("--on-peer-lost", "suspend")


def run(t):
    pair = Sides(t, size=32 << 20).start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    pair.daemons["alpha"].kill9()
    pair.daemons["beta"].kill9()

    pair.run_primary("alpha", "beta", *SUSPEND)
    pair.wait_reason("alpha", "the guest is not served")
    pair.daemons["alpha"].stop()
    t.log("alone: no guest is served")

    pair.run_primary("alpha", "beta", *SUSPEND, "--force-lonely")
    guest = Writer(t, pair.guest_of("alpha"), base=4 << 20)
    t.expect(guest.write(20), "nothing is held")
    t.equal(pair.status("alpha")["held-writes"], None, "held writes")
    t.log("--force-lonely: the guest goes on")

    pair.run_secondary("beta")
    pair.wait_state("alpha", "in-sync")
    sent = pair.status("alpha")["counters"]["replicated-bytes"]
    # The writes, and what was hot or on its way when both were killed.
    t.expect(sent <= 8 << 20, f"{sent} bytes were sent")
    t.expect(guest.write(20), "writes to both")
    pair.daemons["beta"].kill9()
    held = threading.Thread(target=lambda: guest.write(1), daemon=True)
    held.start()
    t.wait_until(lambda: pair.status("alpha")["held-writes"], "a write is held", 20)
    t.equal(guest.acknowledged, 40, "writes that were acknowledged")
    t.log("lost again: writes are held")

    pair.run_secondary("beta")
    held.join(20)
    t.equal(guest.acknowledged, 41, "writes that were acknowledged")
    guest.end()
    pair.wait_state("alpha", "in-sync")
    pair.stop_equal("alpha")
    t.log("together again: equal")


brep_iotest.main(run)
