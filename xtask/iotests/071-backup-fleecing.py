"""Fleecing: the snapshot stays as it was while the guest overwrites the disk, until a checkpoint.

Seen to fail with: a filter that copies nothing for the guest's writes.
"""

import brep_iotest
from brep_copy import Copy, Writer

# deadline_s: 120
SIZE = 32 << 20


def run(t):
    for source, target in [("disk.raw", "buffer.qcow2"), ("disk.qcow2", "buffer.raw")]:
        t.qemu_img("create", "-f", source.split(".")[1], source, SIZE)
        t.qemu_io(source, "write -P 5 0 16M")
        copy = Copy(t, source, name=source.split(".")[1])
        copy.keep("start.raw")
        copy.backup(target, sync="none")
        writer = Writer(t, copy.disk, SIZE, name=f"writer-{copy.name}")
        for pass_ in range(3):
            writer.write(300)
            # Read while the writes come in.
            copy.keep("now.raw", copy.snapshot)
            copy.same("start.raw", "now.raw")
        writer.stop()
        readable = t.qemu_io(copy.snapshot, "write 0 512", code=None)
        t.expect(readable.code != 0, "the snapshot takes no writes")
        job = copy.job()
        t.expect(0 < job["offset"] < SIZE, f"only what was overwritten was copied: {job}")
        t.log(f"{source}: the snapshot stays")

        # A checkpoint: the snapshot moves on.
        copy.keep("start.raw")
        copy.execute("checkpoint", device="job0")
        writer = Writer(t, copy.disk, SIZE, seed=9, name=f"writer2-{copy.name}")
        writer.write(300)
        writer.stop()
        copy.keep("now.raw", copy.snapshot)
        copy.same("start.raw", "now.raw")
        t.log(f"{source}: a checkpoint moves it on")

        copy.execute("block-job-cancel", device="job0")
        copy.wait_event("BLOCK_JOB_CANCELLED")
        copy.wait_closed()
        t.wait_until(lambda: t.qemu_io(copy.snapshot, "read 0 512", code=None).code != 0,
                     "the snapshot is gone with its job")
        copy.io("write -P 3 0 64k", "read -P 3 0 64k")
        if target.endswith("qcow2"):
            t.qemu_img("check", target)
        copy.quit()


brep_iotest.main(run)
