"""A merge that is killed again and again ends with the right disk; guest writes survive it.

Seen to fail with: guest writes to what is merged already not written to the disk too.
"""

import time

import brep_iotest
from brep_pair import Pair, snapshot

# deadline_s: 120
SIZE = 96 << 20


def run(t):
    for files in (("p.raw", "s.raw"), ("p.qcow2", "s.qcow2")):
        t.run("rm", "-rf", "alpha", "beta")
        t.pattern_file("start.raw", SIZE, seed=1)
        t.qemu_img("convert", "-f", "raw", "-O", files[0].split(".")[1], "start.raw", files[0])
        pair = Pair(t, {"vda": files}, size=SIZE).start()
        pair.write("write -P 1 1M 1M")
        pair.checkpoint()
        snapshot(t, pair.guest(), "wanted.raw")
        for at in range(0, 96, 3):
            pair.write(f"write -P {at + 2} {at}M 2M")
        pair.primary.kill9()
        (t.dir / "p.sock").unlink()
        pair.failover()
        for round_ in range(4):
            commands = [f"write -P {100 + round_} {round_ * 20}M 300k", "flush"]
            t.qemu_io(pair.promoted(), *commands)
            t.qemu_io("wanted.raw", *commands)
            time.sleep(0.02 * round_)
            pair.secondary.kill9()
            (t.dir / "s.sock").unlink()
            pair.start_secondary()
            t.qemu_img("compare", "-f", "raw", "-F", "raw", pair.promoted(), "wanted.raw")
        pair.wait_state("beta", "promoted", deadline_s=60)
        t.qemu_img("compare", "-f", "raw", "-F", "raw", pair.promoted(), "wanted.raw")
        pair.secondary.stop()
        t.qemu_img("compare", "-F", "raw", "-f", files[1].split(".")[1], files[1], "wanted.raw")
        if files[1].endswith("qcow2"):
            code = t.qemu_img("check", files[1], code=None).code
            t.expect(code in (0, 3), f"no corruption: {code}")
        t.log(f"{files[1]}: the checkpoint and the guest's writes")


brep_iotest.main(run)
