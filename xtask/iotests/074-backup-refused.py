"""What no backup starts with, what no job takes; a checkpoint with sync none only.

Seen to fail with: a refused job that keeps its name.
"""

import brep_iotest
from brep_copy import Copy

SIZE = 4 << 20


def run(t):
    t.pattern_file("disk.raw", SIZE, seed=4)
    t.qemu_img("create", "-f", "raw", "short.raw", SIZE - 512)
    t.qemu_img("create", "-f", "qcow2", "long.qcow2", 2 * SIZE)
    copy = Copy(t, "disk.raw")
    copy.execute("block-dirty-bitmap-add", name="b")
    refused = [
        {},
        {"target": "disk.raw"},
        {"target": "short.raw"},
        {"target": "long.qcow2"},
        {"target": "no/such/folder.raw"},
        {"target": "t.raw", "sync": "everything"},
        {"target": "t.raw", "on_target_error": "panic"},
        {"target": "t.raw", "compress": True},
        {"target": "t.raw", "speed": -1},
        {"target": "t.raw", "max_workers": 0},
        {"target": "t.raw", "max_workers": 65},
        {"target": "t.raw", "max_chunk": 4096},
        {"target": "t.raw", "colour": "red"},
        {"target": "t.raw", "sync": "incremental"},
        {"target": "t.raw", "sync": "bitmap", "bitmap_mode": "always"},
        {"target": "t.raw", "sync": "bitmap", "bitmap": "b"},
        {"target": "t.raw", "sync": "bitmap", "bitmap": "x", "bitmap_mode": "never"},
        {"target": "t.raw", "sync": "incremental", "bitmap": "b", "bitmap_mode": "never"},
        {"target": "t.raw", "sync": "none", "bitmap": "b", "bitmap_mode": "always"},
        {"target": "t.raw", "sync": "full", "bitmap": "b", "bitmap_mode": "never"},
        {"target": "t.raw", "bitmap_mode": "never"},
    ]
    for arguments in refused:
        t.log(f"{arguments}: {copy.refused('blockdev-backup', **arguments)}")
    t.equal(copy.execute("query-block-jobs"), [], "nothing is left")
    t.expect(not copy.bitmap()["busy"], "the bitmap is free")

    # A checkpoint is for a job that copies nothing by itself.
    modes = [{"sync": "full"}, {"sync": "top"},
             {"sync": "bitmap", "bitmap": "b", "bitmap_mode": "never"},
             {"sync": "incremental", "bitmap": "b"}]
    for mode in modes:
        copy.backup("t.raw", auto_finalize=False, **mode)
        t.log(f"{mode['sync']}: {copy.refused('checkpoint', device='job0')}")
        copy.wait_event("BLOCK_JOB_PENDING")
        if "bitmap" in mode:
            t.log(copy.refused("block-dirty-bitmap-clear", name="b"))
        copy.execute("block-job-cancel", device="job0")
        copy.wait_closed()
    copy.backup("t.raw", sync="none")
    copy.io("write -P 1 0 4k")
    copy.execute("checkpoint", device="job0")
    copy.io("write -P 2 0 4k")
    t.qemu_io(copy.snapshot, "read -P 1 0 4k", readonly=True)
    t.log("none: the checkpoint succeeds")

    # Its devices and its name are in use.
    t.log(copy.refused("blockdev-backup", target="u.raw"))
    t.log(copy.refused("blockdev-backup", target="u.raw", job_id="job1"))
    for command, arguments in [("block-job-pause", {"device": "nobody"}),
                               ("block-job-finalize", {"id": "job0"}),
                               ("block-job-complete", {"device": "job0"}),
                               ("block-job-set-speed", {"device": "job0", "speed": -1}),
                               ("block-dirty-bitmap-add", {"name": "b"}),
                               ("block-dirty-bitmap-add", {"name": "c", "granularity": 1000}),
                               ("block-dirty-bitmap-remove", {"name": "x"})]:
        t.log(f"{command} {arguments}: {copy.refused(command, **arguments)}")
    copy.quit()


brep_iotest.main(run)
