"""A crash from end to end: the primary is killed under load, the secondary takes over, the old primary
returns as a secondary with what is missing and no more, and a switchover brings the guest home. What
the failover promises is there, and in the end both disks are equal.

Seen to fail with: maps of the new primary that do not count what it has written since.
"""

import threading

import brep_iotest
from brep_pair import Writer, count_writes, snapshot
from brep_roles import Peers

# deadline_s: 120
SIZE = 128 << 20
# Where the load writes beside the writes that are counted.
LOAD = 32 << 20


def run(t):
    for target in ("latest", "checkpoint"):
        t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
        failback(t, target)


def failback(t, target):
    pair = Peers(t, SIZE)
    t.qemu_io(pair.guest("alpha"), "write -P 1 64M 32M")
    writer = Writer(t, pair.guest("alpha"))
    t.expect(writer.write(100), "writes before the checkpoint")
    pair.brep("alpha", "checkpoint")
    stop = threading.Event()

    def guest():
        at = 0
        while not stop.is_set():
            at = (at + 5) % 200
            t.qemu_io(pair.guest("alpha"), f"write -P {at + 1} {LOAD + at * 65536} 50k", code=None)

    loads = [threading.Thread(target=guest), threading.Thread(target=lambda: writer.write(2000))]
    for load in loads:
        load.start()
    t.wait_until(lambda: writer.acknowledged > 300, "the load runs", 30)
    t.expect(pair.status("beta")["latest-ok"], "latest is offered")
    pair.kill("alpha")
    stop.set()
    for load in loads:
        load.join(30)
    writer.end()
    acknowledged = writer.acknowledged

    pair.brep("beta", "failover", "--to", target)
    snapshot(t, pair.guest("beta"), "now.raw")
    held = count_writes(t, "now.raw", length=LOAD)
    if target == "latest":
        t.expect(held >= acknowledged, f"{held} of {acknowledged} acknowledged writes")
    else:
        t.equal(held, 100, "writes of the checkpoint")
    later = Writer(t, pair.guest("beta"), base=16 << 20)
    t.expect(later.write(50), "the guest goes on at beta")

    sent = pair.bring_back("alpha")
    t.expect(sent < 24 << 20, f"{sent} bytes were sent to the old primary")
    t.expect(later.write(50), "the guest is still connected")
    pair.brep("beta", "switchover")
    t.expect(not later.write(1), "beta serves nobody any more")
    later.end()
    t.wait_until(lambda: pair.status("alpha")["role"] != "secondary", "alpha is the primary")
    pair.wait_in_sync("alpha")
    snapshot(t, pair.guest("alpha"), "now.raw")
    t.expect(count_writes(t, "now.raw", base=16 << 20, length=1 << 20) >= 100, "beta's writes")
    t.equal(count_writes(t, "now.raw", length=16 << 20), held, "what the failover had")
    t.qemu_io(pair.guest("alpha"), "read -P 1 64M 32M", "write -P 5 100M 1M", "flush")
    pair.stop_equal("alpha")
    t.log(f"{target}: home again, and equal")


brep_iotest.main(run)
