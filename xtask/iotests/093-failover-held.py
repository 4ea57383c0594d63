"""A failover that is held can be undone: what was written since is given up by name, the disk is the
last checkpoint again, and the old primary goes on with an incremental resync. Or it is committed, and
is a failover like any other. A kill -9 leaves it held, undone or committed.

Seen to fail with: a merge that begins although the failover is held.
"""

import brep_iotest
from brep_pair import Pair, snapshot

SIZE = 64 << 20


def run(t):
    roll_back(t)
    for target in ("checkpoint", "latest"):
        commit(t, target)


def pair_with_writes(t, **options):
    """In sync, a checkpoint, writes after it. Returns the hash of the checkpoint, and of it all."""
    t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
    t.pattern_file("p.raw", SIZE, seed=5)
    pair = Pair(t, size=SIZE, primary=["--peer-timeout", "2s"], **options).start()
    pair.write("write -P 1 1M 1M")
    pair.checkpoint()
    checkpoint = snapshot(t, pair.guest(), "wanted.raw")
    pair.write("write -P 2 1536k 2M", "write -P 3 40M 64k")
    return pair, checkpoint, snapshot(t, pair.guest(), "latest.raw")


def roll_back(t):
    pair, checkpoint, latest = pair_with_writes(t)
    nothing_held(t, pair, "beta", "alpha")
    report = pair.brep("beta", "failover", "--hold", "--json").json
    t.equal((report["held"], report["repeated"]), (True, False), "the report")
    t.wait_until(lambda: pair.status("alpha")["link"] == "refused", "the old primary is refused")
    t.expect("promoted" in t.qemu_io(pair.guest(), "read 0 4k", code=1).stderr, "fenced")
    t.equal(snapshot(t, pair.promoted(), "now.raw"), checkpoint, "the checkpoint is served")

    t.equal(pair.brep("beta", "failover", "--hold", "--json").json["repeated"], True, "again")
    for words in (["failover"], ["failover", "--hold", "--to", "latest"], ["switchover"],
                  ["resize", "vda", "80M"], ["checkpoint"]):
        refused = pair.brep("beta", *words, code=3)
        t.expect("held" in refused.stderr, f"{words}: {refused.stderr}")
    t.qemu_io(pair.promoted(), "write -P 7 1M 4k", "write -P 8 50M 130k", "flush")
    held = pair.status("beta")["held"]
    t.equal(pair.disk_status("beta")["state"], "held", "state")
    t.equal(held["written-bytes"], (1 + 3) * 65536, "granules written")
    t.expect(held["space-bytes"] > 0 and held["age-ms"] >= 0, "room and age")
    pair.secondary.kill9()
    (t.dir / "s.sock").unlink()
    pair.start_secondary()
    t.equal(pair.disk_status("beta")["state"], "held", "state after a kill")
    t.qemu_io(pair.promoted(), "read -P 8 50M 130k", "write -P 9 60M 512", "flush")

    refused = pair.brep("beta", "failover", "--rollback", code=3).stderr
    # 4 KiB, 130 KiB, and a unit of 2 KiB.
    t.expect(f"{(4 + 130 + 2) << 10} bytes were written" in refused, refused)
    words = ["failover", "--rollback", "--discard-local"]
    would = pair.brep("beta", *words, "--dry-run", "--json").json
    t.equal(would["disks"][0]["ranges"],
            [[1 << 20, 4096], [50 << 20, 130 << 10], [60 << 20, 2048]], "what would be lost")
    t.equal(would["dry-run"], True, "only asked")
    t.qemu_io(pair.promoted(), "read -P 9 60M 512")
    t.equal(pair.brep("beta", *words, "--json").json["bytes"], would["bytes"], "given up")
    pair.wait_state("alpha", "in-sync")
    t.equal(pair.status("beta")["role"], "secondary", "role")
    t.expect(pair.status("alpha")["counters"]["replicated-bytes"] < SIZE + (16 << 20),
             "an incremental resync")
    nothing_held(t, pair, "beta")
    t.log("undone: the checkpoint, and the old primary goes on")

    # The guest of the old primary goes on, and nothing of it is missing.
    t.equal(snapshot(t, pair.guest(), "now.raw"), latest, "the primary's disk")
    pair.write("write -P 4 20M 1M")
    pair.checkpoint()
    wanted = snapshot(t, pair.guest(), "wanted.raw")
    # Held again, without its primary; nothing is written, and nothing has to be given up.
    pair.primary.kill9()
    (t.dir / "p.sock").unlink()
    pair.brep("beta", "failover", "--hold", "--to", "latest")
    t.equal(snapshot(t, pair.promoted(), "now.raw"), wanted, "the latest state")
    pair.brep("beta", "failover", "--rollback")
    t.wait_until(lambda: pair.status("beta")["role"] == "secondary", "a secondary again")
    pair.secondary.kill9()
    (t.dir / "s.sock").unlink()
    pair.start_secondary()
    t.expect(pair.status("beta")["promotable"], "promotable")
    pair.start_primary()
    pair.wait_state("alpha", "in-sync")
    pair.failover()
    pair.wait_state("beta", "promoted")
    t.equal(snapshot(t, pair.promoted(), "now.raw"), wanted, "for good")
    nothing_held(t, pair, "beta")
    pair.stop()
    t.log("undone without its primary, and promoted for good")


