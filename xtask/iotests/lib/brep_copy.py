"""The example `copy` of the backup crate: a disk in use, its snapshot, and backup jobs."""

import random
import subprocess

from brep_example import Program


class Copy(Program):
    """Serves a disk as `disk`, and as `snapshot` while a job runs."""

    def __init__(self, t, source, *args, name="copy", before=()):
        self.socket_name = f"{name}.sock"
        super().__init__(t, name, "copy", "--listen", t.uri(self.socket_name), source, *args,
                         before=before)
        self._told = 0
        self.disk = t.uri(self.socket_name, "disk")
        self.snapshot = t.uri(self.socket_name, "snapshot")

    def io(self, *commands, code=0):
        """qemu-io commands as the guest."""
        return self.t.qemu_io(self.disk, *commands, code=code)

    def backup(self, target, **arguments):
        """Starts a job."""
        self.execute("blockdev-backup", target=str(target), **arguments)

    def job(self, id="job0"):
        return next((job for job in self.execute("query-block-jobs") if job["device"] == id), None)

    def bitmap(self, name="b"):
        return next(b for b in self.execute("query-dirty-bitmaps") if b["name"] == name)

    def wait_job(self, what, condition, deadline_s=20):
        """Waits until the job is as the condition says, and returns what it is like."""
        def ask():
            job = self.job()
            return job if job and condition(job) else None
        return self.t.wait_until(ask, what, deadline_s)

    def wait_completed(self, deadline_s=30):
        """The target is closed then."""
        event = self.wait_event("BLOCK_JOB_COMPLETED", deadline_s)
        self.t.expect("error" not in event["data"], f"a success, not {event}")
        self.t.equal(event["data"]["offset"], event["data"]["len"], "offset and len")
        self.wait_closed()
        return event["data"]

    def wait_closed(self):
        closed = self.wait_event("TARGET_CLOSED")
        self.t.expect("error" not in closed["data"], f"the target is closed: {closed}")

    def keep(self, name, uri=None):
        """A raw copy of the disk (or of the snapshot) as it is now, nobody writing."""
        self.t.run("rm", "-f", name)
        self.t.qemu_img("convert", "-f", "raw", "-O", "raw", uri or self.disk, name)

    def same(self, name, other):
        format = "qcow2" if other.endswith("qcow2") else "raw"
        self.t.qemu_img("compare", "-f", "raw", "-F", format, name, other)

    def job_events(self):
        """What was told of jobs since the last call, in few words."""
        events = self.events()[self._told:]
        self._told += len(events)
        return [in_few_words(event) for event in events]


def in_few_words(event):
    data = event["data"]
    words = [event["event"]] + [data[key] for key in ("status", "operation", "action")
                                if key in data]
    return " ".join(words + ["with error"] if "error" in data else words)


class Writer:
    """A guest that writes at random places, many writes at a time, until it is stopped."""

    def __init__(self, t, uri, size, seed=0, name="writer"):
        self.t, self.size = t, size
        self._random = random.Random(seed)
        self._count = 0
        self._qemu_io = t.daemon(name, "qemu-io", "-f", "raw", uri, stdin=subprocess.PIPE)

    def write(self, count):
        for _ in range(count):
            self._count += 1
            at = self._random.randrange((self.size - 65536) // 512) * 512
            length = self._random.choice([512, 4096, 10240, 65536])
            self._command(f"aio_write -q -P {1 + self._count % 250} {at} {length}")
        self._command("aio_flush")

    def stop(self):
        """Ends the guest, whose writes must all have succeeded."""
        self._command("aio_flush")
        self._command("quit")
        self._qemu_io.process.stdin.close()
        self.t.equal(self._qemu_io.wait(30), 0, "exit code of the writer")
        said = self._qemu_io.log()
        self.t.expect("failed" not in said, f"every write succeeds: {said}")

    def _command(self, line):
        self._qemu_io.process.stdin.write(line.encode() + b"\n")
        self._qemu_io.process.stdin.flush()
