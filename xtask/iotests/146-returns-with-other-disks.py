"""An old primary returns, and the two sides do not have the same disks: one was added here or there, or
removed, while the other side was away. What the primary says to be done can be done.

Seen to fail with: disks of a side that is outdated that cannot be changed.
"""

import brep_iotest
from brep_pair import format_of
from brep_roles import Sides


def run(t):
    for file in ("pb.raw", "sb.raw", "sc.raw"):
        t.qemu_img("create", "-f", "raw", file, "16M")
    pair = Sides(t).start()
    added_to_the_new(t, pair)
    added_to_the_old(t, pair)
    removed_from_the_old(t, pair)


def added_to_the_new(t, pair):
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    pair.write("write -P 9 4M 64k")
    pair.primary.kill9()
    pair.failover()
    pair.wait_state("beta", "promoted")
    pair.daemons["beta"].stop()
    pair.run_primary("beta", "alpha")
    pair.brep("beta", "disk", "add", "vdb=sb.raw")
    t.qemu_io(pair.guest_of("beta", "vdb"), "write -P 2 1M 1M")
    pair.run_secondary("alpha")
    refused(t, pair, "beta", "vdb is not on the secondary alpha", "brep disk add vdb=FILE on the secondary")
    pair.brep("alpha", "disk", "add", "vdb=pb.raw")
    t.equal(pair.disk_status("alpha", "vdb")["state"], "joining", "the new disk of alpha")

    # What alpha wrote is told apart from what was added to it, after a restart too.
    pair.wait_reason("beta", "was a primary, and wrote what this side lacks")
    pair.daemons["alpha"].kill9()
    pair.run_secondary("alpha")
    pair.wait_reason("beta", "was a primary, and wrote what this side lacks")
    report = pair.brep("alpha", "resync", "--discard-local", "--json").json
    t.equal([(d["disk"], d["bytes"]) for d in report["disks"]], [("vda", 64 << 10)], "given up")
    in_sync(pair, "beta", "vda", "vdb")
    t.log("a disk that was added to the new primary is added to the old one")


def added_to_the_old(t, pair):
    # beta is the primary now, with alpha away.
    pair.daemons["alpha"].kill9()
    pair.brep("beta", "disk", "add", "vdc=sc.raw")
    t.qemu_io(pair.guest_of("beta", "vdc"), "write -P 3 1M 1M", "flush")
    pair.daemons["beta"].kill9()
    only = t.sha256("sc.raw")
    pair.run_secondary("alpha")
    pair.brep("alpha", "failover")
    t.wait_until(lambda: pair.is_merged("alpha"), "alpha is promoted and merged")
    pair.run_secondary("beta", "--discard-local")
    pair.brep("alpha", "peer", "set", t.uri("beta-link.sock"))
    refused(t, pair, "alpha", "vdc is on the secondary beta alone", "with a copy of the secondary's file")
    pair.brep("beta", "disk", "remove", "vdc")
    in_sync(pair, "alpha", "vda", "vdb")
    t.equal(t.sha256("sc.raw"), only, "the file of the disk that was removed")
    t.log("a disk that only the old primary had is removed there, and its file stays")


def removed_from_the_old(t, pair):
    pair.daemons["alpha"].stop()
    pair.run_primary("alpha", "beta")
    in_sync(pair, "alpha", "vda", "vdb")
    pair.brep("alpha", "checkpoint")
    pair.daemons["beta"].kill9()
    t.wait_until(lambda: pair.status("alpha")["link"] != "connected", "beta is away")
    pair.brep("alpha", "disk", "remove", "vdb")
    pair.daemons["alpha"].kill9()
    pair.run_secondary("beta")
    pair.brep("beta", "failover")
    t.wait_until(lambda: pair.is_merged("beta"), "beta is promoted and merged")
    pair.run_secondary("alpha", "--discard-local")
    pair.brep("beta", "peer", "set", t.uri("alpha-link.sock"))
    refused(t, pair, "beta", "vdb is not on the secondary alpha", "brep disk add vdb=FILE on the secondary")
    pair.brep("alpha", "disk", "add", "vdb=pb.raw")
    in_sync(pair, "beta", "vda", "vdb")
    pair.disks["vdb"] = ("pb.raw", "sb.raw")
    pair.stop_equal("beta")
    for mine, theirs in pair.disks.values():
        t.qemu_img("compare", "-f", format_of(mine), "-F", format_of(theirs), mine, theirs)
    t.qemu_io("pb.raw", "read -P 2 1M 1M")
    t.log("a disk that only the new primary has comes back")


def refused(t, pair, side, reason, advice):
    pair.wait_reason(side, reason)
    t.expect(advice in pair.status(side)["advice"], pair.status(side)["advice"])


def in_sync(pair, side, *names):
    for name in names:
        pair.wait_state(side, "in-sync", name)


brep_iotest.main(run)
