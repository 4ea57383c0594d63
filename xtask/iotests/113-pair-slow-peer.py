"""A secondary that answers, and too slowly: with `pull-ahead` the guest goes on without it, its last
checkpoint stays, and it is caught up with when it has recovered. Nothing is held, whatever is to be done
about a secondary that is lost.

Seen to fail with: a secondary that is left behind, and whose end of the session counts as its loss.
"""

import time

import brep_iotest
from brep_link import Relay
from brep_pair import Pair, snapshot

# deadline_s: 120

MIB = 1 << 20


def run(t):
    pair = Pair(t, size=64 * MIB, primary=[
        "--peer-timeout", "20s", "--window-bytes", "1M", "--slow-peer-limit", "500ms",
        "--on-slow-peer", "pull-ahead", "--on-peer-lost", "suspend"])
    relay = Relay(t.dir / "r.sock", t.dir / "s.sock")
    pair.start_secondary()
    pair.start_primary("--peer", t.uri("r.sock"), peer=False)
    pair.wait_promotable()
    pair.write("write -P 1 0 4M")
    epoch = pair.checkpoint()
    expected = snapshot(t, pair.guest(), "checkpoint.raw")

    # 32 MiB at this rate take half a minute, and each request is answered within the timeout.
    relay.rate = MIB
    begun = time.monotonic()
    pair.write(*(f"write -P 2 {at}M 1M" for at in range(32)), timeout_s=60)
    took_s = time.monotonic() - begun
    t.expect(took_s < 15, f"the guest waited: {took_s:.1f} s")
    status = pair.status("alpha")
    t.equal(status["disks"][0]["state"], "disconnected", "state")
    t.expect("too slow" in status["reason"], status["reason"])
    t.expect(status["disks"][0]["bytes-behind"] >= 24 * MIB, "what it lacks is kept track of")
    beta = pair.status("beta")
    t.equal((beta["promotable"], beta["checkpoint"]), (True, epoch), "its last checkpoint")
    t.log("pull-ahead: the guest does not wait, and the last checkpoint stays")

    relay.rate = None
    pair.wait_state("alpha", "in-sync", deadline_s=40)
    t.expect(pair.checkpoint() > epoch, "a checkpoint again")
    t.log("recovered: caught up with, without a command")

    # Too slow once more, and the primary is gone: the checkpoint is what it was.
    last = snapshot(t, pair.guest(), "checkpoint.raw")
    t.expect(last != expected, "it has changed")
    relay.rate = MIB
    pair.write(*(f"write -P 4 {at}M 1M" for at in range(56)), timeout_s=60)
    pair.primary.kill9()
    relay.close()
    pair.failover()
    t.equal(snapshot(t, pair.promoted(), "promoted.raw"), last, "the promoted disk")
    pair.secondary.stop()
    t.log("promoted while it was behind: exactly the last checkpoint")


brep_iotest.main(run)
