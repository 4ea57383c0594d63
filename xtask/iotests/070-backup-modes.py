"""Backups of a disk that is written to: full, top and bitmap, each compared with the start.

Seen to fail with: a filter that copies nothing for the guest's writes.
"""

import brep_iotest
from brep_copy import Copy, Writer

# deadline_s: 120
SIZE = 32 << 20
FILES = {"full raw": ("disk.raw", "copy.qcow2"), "full qcow2": ("disk.qcow2", "copy.raw"),
         "full odd": ("odd.raw", "odd-copy.raw")}


def run(t):
    t.pattern_file("disk.raw", SIZE, seed=1)
    t.pattern_file("odd.raw", SIZE + 1000, seed=2)
    t.qemu_img("convert", "-f", "raw", "-O", "qcow2", "disk.raw", "disk.qcow2")
    t.qemu_io("disk.raw", "write -z 8M 4M")
    for name, (source, target) in FILES.items():
        copy = Copy(t, source, name=name.replace(" ", "-"))
        backup_under_load(t, copy, target, sync="full")
        t.log(f"{name}: the target is the disk at the start")

    # Top: the target has the same base, and only what the overlay has.
    t.run("mv", "disk.qcow2", "base.qcow2")
    t.qemu_img("create", "-f", "qcow2", "-b", "base.qcow2", "-F", "qcow2", "top.qcow2", SIZE)
    t.qemu_io("top.qcow2", "write -P 77 1M 100k", "write -P 78 9M 1M", "write -z 20M 64k")
    copy = Copy(t, "top.qcow2", "--backing", "base.qcow2", name="top")
    job = backup_under_load(t, copy, "top-copy.qcow2", sync="top", target_backing=["base.qcow2"])
    t.expect(job["len"] < 2 << 20, f"the base is left out: {job}")
    t.log("top: the target, over the same base, is the disk at the start")

    # Bitmap: over an older copy of the disk.
    t.run("cp", "disk.raw", "older.raw")
    copy = Copy(t, "disk.raw", name="bitmap")
    copy.execute("block-dirty-bitmap-add", name="b", granularity=4096)
    copy.io("write -P 1 0 4k", "write -P 2 5M 1M", "write -z 9M 64k", "discard 30M 128k")
    job = backup_under_load(t, copy, "older.raw", sync="bitmap", bitmap="b",
                            bitmap_mode="on-success")
    t.expect(job["len"] < 2 << 20, f"the rest is left out: {job}")
    t.log("bitmap: the target, over the older copy, is the disk at the start")


def backup_under_load(t, copy, target, **arguments):
    """Runs a job slowly while a guest writes, and then to its end."""
    copy.keep("start.raw")
    copy.backup(target, speed=1 << 20, **arguments)
    writer = Writer(t, copy.disk, SIZE, name=f"writer-{copy.name}")
    writer.write(200)
    copy.wait_job("something is copied", lambda job: job["offset"] > 0)
    copy.execute("block-job-set-speed", device="job0", speed=0)
    writer.write(200)
    writer.stop()
    job = copy.wait_completed()
    copy.quit()
    copy.same("start.raw", target)
    if target.endswith("qcow2"):
        t.qemu_img("check", target)
    source = copy.daemon.argv[3]
    later = t.qemu_img("compare", "start.raw", source, code=None)
    t.equal(later.code, 1, f"the guest has written meanwhile: {later.describe()}")
    return job


brep_iotest.main(run)
