"""A secondary that is stopped, killed, cut off, or deaf in one direction: no read of the guest waits for
it, and no write longer than the peer timeout. The longest write of each goes to figures.txt.

Seen to fail with: a peer timeout ten times as long.
"""

import os
import subprocess
import threading
import time

import brep_iotest
from brep_link import Relay
from brep_pair import Pair

# deadline_s: 120

TIMEOUT_S = 2.0
# What a busy machine may add.
GRACE_S = 1.5


def run(t):
    pair = Pair(t, primary=["--peer-timeout", f"{TIMEOUT_S}s"],
                secondary=["--peer-timeout", f"{TIMEOUT_S}s"], interval="200ms")
    relay = Relay(t.dir / "r.sock", t.dir / "s.sock")
    pair.start_secondary()
    pair.start_primary("--peer", t.uri("r.sock"), peer=False)
    pair.wait_promotable()
    cases = [
        ("stopped", lambda: pair.secondary.pause(), lambda: pair.secondary.resume()),
        ("killed", lambda: pair.secondary.kill9(), lambda: pair.start_secondary()),
        ("cut off", lambda: relay.freeze("there", "back"), lambda: thaw(relay)),
        ("deaf", lambda: relay.freeze("there"), lambda: thaw(relay)),
        ("dumb", lambda: relay.freeze("back"), lambda: thaw(relay)),
    ]
    with open("figures.txt", "w") as figures:
        for name, fail, heal in cases:
            pair.wait_state("alpha", "in-sync", deadline_s=30)
            reader, writer = Timed(t, pair.guest(), "read 0 4k"), Timed(t, pair.guest(), "write 0 4k")
            time.sleep(0.3)
            fail()
            pair.wait_state("alpha", "disconnected", deadline_s=20)
            time.sleep(0.3)
            longest_read_s, longest_write_s = reader.end(), writer.end()
            figures.write(f"{name}: longest read {longest_read_s * 1000:.0f} ms, "
                          f"longest write {longest_write_s * 1000:.0f} ms\n")
            t.expect(longest_read_s < 1.0, f"{name}: a read took {longest_read_s:.2f} s")
            t.expect(longest_write_s < TIMEOUT_S + GRACE_S,
                     f"{name}: a write took {longest_write_s:.2f} s")
            heal()
            t.log(f"{name}: no read waits, no write longer than the peer timeout")
    if "BREP_FIGURES" in os.environ:
        with open("figures.txt") as figures, open(os.environ["BREP_FIGURES"], "a") as file:
            file.write(figures.read())
    pair.wait_state("alpha", "in-sync", deadline_s=30)
    pair.checkpoint()
    pair.stop()
    relay.close()
    pair.equal_files()
    t.log("equal")


def thaw(relay):
    """What was dropped is not made up for: those connections are of no use any more."""
    relay.cut()
    relay.freeze()


class Timed:
    """A guest that says the same command again and again, and knows the longest time it took."""

    def __init__(self, t, uri, command):
        self.longest_s, self.ending, self.command = 0.0, False, command
        self.process = subprocess.Popen(
            [t.which("qemu-io"), "-f", "raw", uri], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self):
        while not self.ending:
            begun = time.monotonic()
            self.process.stdin.write(self.command + "\n")
            self.process.stdin.flush()
            while "ops" not in self.process.stdout.readline():
                if self.process.poll() is not None:
                    return
            self.longest_s = max(self.longest_s, time.monotonic() - begun)
            time.sleep(0.002)

    def end(self):
        self.ending = True
        self.thread.join(20)
        self.process.kill()
        self.process.wait()
        return float("inf") if self.thread.is_alive() else self.longest_s


brep_iotest.main(run)
