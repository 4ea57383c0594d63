"""Error policies of a source that cannot be read for a while, and of a guest that writes then.

Seen to fail with: a job that goes on although an error has stopped it.
"""

import pathlib

import brep_iotest
from brep_copy import Copy

SIZE = 4 << 20


def run(t):
    t.require("nbdkit")
    t.pattern_file("start.raw", SIZE, seed=7)
    trouble = pathlib.Path(t.dir / "trouble")
    for policy in ["report", "stop", "ignore"]:
        t.run("cp", "start.raw", "disk.raw")
        socket_name = f"bad-{policy}.sock"
        server = t.daemon(f"bad-{policy}", "nbdkit", "-f", "-U", t.dir / socket_name,
                          "--filter=error", "file", "disk.raw", "error-pread=EIO",
                          "error-pread-rate=1", f"error-pread-file={trouble}",
                          ready=lambda: t.listens(socket_name))
        # The target's policy is another one.
        other = "stop" if policy == "report" else "report"
        copy = Copy(t, t.uri(socket_name), name=f"copy-{policy}")
        trouble.touch()
        copy.backup(f"{policy}.raw", on_source_error=policy, on_target_error=other, max_workers=1)
        error = copy.wait_event("BLOCK_JOB_ERROR")["data"]
        t.equal((error["operation"], error["action"]), ("read", policy), "the error")
        if policy == "report":
            t.expect("error" in copy.wait_event("BLOCK_JOB_COMPLETED")["data"], "it fails")
        else:
            if policy == "stop":
                job = copy.wait_job("it stops", lambda job: job["status"] == "paused")
                t.equal((job["io-status"], job["offset"]), ("failed", 0), "io-status, offset")
                # What cannot be copied is not overwritten.
                refused = copy.io("write -P 1 0 4k", code=None)
                t.expect("failed" in refused.stdout + refused.stderr, refused.describe())
                trouble.unlink()
                copy.execute("block-job-resume", device="job0")
            else:
                copy.wait_event("BLOCK_JOB_ERROR")
                trouble.unlink()
            copy.wait_completed()
            copy.same("start.raw", f"{policy}.raw")
        trouble.unlink(missing_ok=True)
        copy.quit()
        server.stop()
        # nbdkit leaves it.
        pathlib.Path(socket_name).unlink()
        t.log(f"{policy}: as told")


brep_iotest.main(run)
