"""kill -9 of a writer loses no acknowledged write, in raw and in qcow2.

A writer sends one write at a time through NBD and notes each that was acknowledged; the server
is killed in the middle. What was acknowledged is read back by qemu-io from the file itself.

Seen to fail with: the mapping of new clusters kept in memory.
"""

import re
import subprocess

import brep_iotest

# deadline_s: 120

SIZE = 64 << 20
BLOCK = 24 << 10


def run(t):
    for image in ("a.raw", "a.qcow2", "sub.qcow2"):
        options = ["--extended-l2"] if image == "sub.qcow2" else []
        t.brep("image", "create", image, str(SIZE), *options)
        for round_ in range(3):
            server = t.serve("serve", image, "s.sock")
            acknowledged = write_until_killed(t, server, round_)
            (t.dir / "s.sock").unlink()
            t.expect(len(acknowledged) > 20, f"a load before the kill: {len(acknowledged)}")
            if image != "a.raw":
                code = t.qemu_img("check", image, code=None).code
                t.expect(code in (0, 3), f"no corruption after the kill: {code}")
            t.qemu_io(image, *[f"read -P {value} {at} {BLOCK}" for at, value in acknowledged])
        t.log(f"{image}: every acknowledged write is there")


def write_until_killed(t, server, round_):
    """Places that are not written twice, so that every acknowledged one can be told."""
    count = SIZE // BLOCK
    places = [(n * 37 + round_) % count * BLOCK for n in range(count)]
    plan = [(at, 1 + (round_ * 71 + n) % 250) for n, at in enumerate(places)]
    command = [t.which("qemu-io"), "-f", "raw", t.uri("s.sock")]
    writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.DEVNULL, text=True)
    acknowledged = []
    for n, (at, value) in enumerate(plan):
        if n == 60 + 40 * round_:
            server.kill9()
        try:
            writer.stdin.write(f"write -P {value} {at} {BLOCK}\n")
            writer.stdin.flush()
        except BrokenPipeError:
            break
        said = answer(writer)
        if said is None:
            break
        acknowledged.append((at, value))
    writer.kill()
    writer.wait()
    writer.stdin.close()
    writer.stdout.close()
    return acknowledged


def answer(writer):
    """The line that says a write was done, or None if it was not."""
    for line in writer.stdout:
        if re.search(r"wrote \d+/\d+ bytes", line):
            return line
        if "failed" in line or "rror" in line:
            return None
    return None


brep_iotest.main(run)
