"""The secondary is killed in every state that it can be in, and started again: it says the same as
before, keeps its checkpoint if it had one, and the pair gets in sync.

Seen to fail with: buffers of the running epoch that a start empties.
"""

import brep_iotest
from brep_link import Tap
from brep_pair import Pair, snapshot

# deadline_s: 120
SIZE = 48 << 20


def run(t):
    t.pattern_file("p.raw", SIZE, seed=9)
    pair = Pair(t, size=SIZE, primary=["--peer-timeout", "2s"])
    tap = Tap(t.dir / "tap.sock", t.dir / "s.sock")

    def restart():
        pair.secondary.kill9()
        (t.dir / "s.sock").unlink(missing_ok=True)
        pair.start_secondary()

    def status():
        return pair.status("beta")

    # Blank.
    pair.start_secondary()
    restart()
    t.equal((status()["set"], status()["promotable"]), (None, False), "blank")
    t.log("blank")

    # In its first copy.
    pair.start_primary("--peer", t.uri("tap.sock"), "--resync-rate", "4M", peer=False)
    t.wait_until(lambda: status()["counters"]["replicated-bytes"] > 2 << 20, "the copy runs")
    restart()
    t.expect(not status()["promotable"], "half a copy is no checkpoint")
    pair.brep("beta", "failover", code=3)
    pair.brep("alpha", "resync", "--rate", "off")
    pair.wait_promotable(60)
    t.log("in its first copy")

    # In sync; then in an epoch with pre-images.
    for what, writes in (("in sync", []), ("with pre-images", ["write -P 3 1M 3M"])):
        pair.wait_state("alpha", "in-sync")
        epoch = pair.checkpoint()
        wanted = snapshot(t, pair.guest(), "wanted.raw")
        if writes:
            pair.write(*writes)
        pair.primary.pause()
        restart()
        t.equal((status()["checkpoint"], status()["promotable"]), (epoch, True), what)
        view = pair.brep("beta", "failover", "--test", "look", "--json").json["uris"][0]
        t.equal(snapshot(t, view, "now.raw"), wanted, f"the checkpoint, {what}")
        pair.primary.resume()
        # What the primary says at first is of the session that the kill has ended.
        pair.wait_state("beta", "in-sync")
        pair.wait_state("alpha", "in-sync")
        t.log(what)

    # While a checkpoint is cut, and when it is committed.
    for kind, drop in (("cut", True), ("cut", False), ("cut-done", True), ("committed", True)):
        pair.wait_state("alpha", "in-sync")
        before = pair.checkpoint()
        pair.write("write -P 4 5M 2M")
        tap.at(kind, pair.secondary.kill9, drop)
        pair.brep("alpha", "checkpoint", code=None)
        t.expect(tap.seen.wait(10), f"{kind} came by")
        (t.dir / "s.sock").unlink(missing_ok=True)
        pair.start_secondary()
        t.expect(status()["checkpoint"] >= before, f"checkpoint, killed at {kind}")
        t.expect(status()["promotable"], f"promotable, killed at {kind}")
        pair.wait_state("alpha", "in-sync")
    t.log("while a checkpoint is taken")

    # Held, promoted, outdated.
    pair.checkpoint()
    wanted = snapshot(t, pair.guest(), "wanted.raw")
    pair.write("write -P 6 9M 1M")
    pair.primary.kill9()
    (t.dir / "p.sock").unlink()
    pair.brep("beta", "failover", "--hold")
    restart()
    t.equal(pair.disk_status("beta")["state"], "held", "held")
    pair.brep("beta", "failover", "--commit")
    restart()
    t.equal(status()["role"], "promoted", "role")
    t.equal(snapshot(t, pair.promoted(), "now.raw"), wanted, "promoted")
    pair.wait_state("beta", "promoted")
    t.log("held, and promoted")

    outdated = ["secondary", "--name", "alpha", "--state-dir", "alpha", "--disk", "vda=p.raw",
                "--listen", t.uri("a.sock")]
    for _ in range(2):
        alpha = t.brep_daemon("alpha", *outdated, ready=lambda: t.listens("alpha/control.sock"))
        t.equal(pair.disk_status("alpha")["state"], "outdated", "state")
        pair.brep("alpha", "failover", code=3)
        alpha.kill9()
        (t.dir / "a.sock").unlink()
    alpha = t.brep_daemon("alpha", *outdated, ready=lambda: t.listens("alpha/control.sock"))
    pair.brep("beta", "peer", "set", t.uri("a.sock"))
    pair.brep("alpha", "resync", "--discard-local")
    pair.wait_state("beta", "in-sync")
    t.wait_until(lambda: pair.status("alpha")["promotable"], "promotable")
    pair.secondary.stop()
    alpha.stop()
    t.equal(t.sha256("p.raw"), wanted, "alpha's disk")
    t.equal(t.sha256("s.raw"), wanted, "beta's disk")
    (t.dir / "tap.sock").unlink()
    t.log("outdated, and equal in the end")


brep_iotest.main(run)
