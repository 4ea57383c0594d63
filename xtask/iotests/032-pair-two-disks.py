"""Two disks of a group are checkpointed and failed over together.

Seen to fail with: only the first disk of the group switched at a cut.
"""

import brep_iotest
from brep_pair import Pair, snapshot


def run(t):
    pair = Pair(t, {"vda": ("pa.raw", "sa.raw"), "vdb": ("pb.qcow2", "sb.qcow2")}).start()
    pair.write("write -P 1 0 1M", name="vda")
    pair.write("write -P 2 0 1M", name="vdb")
    pair.checkpoint()
    wanted = {name: snapshot(t, pair.guest(name), f"{name}.raw") for name in pair.disks}
    pair.write("write -P 3 512k 1M", name="vda")
    pair.write("write -P 4 512k 1M", name="vdb")
    pair.primary.kill9()
    pair.failover()
    for name in pair.disks:
        t.equal(snapshot(t, pair.promoted(name), "now.raw"), wanted[name], name)
    t.qemu_img("info", "-f", "raw", t.uri("s.sock"), code=1)
    t.log("both disks are at the checkpoint; the empty name is nobody's")
    for name in pair.disks:
        pair.wait_state("beta", "promoted", name)
    pair.secondary.stop()
    t.qemu_img("check", "sb.qcow2")
    for name, (_, file) in pair.disks.items():
        t.qemu_img("compare", f"{name}.raw", file)
    t.log("and so are their files after the merge")


brep_iotest.main(run)
