"""A secondary that is promoted while its primary is connected makes no second writer: the old
primary serves nobody any more, and what it had acknowledged is on the promoted disk. A failover that
is refused fails no write.

Seen to fail with: a primary that takes the end of its data connections for the loss of its secondary.
"""

import brep_iotest
from brep_pair import Pair, Writer, count_writes, snapshot


def run(t):
    pair = Pair(t).start()
    guest = Writer(t, pair.guest())
    t.expect(guest.write(50), "writes")
    pair.checkpoint()
    t.expect(guest.write(50), "writes after the checkpoint")
    pair.failover("latest")
    # The next write is never acknowledged.
    acknowledged = guest.acknowledged
    t.expect(not guest.write(1), "a write to the old primary fails")
    guest.end()
    snapshot(t, pair.promoted(), "now.raw")
    t.expect(count_writes(t, "now.raw") >= acknowledged, "acknowledged writes are there")
    status = pair.status("alpha")
    t.equal(status["counters"]["guest-writes"] >= acknowledged, True, "counted")
    t.expect(t.qemu_io(pair.guest(), "read 0 4k", code=1).code == 1, "nobody is served")
    refused = pair.brep("alpha", "failover", "--to", "latest", code=3)
    t.expect("it is the disk now" in refused.stderr, "nor does a failover say so")
    pair.primary.kill9()
    pair.start_primary()
    t.wait_until(lambda: pair.status("alpha")["link"] == "refused", "the old primary is refused")
    t.log("latest: nothing lost, and one writer")
    pair.stop()

    # Refused: this side's guest has written.
    t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
    pair = Pair(t, guest=True).start()
    t.qemu_io(pair.second_guest(), "write -P 5 1M 4k")
    guest = Writer(t, pair.guest())
    t.expect(guest.write(10), "writes")
    pair.failover("latest", code=3)
    t.expect(guest.write(10), "writes after a failover that was refused")
    t.equal(pair.status("alpha")["link"], "connected", "link")
    guest.end()
    t.log("refused: the guest went on")
    pair.stop()


brep_iotest.main(run)
