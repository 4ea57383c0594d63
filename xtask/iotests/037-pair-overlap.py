"""Overlapping concurrent writes, TRIM and zeroes: when all is drained, both disks are equal.

Seen to fail with: overlapping writes not held apart on the primary.
"""

import random
import subprocess

import brep_iotest
from brep_pair import Pair

# deadline_s: 120


def run(t):
    for ack in ("sync", "async"):
        for files in (("p.raw", "s.raw"), ("p.qcow2", "s.qcow2")):
            t.run("rm", "-rf", "alpha", "beta")
            pair = Pair(t, {"vda": files}, primary=["--ack", ack], interval="100ms").start()
            # Several clients fight for the same few clusters, each with many requests in flight.
            clients = [client(t, pair, seed) for seed in range(4)]
            for process in clients:
                out, _ = process.communicate(timeout=60)
                t.equal(process.returncode, 0, out)
            pair.brep("alpha", "checkpoint")
            pair.stop()
            pair.equal_files()
            t.log(f"{ack}, {files[0]}: equal")


def client(t, pair, seed):
    rng = random.Random(seed)
    commands = []
    for n in range(150):
        at = rng.randrange(0, 512) * 512
        length = rng.choice([512, 4096, 8192, 65536])
        kind = rng.random()
        if kind < 0.7:
            commands += ["-c", f"aio_write -P {n % 255 + 1} {at} {length}"]
        elif kind < 0.85:
            commands += ["-c", f"aio_write -z {'-u ' if n % 2 else ''}{at} {length}"]
        else:
            commands += ["-c", f"discard {at} {length}"]
    return subprocess.Popen([t.which("qemu-io"), "-f", "raw", *commands, "-c", "aio_flush", "-c",
                             "flush", pair.guest()], stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, text=True)


brep_iotest.main(run)