def commit(t, target):
    pair, checkpoint, latest = pair_with_writes(t)
    pair.primary.kill9()
    (t.dir / "p.sock").unlink()
    pair.brep("beta", "failover", "--hold", "--to", target)
    t.equal(snapshot(t, pair.promoted(), "wanted.raw"),
            checkpoint if target == "checkpoint" else latest, f"the {target} state")
    change = ["write -P 7 1500k 100k", "write -z 30M 1M", "flush"]
    t.qemu_io(pair.promoted(), *change)
    t.qemu_io("wanted.raw", *change)
    # What may be undone is not replicated.
    t.qemu_img("create", "-f", "raw", "g.raw", str(SIZE))
    gamma = t.brep_daemon("gamma", "secondary", "--name", "gamma", "--state-dir", "gamma",
                          "--listen", t.uri("gamma.sock"), "--disk", "vda=g.raw",
                          ready=lambda: t.listens("gamma/control.sock"))
    pair.brep("beta", "peer", "set", t.uri("gamma.sock"))
    pair.brep("beta", "checkpoint", code=3)
    t.equal(pair.status("gamma")["set"], None, "gamma is blank")
    t.equal(pair.disk_status("beta")["state"], "held", "state")

    pair.brep("beta", "failover", "--commit")
    pair.secondary.kill9()
    (t.dir / "s.sock").unlink()
    pair.start_secondary()
    pair.brep("beta", "failover", "--commit", code=3)
    pair.brep("beta", "failover", "--rollback", code=3)
    t.qemu_img("compare", "-f", "raw", "-F", "raw", pair.promoted(), "wanted.raw")
    pair.wait_state("beta", "in-sync")
    pair.brep("beta", "checkpoint")
    t.wait_until(lambda: pair.disk_status("beta")["merging"] is None, "merged")
    pair.secondary.stop()
    gamma.stop()
    for file in ("s.raw", "g.raw"):
        t.equal(t.sha256(file), t.sha256("wanted.raw"), f"hash of {file}")
    t.run("rm", "-rf", "gamma", "g.raw")
    t.log(f"{target}: committed, merged and replicated")


def nothing_held(t, pair, *sides):
    for side in sides:
        for what in ("--commit", "--rollback"):
            refused = pair.brep(side, "failover", what, code=3)
            t.expect("no failover is held" in refused.stderr, refused.stderr)


brep_iotest.main(run)
