"""A disk is added under load, copied, failed over with the others, and removed again.

Seen to fail with: a disk that joins not copied whole.
"""

import brep_iotest
from brep_pair import Pair, Writer, count_writes, snapshot


def run(t):
    pair = Pair(t, interval="200ms").start()
    for file in ("pb.qcow2", "sb.qcow2"):
        t.qemu_img("create", "-f", "qcow2", file, "16M")
    t.qemu_io("pb.qcow2", "write -P 9 8M 1M")
    t.qemu_io("sb.qcow2", "write -P 8 4M 1M")

    # The primary alone is refused, and says what to do; the others are not touched.
    session = pair.status("beta")["epoch"]
    refused = pair.brep("alpha", "disk", "add", "vdb=pb.qcow2", code=3)
    t.expect("First, on the secondary: brep disk add vdb=FILE, with a file of 16777216 bytes"
             in refused.stderr, refused.describe())
    t.expect(pair.status("alpha")["link"] == "connected", "the session goes on")
    t.log("the secondary comes first")

    guest = Writer(t, pair.guest())
    t.expect(guest.write(100), "the guest writes")
    t.log(pair.brep("beta", "disk", "add", "vdb=sb.qcow2").stdout)
    t.expect(guest.write(100), "the guest writes")
    t.log(pair.brep("alpha", "disk", "add", "vdb=pb.qcow2").stdout)
    second = Writer(t, pair.guest("vdb"))
    t.expect(guest.write(100) and second.write(100), "guests of both disks write")
    t.log(pair.brep("alpha", "disk", "add", "vdb=pb.qcow2").stdout)
    pair.wait_state("alpha", "in-sync", "vdb")
    pair.wait_state("beta", "in-sync", "vdb")
    t.expect(guest.write(100) and second.write(100), "guests of both disks write")
    pair.checkpoint()
    wanted = {name: snapshot(t, pair.guest(name), f"{name}.raw") for name in ("vda", "vdb")}
    t.expect(guest.write(1) and second.write(1), "guests of both disks write")
    guest.end()
    second.end()
    t.log("both disks are in sync")

    # Whatever the command lines say, the disk stays.
    pair.checkpoint()
    pair.primary.kill9()
    pair.secondary.kill9()
    pair.start_secondary()
    pair.start_primary()
    pair.wait_state("alpha", "in-sync", "vdb")
    t.equal(count_writes(t, copy(t, pair, "vda")), 401, "writes on vda")
    # vdb holds what its file held too.
    t.equal(count_writes(t, copy(t, pair, "vdb"), length=4 << 20), 201, "writes on vdb")
    t.log("started again without it in the command line: it is there")

    pair.write("write -P 3 12M 64k", name="vdb")
    pair.checkpoint()
    now = {name: snapshot(t, pair.guest(name), f"{name}.raw") for name in ("vda", "vdb")}
    t.expect(now["vdb"] != wanted["vdb"], "something was written since")
    pair.primary.kill9()
    pair.failover()
    for name in now:
        t.equal(snapshot(t, pair.promoted(name), "now.raw"), now[name], name)
    t.log("a failover brings both")


def copy(t, pair, name):
    snapshot(t, pair.guest(name), "copy.raw")
    return "copy.raw"


brep_iotest.main(run)
