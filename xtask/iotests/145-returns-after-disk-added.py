"""A side that was promoted once, and got a disk later, as the primary, returns as a secondary with both.

Seen to fail with: an old primary that returns with the disks of its last merge.
"""

import brep_iotest
from brep_pair import format_of
from brep_roles import Sides


def run(t):
    pair = Sides(t).start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    pair.primary.stop()
    pair.failover()
    pair.wait_state("beta", "promoted")
    pair.daemons["beta"].stop()
    pair.run_secondary("alpha")
    pair.run_primary("beta", "alpha")
    pair.wait_state("beta", "in-sync")
    t.log("beta was promoted, and is alpha's primary")

    for side, file in (("alpha", "pb.raw"), ("beta", "sb.raw")):
        t.qemu_img("create", "-f", "raw", file, "16M")
        pair.brep(side, "disk", "add", f"vdb={file}")
    t.qemu_io(pair.guest_of("beta", "vdb"), "write -P 2 1M 1M")
    pair.wait_state("beta", "in-sync", "vdb")
    pair.brep("beta", "checkpoint")
    t.qemu_io(pair.guest_of("beta", "vdb"), "write -P 3 8M 64k")
    pair.daemons["beta"].kill9()
    pair.brep("alpha", "failover")
    t.wait_until(lambda: pair.is_merged("alpha"), "alpha is promoted and merged")
    t.log("a disk was added to both, and alpha is promoted")

    report = t.brep(*pair.secondary_words("beta", "--discard-local", "--dry-run", "--json")).json
    t.equal([disk["disk"] for disk in report["disks"]], ["vda", "vdb"], "disks of beta")
    t.equal(report["bytes"], 64 << 10, "bytes that beta wrote, and alpha lacks")
    pair.run_secondary("beta", "--discard-local")
    pair.brep("alpha", "peer", "set", t.uri("beta-link.sock"))
    for name in ("vda", "vdb"):
        pair.wait_state("alpha", "in-sync", name)
    pair.disks["vdb"] = ("pb.raw", "sb.raw")
    pair.stop_equal("alpha")
    for mine, theirs in pair.disks.values():
        t.qemu_img("compare", "-f", format_of(mine), "-F", format_of(theirs), mine, theirs)
    t.qemu_io("sb.raw", "read -P 2 1M 1M", "read -P 0 8M 64k")
    t.log("beta is alpha's secondary, with both disks")


brep_iotest.main(run)
