"""A side is put back from an older copy, disk and state directory. An old primary is refused; an old
secondary is copied on command. Neither overwrites newer data by itself.

Seen to fail with: a secondary that is given what its primary has, whatever it has itself.
"""

import brep_iotest
from brep_roles import Sides


def run(t):
    pair = Sides(t).start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    pair.stop()
    t.run("cp", "-a", "alpha", "alpha.old")
    t.run("cp", "p.raw", "p.old")
    t.run("cp", "-a", "beta", "beta.old")
    t.run("cp", "s.raw", "s.old")
    pair.start_secondary()
    pair.start_primary()
    pair.wait_state("alpha", "in-sync")
    pair.write("write -P 2 4M 64k")
    pair.checkpoint()
    pair.stop()
    newer = t.sha256("s.raw")

    # The primary is older.
    t.run("mv", "alpha", "alpha.new")
    t.run("mv", "p.raw", "p.new")
    t.run("cp", "-a", "alpha.old", "alpha")
    t.run("cp", "p.old", "p.raw")
    pair.start_secondary()
    pair.start_primary()
    pair.wait_state("alpha", "outdated")
    pair.wait_reason("alpha", "restored from an older copy")
    pair.wait_reason("alpha", "the guest is not served")
    pair.brep("alpha", "resync", "--full", code=3)
    t.expect("brep failover" in pair.status("beta")["advice"], pair.status("beta")["advice"])
    pair.stop()
    t.equal(t.sha256("s.raw"), newer, "the newer side's disk")
    t.log("an older primary: refused, and nothing was changed")

    # The newer one comes back, and the secondary is older.
    t.run("rm", "-rf", "alpha", "p.raw", "beta", "s.raw")
    t.run("mv", "alpha.new", "alpha")
    t.run("mv", "p.new", "p.raw")
    t.run("cp", "-a", "beta.old", "beta")
    t.run("cp", "s.old", "s.raw")
    pair.start_secondary()
    pair.start_primary()
    pair.wait_reason("alpha", "had committed a later one")
    t.equal(pair.status("alpha")["advice"], "brep resync --full", "advice")
    pair.brep("alpha", "resync", "--full", "--wait")
    pair.checkpoint()
    pair.stop()
    t.equal(t.sha256("p.raw"), newer, "the primary's disk")
    t.equal(t.sha256("s.raw"), newer, "the secondary's disk")
    t.log("an older secondary: copied on command, and equal")

    # An older primary that shall win all the same: the newer side's operator says so.
    t.run("rm", "-rf", "alpha", "p.raw")
    t.run("mv", "alpha.old", "alpha")
    t.run("mv", "p.old", "p.raw")
    pair.start_secondary()
    pair.start_primary()
    pair.wait_state("alpha", "outdated")
    pair.brep("beta", "resync", "--discard-local", "--dry-run")
    pair.brep("beta", "resync", "--discard-local")
    t.wait_until(lambda: pair.status("alpha")["advice"] == "brep resync --full",
                 "a whole copy is on offer")
    pair.brep("alpha", "resync", "--full", "--wait")
    pair.checkpoint()
    pair.stop()
    older = t.sha256("p.raw")
    t.equal(t.sha256("s.raw"), older, "the secondary's disk")
    t.expect(older != newer, "the older data were kept")
    t.log("with consent the older side wins")


brep_iotest.main(run)
