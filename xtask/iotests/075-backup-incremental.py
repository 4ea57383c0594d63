"""A full backup and two incrementals, each in a file of its own over the last, restore each state.

Seen to fail with: a bitmap that loses what was written during the job.
"""

import brep_iotest
from brep_copy import Copy, Writer

# deadline_s: 120
SIZE = 32 << 20


def run(t):
    chain(t)
    modes(t)


def chain(t):
    t.pattern_file("disk.raw", SIZE, seed=5)
    copy = Copy(t, "disk.raw", name="chain")
    copy.execute("block-dirty-bitmap-add", name="b", granularity=65536)
    targets = []
    for step, sync in enumerate(["full", "incremental", "incremental"]):
        copy.keep(f"state{step}.raw")
        target = f"{step}-{sync}.qcow2"
        before = copy.bitmap()["count"]
        copy.backup(target, sync=sync, bitmap="b", bitmap_mode="on-success", speed=256 << 10,
                    target_backing=targets)
        # The guest writes to one half while the job runs: that is for the next one.
        writer = Writer(t, copy.disk, SIZE // 2, seed=step, name=f"writer{step}")
        writer.write(40)
        copy.execute("block-job-set-speed", device="job0", speed=0)
        writer.stop()
        job = copy.wait_completed()
        if sync == "incremental":
            t.equal(job["len"], before, "only what is dirty is copied")
        t.expect(0 < copy.bitmap()["count"] < SIZE, f"the next one's: {copy.bitmap()}")
        targets.insert(0, target)
    copy.quit()
    for step, target in enumerate(reversed(targets)):
        copy.same(f"state{step}.raw", target)
        t.qemu_img("check", target)
        t.log(f"{target}: the state at its start")


def modes(t):
    """What each mode leaves in the bitmap when the job succeeds, and when it is cancelled."""
    for mode in ["on-success", "never", "always"]:
        for end in ["success", "cancel"]:
            t.qemu_img("create", "-f", "raw", "small.raw", "4M")
            copy = Copy(t, "small.raw", name=f"{mode}-{end}")
            copy.execute("block-dirty-bitmap-add", name="b")
            copy.io("write -P 1 0 64k", "write -P 2 1M 64k")
            # The first unit is copied; the second not before the next quarter of an hour.
            copy.backup(f"{mode}-{end}.raw", sync="bitmap", bitmap="b", bitmap_mode=mode,
                        speed=64, max_workers=1)
            copy.wait_job("one is copied", lambda job: job["offset"] == 65536)
            copy.io("write -P 3 2M 64k")
            if end == "cancel":
                copy.execute("block-job-cancel", device="job0")
                copy.wait_closed()
            else:
                copy.execute("block-job-set-speed", device="job0", speed=0)
                copy.wait_completed()
            bitmap = copy.bitmap()
            t.expect(not bitmap["busy"], f"free again: {bitmap}")
            t.log(f"{mode}, {end}: {bitmap['count'] // 65536} of 3 units are dirty")
            copy.quit()


brep_iotest.main(run)
