"""Switchovers there and back, under load: not one acknowledged write is lost, both sides are equal in
the end, and one that cannot be done changes nothing.

Seen to fail with: the takeover of a checkpoint that was taken before the guest was held.
"""

import brep_iotest
from brep_pair import Pair, Writer, count_writes, snapshot

ROUNDS = 4


def run(t):
    pair = Pair(t, primary=["--listen", t.uri("a.sock")]).start()
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
        acknowledged = guest.acknowledged
        pair.brep(now, "switchover")
        t.expect(not guest.write(1), f"{now} serves nobody")
        guest.end()
        now, other = other, now
        snapshot(t, exports[now], "now.raw")
        held = count_writes(t, "now.raw", base=base, length=acknowledged * 4096 + 4096)
        t.expect(held >= acknowledged, "acknowledged writes are there")
        pair.wait_state(now, "in-sync")
        t.equal(pair.status(other)["role"], "secondary", f"role of {other}")
        base += 1 << 20
        guest = Writer(t, exports[now], base=base)
    t.expect(guest.write(20), "writes in the end")
    guest.end()
    pair.brep(now, "checkpoint")
    t.log(f"{ROUNDS} switchovers")
    pair.stop()
    pair.equal_files()
    t.log("equal")


brep_iotest.main(run)
