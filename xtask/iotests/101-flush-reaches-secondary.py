"""A guest's FLUSH is answered when it has reached the secondary's disk, and not before: the secondary is
stopped when it is about to put its disk's file on stable storage, and the guest waits.

Seen to fail with: a primary that does not forward what its guest flushes, by --durability process and
by --ack async.
"""

import os
import signal
import subprocess

import brep_iotest
from brep_pair import Pair

# How long an answer that must not come is waited for.
SILENCE_S = 1


class Guest:
    """One command after the other; each is answered by the next prompt."""

    def __init__(self, t, uri):
        self.process = subprocess.Popen([t.which("qemu-io"), "-f", "raw", uri],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT)
        os.set_blocking(self.process.stdout.fileno(), False)
        self.output = b""
        self.begun = 0

    def begin(self, command):
        self.begun += 1
        self.process.stdin.write(f"{command}\n".encode())
        self.process.stdin.flush()

    def is_answered(self):
        self.output += self.process.stdout.read() or b""
        return self.output.count(b"qemu-io> ") > self.begun

    def end(self):
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


def tracer(pid):
    with open(f"/proc/{pid}/status") as status:
        return next(line.split()[1] for line in status if line.startswith("TracerPid:"))


def state(pid):
    with open(f"/proc/{pid}/stat") as stat:
        return stat.read().rsplit(")", 1)[1].split()[0]


def run(t):
    t.require("strace")
    pair = Pair(t, primary=["--peer-timeout", "60s"]).start()
    pair.checkpoint()
    pid = pair.secondary.pid
    strace = t.daemon(
        "strace", "strace", "-f", "-qq", "-o", "trace", "-P", str(t.dir / "s.raw"),
        "-e", "trace=fdatasync,fsync", "-e", "inject=fdatasync,fsync:signal=STOP", "-p", str(pid),
        ready=lambda: tracer(pid) != "0")
    guest = Guest(t, pair.guest())
    for command in ("write -P 1 0 4k", "write -P 2 64k 4k"):
        guest.begin(command)
        t.wait_until(guest.is_answered, command)
    t.expect(state(pid) not in "tT", "a write alone waits for no flush of the secondary's disk")
    guest.begin("flush")
    t.wait_until(lambda: state(pid) in "tT", "the secondary flushes its disk")
    answered = True
    try:
        t.wait_until(guest.is_answered, "an answer", SILENCE_S)
    except brep_iotest.Failed:
        answered = False
    t.expect(not answered, "the flush is not answered before the secondary's disk has it")
    strace.stop(code=None)
    os.kill(pid, signal.SIGCONT)
    t.wait_until(guest.is_answered, "the flush is answered")
    t.expect(b"failed" not in guest.output, "no request has failed")
    guest.end()
    status = pair.status("alpha")
    t.equal([status["link"], status["errors"]], ["connected", []], "nothing else has happened")
    pair.stop()
    pair.equal_files()
    t.log("flushed there first")


brep_iotest.main(run)
