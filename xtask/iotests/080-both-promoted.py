"""Split brain: both sides served a guest without the other. Nothing is copied before one is named
as the loser; then it gets what either side wrote, and no more.

Seen to fail with: a loser's ranges that its new primary does not add to its own.
"""

import brep_iotest
from brep_roles import Sides

KIB64 = 64 << 10


def run(t):
    pair = Sides(t).start()
    pair.write("write -P 1 0 1M", "write -P 2 4M 64k")
    pair.checkpoint()

    # beta is promoted while alpha lives, and both guests write.
    pair.daemons["beta"].pause()
    pair.write("write -P 3 1M 64k", "write -P 4 8M 128k")
    pair.wait_state("alpha", "disconnected")
    pair.daemons["beta"].resume()
    pair.failover()
    pair.wait_state("beta", "promoted")
    t.qemu_io(pair.promoted(), "write -P 5 12M 64k", "write -P 6 4M 4k")
    pair.wait_state("alpha", "split-brain")
    # It is asked again and again, so what beta writes meanwhile shows up.
    t.wait_until(lambda: [12 << 20, KIB64] in differences(pair)[1]["ranges"], "what beta has", 20)
    status = pair.status("alpha")
    here, _ = differences(pair)
    t.equal(here["ranges"], [[1 << 20, KIB64], [8 << 20, 2 * KIB64]], "what alpha has")
    t.expect(3 * KIB64 <= here["bytes"] <= 6 * KIB64, f"how much: {here}")
    t.expect("--discard-local" in status["advice"], status["advice"])
    t.wait_until(lambda: "split brain" in (pair.status("beta")["reason"] or ""),
                 "beta knows it too")
    pair.brep("alpha", "resync", "--full", code=3)
    t.log("split brain: both sides say what each has")

    # alpha loses. Without consent it is a secondary that waits.
    pair.daemons["alpha"].stop()
    pair.daemons["beta"].stop()
    words = pair.secondary_words("alpha", "--discard-local", "--dry-run", "--json")
    before = t.sha256("p.raw"), t.sha256("alpha/state")
    report = t.brep(*words).json
    t.equal(report["disks"][0]["ranges"], here["ranges"], "what would be lost")
    t.equal((t.sha256("p.raw"), t.sha256("alpha/state")), before, "what a dry run leaves")
    pair.run_secondary("alpha")
    t.equal(pair.disk_status("alpha")["state"], "outdated", "state of the loser")
    t.equal(pair.brep("alpha", "failover", code=3).code, 3, "it cannot be promoted")
    pair.run_primary("beta", "alpha")
    pair.wait_state("alpha", "split-brain")
    t.equal(t.sha256("p.raw"), before[0], "the loser's disk")
    t.equal(pair.discarded("alpha")["ranges"], here["ranges"], "what would be lost")
    t.log("nothing was copied")

    pair.brep("alpha", "resync", "--discard-local")
    pair.wait_state("beta", "in-sync")
    sent = pair.status("beta")["counters"]["replicated-bytes"]
    t.expect(sent <= 8 * KIB64, f"{sent} bytes were sent, and few were written")
    t.qemu_io(pair.guest_of("beta"), "read -P 1 1023k 1k", "read -P 6 4M 4k", "read -P 5 12M 64k",
              "read -P 0 8M 128k", "read -P 0 1M 64k")
    pair.stop_equal()
    t.log("equal")


def differences(pair):
    """What alpha says that it has, and that beta has."""
    found = pair.status("alpha")["differences"]
    return found["here"][0], found["there"][0]


brep_iotest.main(run)
