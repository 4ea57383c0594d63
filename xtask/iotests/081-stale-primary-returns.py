"""A primary that was killed returns after its secondary was promoted: refused, and it serves nobody;
as a secondary it is outdated, asks before its last writes are lost, and is brought back.

Seen to fail with: an old primary that needs no consent.
"""

import brep_iotest
from brep_roles import Sides

KIB64 = 64 << 10


def run(t):
    pair = Sides(t).start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    pair.write("write -P 2 2M 64k")  # acknowledged, and given up by the failover
    pair.primary.kill9()
    pair.failover()
    pair.wait_state("beta", "promoted")
    t.qemu_io(pair.promoted(), "read -P 0 2M 64k", "write -P 3 3M 64k")

    pair.start_primary()
    pair.wait_state("alpha", "outdated")
    status = pair.status("alpha")
    t.expect("brep secondary" in status["advice"], status["advice"])
    t.expect("the guest is not served" in status["reason"], status["reason"])
    pair.brep("alpha", "resync", "--full", code=3)
    pair.primary.stop()
    t.log("refused as a primary")

    pair.daemons["beta"].stop()
    pair.run_secondary("alpha")
    pair.run_primary("beta", "alpha")
    pair.wait_reason("beta", "was a primary, and wrote what this side lacks")
    t.qemu_io(pair.guest_of("beta"), "write -P 4 5M 64k")  # beta's guest goes on
    pair.wait_state("alpha", "outdated")
    t.equal(pair.discarded("alpha")["ranges"], [[2 << 20, KIB64]], "what would be lost")
    pair.brep("alpha", "failover", code=3)
    t.log("as a secondary it asks first")

    # A mistake is taken back: nothing has been changed.
    pair.daemons["alpha"].stop()
    pair.start_primary()
    t.equal(pair.status("alpha")["role"], "primary", "role")
    pair.primary.stop()
    pair.run_secondary("alpha", "--discard-local")
    pair.wait_state("beta", "in-sync")
    pair.wait_state("alpha", "in-sync")
    sent = pair.status("beta")["counters"]["replicated-bytes"]
    t.expect(sent <= 8 * KIB64, f"{sent} bytes were sent, and few were written")
    t.qemu_io(pair.guest_of("beta"), "read -P 0 2M 64k", "read -P 3 3M 64k", "read -P 4 5M 64k")
    pair.stop_equal()
    # The flag is for once: a service that has it does not come up as a loser later.
    t.equal(t.brep(*pair.secondary_words("alpha", "--discard-local"), code=None).code, 3,
            "--discard-local on a secondary")
    t.log("brought back, and equal")


brep_iotest.main(run)
