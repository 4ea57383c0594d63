"""Pause, resume, speed, cancel, finalize, dismiss: by conditions, never by time.

Seen to fail with: a job that goes on although it is paused.
"""

import brep_iotest
from brep_copy import Copy

SIZE = 16 << 20
# So slow that a job never ends by itself within this test: a unit in a quarter of an hour.
SLOW = 64


def run(t):
    t.pattern_file("disk.raw", SIZE, seed=3)
    copy = Copy(t, "disk.raw")
    copy.keep("start.raw")

    # A slow job sleeps; it is paused, and stands still whatever its speed.
    copy.backup("a.raw", speed=SLOW, max_workers=1)
    job = copy.wait_job("it sleeps", lambda job: job["offset"] > 0 and not job["busy"])
    t.equal(job["offset"], 65536, "a unit was copied")
    copy.execute("block-job-pause", device="job0")
    copy.wait_job("it is paused", lambda job: job["status"] == "paused")
    copy.execute("block-job-set-speed", device="job0", speed=0)
    t.log(copy.refused("block-job-pause", device="job0"))
    copy.io("write -P 9 8M 4k", "read -P 9 8M 4k")
    job = copy.job()
    t.equal((job["offset"], job["speed"]), (2 * 65536, 0), "only the guest's copy was made")
    copy.execute("block-job-resume", device="job0")
    copy.wait_completed()
    copy.same("start.raw", "a.raw")
    t.log("\n  ".join(["paused and resumed:", *copy.job_events()]))

    # A new speed wakes a sleeping job.
    copy.keep("start.raw")
    copy.backup("b.qcow2", speed=SLOW)
    copy.wait_job("it sleeps", lambda job: job["offset"] > 0 and not job["busy"])
    t.log(copy.refused("block-job-resume", device="job0"))
    copy.execute("block-job-set-speed", device="job0", speed=1 << 30)
    t.equal(copy.wait_completed()["speed"], 1 << 30, "speed")
    copy.same("start.raw", "b.qcow2")
    t.log("\n  ".join(["a sleeping job wakes:", *copy.job_events()]))

    # Cancelled half-way: what was copied stays.
    copy.backup("c.raw", speed=SLOW, max_workers=1)
    copy.wait_job("something is copied", lambda job: job["offset"] > 0)
    copy.execute("block-job-cancel", device="job0")
    event = copy.wait_event("BLOCK_JOB_CANCELLED")["data"]
    copy.wait_closed()
    t.equal((event["offset"], event["len"]), (65536, SIZE), "offset and len")
    t.equal(t.sha256("c.raw", 0, 65536), t.sha256("start.raw", 0, 65536), "what was copied")
    t.log("\n  ".join(["cancelled:", *copy.job_events()]))

    # Pending until finalized, concluded until dismissed; the name is in use until then.
    copy.keep("start.raw")
    copy.backup("d.raw", auto_finalize=False, auto_dismiss=False)
    copy.wait_event("BLOCK_JOB_PENDING")
    copy.io("write -P 10 0 1M")
    t.log(copy.refused("block-job-dismiss", id="job0"))
    copy.execute("block-job-finalize", id="job0")
    copy.wait_completed()
    copy.same("start.raw", "d.raw")
    t.equal(copy.job()["status"], "concluded", "status")
    for command in ["pause", "resume", "cancel", "complete"]:
        t.log(copy.refused(f"block-job-{command}", device="job0"))
    t.log(copy.refused("blockdev-backup", target="e.raw"))
    copy.execute("block-job-dismiss", id="job0")
    t.log("\n  ".join(["finalized and dismissed:", *copy.job_events()]))
    t.equal(copy.execute("query-block-jobs"), [], "jobs")
    copy.quit()


brep_iotest.main(run)
