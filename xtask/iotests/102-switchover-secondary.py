"""A switchover that is typed on the secondary does what it does on the primary: it is passed on, what
forbids it is said there too with exit code 3 and changes nothing, and no acknowledged write is lost.

Seen to fail with: those who wait on the secondary are forgotten at the end of the session, as those who
wait for a checkpoint are.
"""

import brep_iotest
from brep_pair import Pair, Writer, count_writes, snapshot


def run(t):
    pair = Pair(t)
    pair.start_secondary()
    refused = pair.brep("beta", "switchover", code=3)
    t.expect("no primary is connected" in refused.stderr, "nobody is there to hand over")
    pair.start_primary()
    pair.wait_promotable()
    guest = Writer(t, pair.guest())
    t.expect(guest.write(20), "writes")
    refused = pair.brep("beta", "switchover", code=3)
    t.expect("the primary says" in refused.stderr and "--listen" in refused.stderr,
             "what forbids it there is said here")
    t.expect(guest.write(20), "writes after a switchover that was refused")
    t.equal(pair.status("beta")["role"], "secondary", "role of the other side")
    guest.end()
    t.log("refused, and nothing changed")

    pair.primary.stop()
    pair.start_primary("--listen", t.uri("a.sock"))
    pair.wait_state("alpha", "in-sync")
    pair.brep("beta", "peer", "set", t.uri("a.sock"))
    guest = Writer(t, pair.guest(), base=1 << 20)
    t.expect(guest.write(50), "writes")
    answer = pair.brep("beta", "switchover", "--json").json
    t.equal(answer["role"], "promoted", "what this side is then")
    t.equal(answer["epoch"], pair.status("beta")["checkpoint"], "the checkpoint with which")
    guest.end()
    snapshot(t, pair.promoted(), "now.raw")
    t.equal(count_writes(t, "now.raw", base=1 << 20), 50, "acknowledged writes")
    pair.wait_state("beta", "in-sync")
    t.equal(pair.status("alpha")["role"], "secondary", "role of the old primary")
    t.log("switched over from the secondary")

    said = pair.brep("alpha", "switchover")
    t.expect("this side has taken over" in said.stdout, "who is what, in words")
    pair.wait_state("alpha", "in-sync")
    guest = Writer(t, pair.guest(), base=2 << 20)
    t.expect(guest.write(20), "writes at home")
    guest.end()
    pair.brep("alpha", "checkpoint")
    pair.stop()
    pair.equal_files()
    t.log("and back: equal")


brep_iotest.main(run)
