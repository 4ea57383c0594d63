"""The secondary's guest sees the last checkpoint plus its own writes, and nothing newer.

Seen to fail with: no pre-images copied.
"""

import brep_iotest
from brep_pair import Pair, snapshot


def run(t):
    t.pattern_file("p.raw", 16 << 20, seed=1)
    pair = Pair(t, guest=True).start()
    mine = pair.second_guest()
    pair.checkpoint()
    pair.write("write -P 1 0 1M", "write -P 2 4M 64k", "write -z 8M 64k")
    t.qemu_io(mine, "write -P 9 512k 64k", "read -P 9 512k 64k")
    before = part(t, mine, 4 << 20)
    pair.write("write -P 5 4M 64k")
    t.equal(part(t, mine, 4 << 20), before, "a primary write under the secondary's guest")
    t.log("between checkpoints: the checkpoint and its own writes")
    pair.checkpoint()
    t.qemu_img("compare", "-f", "raw", "-F", "raw", mine, pair.guest())
    t.qemu_io(mine, "read -P 5 4M 64k", "read -P 1 512k 64k")
    t.log("after a checkpoint: the primary's disk, its own writes are gone")

    t.qemu_io(mine, "write -P 6 1M 64k", "write -P 7 3M 4k", "flush")
    snapshot(t, mine, "wanted.raw")
    pair.write("write -P 8 0 2M")
    pair.failover("latest", code=3)
    pair.primary.kill9()
    pair.failover()
    t.qemu_img("compare", "-f", "raw", "-F", "raw", mine, "wanted.raw")
    pair.wait_state("beta", "promoted")
    pair.secondary.stop()
    t.qemu_img("compare", "-f", "raw", "-F", "raw", "s.raw", "wanted.raw")
    t.log("after a failover: the checkpoint and its own writes")


def part(t, uri, at):
    t.qemu_img("convert", "-f", "raw", "-O", "raw", uri, "part.raw")
    return t.sha256("part.raw", at, 64 << 10)


brep_iotest.main(run)
