"""A disk is removed on both sides at a checkpoint; disks that join have no part in a failover.

Seen to fail with: a disk that leaves kept in the checkpoint.
"""

import brep_iotest
from brep_pair import Pair, Writer, snapshot


def run(t):
    pair = Pair(t, {"vda": ("pa.raw", "sa.raw"), "vdb": ("pb.raw", "sb.raw")}).start()
    pair.write("write -P 1 0 1M", name="vda")
    pair.write("write -P 2 0 1M", name="vdb")
    pair.checkpoint()

    refused = pair.brep("beta", "disk", "remove", "vdb", code=3)
    t.expect("on the primary" in refused.stderr, refused.describe())
    guest = Writer(t, pair.guest("vdb"), base=1 << 20)
    t.expect(guest.write(3), "a guest uses it")
    refused = pair.brep("alpha", "disk", "remove", "vdb", code=3)
    t.expect("in use; to cut its clients off: --force" in refused.stderr, refused.describe())
    t.expect(guest.write(3), "it goes on")
    guest.end()
    t.wait_until(lambda: pair.brep("alpha", "disk", "remove", "vdb", code=None).code == 0,
                 "nobody uses it")
    t.log(pair.brep("alpha", "disk", "remove", "vdb").stdout)
    names = lambda side: [disk["name"] for disk in pair.status(side)["disks"]]
    t.equal(names("alpha"), ["vda"], "disks of the primary")
    t.wait_until(lambda: names("beta") == ["vda"], "the secondary follows", 20)
    t.qemu_img("info", "-f", "raw", pair.guest("vdb"), code=1)
    pair.write("write -P 3 0 64k", name="vda")
    pair.checkpoint()
    t.log("both sides go on without it")

    # The command lines still name it.
    pair.primary.kill9()
    pair.secondary.kill9()
    pair.start_secondary()
    pair.start_primary()
    pair.wait_state("alpha", "in-sync")
    t.equal((names("alpha"), names("beta")), (["vda"], ["vda"]), "disks after a restart")
    refused = pair.brep("alpha", "disk", "remove", "vda", code=3)
    t.expect("the last one" in refused.stderr, refused.describe())
    t.log("command lines do not bring it back")

    # It comes again, and is being copied when the primary is lost.
    t.log(pair.brep("beta", "disk", "add", "vdb=sb.raw").stdout)
    pair.brep("alpha", "resync", "--rate", "100k")
    t.log(pair.brep("alpha", "disk", "add", "vdb=pb.raw").stdout)
    pair.wait_state("alpha", "joining", "vdb")
    pair.wait_state("beta", "joining", "vdb")
    pair.wait_state("alpha", "in-sync", "vda")
    pair.write("write -P 4 0 128k", name="vda")
    pair.checkpoint()
    wanted = snapshot(t, pair.guest("vda"), "vda.raw")
    pair.write("write -P 5 0 128k", name="vda")
    states = [pair.disk_status("alpha", name)["state"] for name in ("vda", "vdb")]
    t.equal(states, ["in-sync", "joining"], "states during the copy")
    t.expect(pair.status("beta")["promotable"], "checkpoints of the other disk go on")
    pair.primary.kill9()
    answer = pair.failover().json
    t.equal(answer["left-out"], ["vdb"], "left out")
    t.equal(snapshot(t, pair.promoted("vda"), "now.raw"), wanted, "vda")
    info = t.qemu_img("info", "-f", "raw", pair.promoted("vdb"), code=1)
    t.expect("not part of the group any more" in info.stderr, info.describe())
    pair.wait_state("beta", "promoted")
    pair.secondary.stop()
    pair.start_secondary()
    t.equal(names("beta"), ["vda"], "disks of the promoted side")
    t.log("a failover in the middle of the copy brings the others, and says what it left out")


brep_iotest.main(run)
