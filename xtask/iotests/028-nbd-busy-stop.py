"""SIGTERM under load: what was acknowledged is in the file, the image is clean, the exit code 0.

Seen to fail with: the mapping of new clusters kept in memory; the socket left behind.
"""

import re
import signal
import subprocess

import brep_iotest


def run(t):
    for image in ("a.raw", "a.qcow2"):
        t.brep("image", "create", image, "64M")
        for signal_ in (signal.SIGTERM, signal.SIGINT):
            server = t.serve("serve", image, "s.sock")
            acknowledged = write_and_stop(t, server, signal_)
            t.equal(server.wait(), 0, f"exit code after {signal_.name}")
            t.expect(not (t.dir / "s.sock").exists(), "the socket is gone")
            t.expect(len(acknowledged) >= 50, f"a load before the stop: {len(acknowledged)}")
            t.qemu_io(image, *[f"read -P {value} {at}k 100k" for at, value in acknowledged])
            if image.endswith("qcow2"):
                t.qemu_img("check", image)
            t.log(f"{image}: {signal_.name}: everything acknowledged is there")


def write_and_stop(t, server, signal_):
    writer = subprocess.Popen([t.which("qemu-io"), "-f", "raw", t.uri("s.sock")],
                              stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    plan = [(n * 100, n % 255 + 1) for n in range(600)]
    acknowledged = []
    for n, (at, value) in enumerate(plan):
        if n == 60:
            server.process.send_signal(signal_)
        try:
            writer.stdin.write(f"write -P {value} {at}k 100k\n")
            writer.stdin.flush()
        except BrokenPipeError:
            break
        if not was_written(writer):
            break
        acknowledged.append((at, value))
    writer.kill()
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    return acknowledged


def was_written(writer):
    for line in writer.stdout:
        if re.search(r"wrote \d+/\d+ bytes", line):
            return True
        if "failed" in line or "rror" in line:
            return False
    return False


brep_iotest.main(run)
