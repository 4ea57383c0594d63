"""Switchovers there and back, under load: not one acknowledged write is lost, both sides are equal in
the end, and one that cannot be done changes nothing.

Seen to fail with: the takeover of a checkpoint that was taken before the guest was held.
"""

import threading

import brep_iotest
from brep_pair import Pair, Writer, count_writes, snapshot

ROUNDS = 4
# What a round's guest may write: far more than it comes to.
WRITES = 3000
AREA = 12 << 20


def run(t):
    pair = Pair(t, size=(ROUNDS + 1) * AREA, primary=["--listen", t.uri("a.sock")]).start()
    guest = Writer(t, pair.guest())
    t.expect(guest.write(20), "writes")
    refused = pair.brep("alpha", "switchover", code=3)
    t.expect("brep peer set" in refused.stderr, "the other side has no peer")
    t.expect(guest.write(20), "writes after a switchover that was refused")
    pair.brep("beta", "peer", "set", t.uri("a.sock"))

    exports = {"alpha": t.uri("p.sock", "vda"), "beta": t.uri("s.sock", "vda")}
    now, other = "alpha", "beta"
    base = 0
    for _ in range(ROUNDS):
        t.expect(guest.write(20), f"writes on {now}")
        # It writes on, one write after the other, until there is nobody who would acknowledge any more.
        load = threading.Thread(target=lambda: guest.write(WRITES), daemon=True)
        load.start()
        pair.brep(now, "switchover")
        load.join(20)
        t.expect(not load.is_alive() and guest.acknowledged < WRITES,
                 f"{now} serves nobody")
        acknowledged = guest.acknowledged
        guest.end()
        now, other = other, now
        snapshot(t, exports[now], "now.raw")
        held = count_writes(t, "now.raw", base=base, length=acknowledged * 4096 + 4096)
        t.expect(held >= acknowledged, "acknowledged writes are there")
        pair.wait_state(now, "in-sync")
        t.equal(pair.status(other)["role"], "secondary", f"role of {other}")
        base += AREA
        guest = Writer(t, exports[now], base=base)
    t.expect(guest.write(20), "writes in the end")
    guest.end()
    pair.brep(now, "checkpoint")
    t.log(f"{ROUNDS} switchovers")
    pair.stop()
    pair.equal_files()
    t.log("equal")


brep_iotest.main(run)
