"""QEMU's own pair, with which brep is compared: forwards, takes checkpoints, fails over.

Seen to fail with: the secondary's checkpoint left out.
"""

import brep_iotest
import brep_qemu
from brep_qemu import QemuPrimary, QemuSecondary


def run(t):
    t.pattern_file("p.raw", 8 << 20)
    t.run("cp", "p.raw", "s.raw")
    port = t.free_port()
    secondary = QemuSecondary(t, "s.raw", port)
    primary = QemuPrimary(t, "p.raw", port, "guest.sock")
    t.qemu_io(primary.guest(), "write -P 1 0 1M", "read -P 1 0 1M")
    brep_qemu.checkpoint(primary, secondary)
    kept = t.sha256("p.raw")
    t.qemu_io(primary.guest(), "write -P 2 512k 1M", "write -P 3 4M 64k", "flush")
    t.expect(t.sha256("p.raw") == t.sha256("s.raw"), "the secondary's file has every write")
    primary.kill9()
    secondary.failover()
    secondary.wait_merged()
    secondary.stop()
    t.equal(t.sha256("s.raw"), kept, "the promoted disk")
    t.log("promoted to the checkpoint")


brep_iotest.main(run)
