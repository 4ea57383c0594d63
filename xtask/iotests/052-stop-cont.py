"""stop and cont: the guest's requests wait and go on, and what was stopped is equal on both sides.

Seen to fail with: reads that pass the door.
"""

import subprocess
import threading
import time

import brep_iotest
from brep_control import Control
from brep_pair import Pair

# deadline_s: 90


def run(t):
    pair = Pair(t, primary=["--ack", "async", "--peer-timeout", "3s"]).start()
    control = Control(t, "alpha/control.sock")
    writer = busy(t, pair)
    t.equal(control.ask("stop"), {}, "stop")
    control.event("STOP")
    t.equal(control.ask("stop"), {}, "stop again")
    t.equal(pair.status("alpha")["guest-stopped"], True, "shown as stopped")
    files = [t.sha256(file) for file in pair.disks["vda"]]
    t.equal(files[0], files[1], "both sides are equal without a flush or a checkpoint")
    t.log("stopped under load: both sides are equal")

    hung = [background(t, pair, command) for command in ("read 0 4k", "write -P 9 1M 4k", "flush")]
    # Longer than the peer timeout: a guest that is stopped does not wait for the peer.
    time.sleep(4)
    t.equal([p.poll() for p in hung], [None] * 3, "requests wait while stopped")
    t.equal([t.sha256(file) for file in pair.disks["vda"]], files, "nothing is written")
    t.equal(pair.status("alpha")["link"], "connected", "the peer is still there")
    pair.checkpoint()
    t.equal(control.ask("cont"), {}, "cont")
    control.event("RESUME")
    t.equal(control.ask("cont"), {}, "cont again")
    for process in hung:
        t.equal(process.wait(timeout=10), 0, "requests go on")
    t.equal([e["event"] for e in control.events if e["event"] in ("STOP", "RESUME")], [],
            "repetitions say nothing")
    writer.kill()
    writer.wait()
    pair.write("read -P 9 1M 4k")
    t.log("continued: what waited has ended")

    # A stopped guest does not keep the process from ending.
    control.ask("stop")
    hung = background(t, pair, "read 0 4k")
    time.sleep(0.3)
    control.ask("quit")
    control.event("SHUTDOWN")
    started = time.monotonic()
    pair.primary.process.wait(timeout=20)
    t.expect(time.monotonic() - started < 8, "it ends at once")
    hung.wait(timeout=10)
    pair.secondary.stop()
    pair.equal_files()
    t.log("quit while stopped: ended, and both sides are equal")


def busy(t, pair):
    """A guest that never stops writing."""
    loop = "\n".join(f"aio_write -P {n % 255 + 1} {(8 << 20) + n * 8192 % (7 << 20)} 8192" for n in range(4000))
    process = subprocess.Popen([t.which("qemu-io"), "-f", "raw", pair.guest()],
                               stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, text=True)
    def feed():
        try:
            process.stdin.write(loop + "\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            pass

    threading.Thread(target=feed, daemon=True).start()
    t.wait_until(lambda: pair.status("alpha")["counters"]["guest-writes"] > 50, "writes")
    return process


def background(t, pair, command):
    return subprocess.Popen([t.which("qemu-io"), "-f", "raw", "-c", command, pair.guest()],
                            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                            stderr=subprocess.DEVNULL)


brep_iotest.main(run)
