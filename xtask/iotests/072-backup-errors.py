"""Error policies: a full target, a target server that is killed.

Seen to fail with: a job that goes on although an error has stopped it.
"""

import resource

import brep_iotest
from brep_copy import Copy

# deadline_s: 120
SIZE = 8 << 20
LIMIT = 2 << 20


def run(t):
    t.pattern_file("disk.raw", SIZE, seed=7)
    t.run("cp", "disk.raw", "start.raw")
    full_target(t)
    killed_target(t)


def full_target(t):
    """Files must not grow beyond 2 MiB for a while."""
    # A signal would kill the program; without it the write fails, as on a full file system.
    copy = Copy(t, "disk.raw", name="full", before=["sh", "-c", 'trap "" XFSZ; exec "$@"', "sh"])
    for policy in ["report", "enospc", "auto", "stop", "ignore"]:
        t.run("truncate", "-s", SIZE, f"{policy}.raw")
        limit(copy, LIMIT)
        copy.backup(f"{policy}.raw", on_target_error=policy, max_workers=1)
        if policy == "report":
            failed = copy.wait_event("BLOCK_JOB_COMPLETED")["data"]
            t.expect("error" in failed and failed["offset"] < failed["len"], f"it fails: {failed}")
            copy.wait_closed()
            t.log("\n  ".join([f"{policy}:", *copy.job_events()]))
            continue
        copy.wait_event("BLOCK_JOB_ERROR")
        if policy == "ignore":
            copy.wait_event("BLOCK_JOB_ERROR")
            t.equal(copy.job()["io-status"], "ok", "io-status")
        else:
            job = copy.wait_job("it stops", lambda job: job["status"] == "paused")
            t.equal((job["paused"], job["io-status"]), (True, "nospace"), "paused, io-status")
            t.equal(job["offset"], LIMIT, "what is copied")
        limit(copy, resource.RLIM_INFINITY)
        if policy != "ignore":
            copy.execute("block-job-resume", device="job0")
        copy.wait_completed()
        copy.same("start.raw", f"{policy}.raw")
        # How often it was tried is a matter of time.
        t.log("\n  ".join([f"{policy}:", *dict.fromkeys(copy.job_events())]))
    copy.quit()


def killed_target(t):
    for policy in ["report", "stop", "enospc"]:
        t.qemu_img("create", "-f", "raw", f"far-{policy}.raw", SIZE)
        server = t.qemu_nbd(f"server-{policy}", f"far-{policy}.raw", f"far-{policy}.sock")
        copy = Copy(t, "disk.raw", name=f"killed-{policy}")
        copy.backup(t.uri(f"far-{policy}.sock"), on_target_error=policy, speed=1 << 20)
        copy.wait_job("something is copied", lambda job: job["offset"] > 0)
        server.kill9()
        # A guest's write that has to be copied first fails, and changes nothing.
        at_end = SIZE - 65536
        failed = copy.io(f"write -P 1 {at_end} 4k", code=None)
        t.expect("failed" in failed.stdout + failed.stderr or copy.job() is None,
                 f"the guest is told: {failed.describe()}")
        try:
            copy.execute("block-job-set-speed", device="job0", speed=0)
        except brep_iotest.Failed:
            # It had found the server gone, and ended, before it was told to hurry.
            t.expect(policy != "stop" and copy.job() is None, "the job is there, or has failed")
        if policy == "stop":
            job = copy.wait_job("it stops", lambda job: job["status"] == "paused")
            t.equal(job["io-status"], "failed", "io-status")
            t.log(copy.refused("block-job-cancel", device="job0"))
            copy.execute("block-job-cancel", device="job0", force=True)
            copy.wait_event("BLOCK_JOB_CANCELLED")
        else:
            failed = copy.wait_event("BLOCK_JOB_COMPLETED")["data"]
            t.expect("error" in failed, f"it fails: {failed}")
        copy.io(f"write -P 2 {at_end} 4k")
        copy.quit()
        t.log(f"killed server, {policy}: as told")


def limit(copy, length):
    resource.prlimit(copy.daemon.pid, resource.RLIMIT_FSIZE, (length, resource.RLIM_INFINITY))


brep_iotest.main(run)
