"""A disk grows on both sides while the pair runs, raw here and qcow2 there, with a guest of its own.

Seen to fail with: the buffers of the secondary's checkpoint left at their old size.
"""

import json

import brep_iotest
from brep_pair import Pair, snapshot

# deadline_s: 60


def run(t):
    pair = Pair(t, disks={"vda": ("p.raw", "s.qcow2")}, size=8 << 20, guest=True).start()
    pair.write("write -P 1 0 1M")
    pair.checkpoint()
    t.qemu_io(pair.second_guest(), "write -P 9 4M 64k", format="raw")
    pair.write("write -P 2 512k 1M")

    pair.brep("alpha", "resize", "vda", "16M")
    pair.wait_state("alpha", "in-sync")
    t.wait_until(lambda: pair.disk_status("beta")["size"] == 16 << 20, "the secondary has grown")
    info = json.loads(t.qemu_img("info", "--output=json", "-f", "raw", pair.guest()).stdout)
    t.equal(info["virtual-size"], 16 << 20, "what a new guest sees")
    pair.write("write -P 3 15M 1M", "write -P 4 8M 64k")
    # The secondary's guest has what was committed with the growth, and nothing of the writes since.
    t.qemu_io(pair.second_guest(), "read -P 2 512k 1M", "read -P 0 15M 1M", format="raw")
    pair.checkpoint()
    t.qemu_io(pair.second_guest(), "read -P 3 15M 1M", "read -P 4 8M 64k", format="raw")
    t.log("grown on both sides, checkpoints go on")

    pair.write("write -P 5 14M 2M")
    pair.secondary.kill9()
    for name in ("s.sock", "g.sock"):
        (t.dir / name).unlink(missing_ok=True)
    pair.start_secondary()
    expected = t.sha256("p.raw")
    pair.wait_state("alpha", "in-sync")
    pair.checkpoint()
    pair.write("write -P 6 0 16M")
    pair.primary.kill9()
    pair.failover()
    t.equal(snapshot(t, pair.second_guest(), "promoted.raw"), expected, "the last checkpoint")
    t.log("killed, resynced and promoted at its new size")

    refused = pair.brep("beta", "resize", "vda", "8M", code=2)
    t.expect("only grows" in refused.stderr, refused.stderr)
    pair.secondary.stop()
    # What the killed process had set aside.
    t.brep("image", "check", "--repair", "leaks", "s.qcow2")
    t.qemu_img("check", "s.qcow2")
    t.qemu_img("compare", "-f", "raw", "-F", "qcow2", "promoted.raw", "s.qcow2")


brep_iotest.main(run)
