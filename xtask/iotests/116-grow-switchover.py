"""A disk grows while the promoted side is the primary; after the switchover back that side is a secondary
with a disk and buffers of the new size. qcow2 on both sides, small granules; then a rejoin.

Seen to fail with: spare buffers that are left at their old size.
"""

import brep_iotest
from brep_pair import Pair

# deadline_s: 60

MIB = 1 << 20


def run(t):
    pair = Pair(t, disks={"vda": ("p.qcow2", "s.qcow2")}, size=64 * MIB,
                primary=["--listen", t.uri("a.sock"), "--granularity", "4K"],
                secondary=["--peer", t.uri("a.sock")]).start()
    pair.write("write -P 1 0 8M")
    pair.checkpoint()
    pair.brep("alpha", "switchover")
    pair.wait_state("beta", "in-sync")
    t.qemu_io(pair.promoted(), "write -P 2 1M 12k")
    pair.brep("beta", "resize", "vda", "96M")
    t.wait_until(lambda: pair.disk_status("alpha")["size"] == 96 * MIB, "the other side has grown")
    pair.wait_state("beta", "in-sync")
    pair.brep("beta", "switchover")
    pair.wait_state("alpha", "in-sync")
    t.qemu_io(pair.guest(), "read -P 2 1M 12k", "write -P 3 90M 1M")
    pair.checkpoint()
    t.equal(pair.status("alpha")["errors"], [], "errors")
    t.log("grown on the promoted side, and switched back")

    compared = pair.brep("alpha", "resync", "--compare", "--wait", "--json").json
    t.equal((compared["compared-bytes"], compared["differing-bytes"]), (96 * MIB, 0), "compared")
    pair.primary.kill9()
    pair.failover("latest")
    pair.wait_state("beta", "promoted")
    t.qemu_io(pair.promoted(), "read -P 3 90M 1M", "write -P 4 2M 4k")
    t.log("promoted: the latest writes are there")
    pair.secondary.stop()


brep_iotest.main(run)
