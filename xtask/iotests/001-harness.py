"""The library that the other tests stand on: what should fail fails.

Seen to fail with: `run` taking any exit code; `wait_until` without its deadline; `sha256` without
its offset; `kill9` not noting the sockets.
"""

import socket
import sys

import brep_iotest
from brep_iotest import Failed

LISTENER = """
import socket, sys, time
s = socket.socket(socket.AF_UNIX)
s.bind(sys.argv[1])
s.listen()
time.sleep(300)
"""


def fails(t, what, action):
    try:
        action()
    except Failed:
        t.log(f"fails: {what}")
    else:
        raise Failed(f"did not fail: {what}")


def run(t):
    t.qemu_img("create", "-f", "qcow2", "a.qcow2", "1M")
    t.qemu_io("a.qcow2", "write -P 5 0 64k", "read -P 5 0 64k")
    fails(t, "a pattern that is not there", lambda: t.qemu_io("a.qcow2", "read -P 6 0 64k"))
    fails(t, "a read beyond the end", lambda: t.qemu_io("a.qcow2", "read 2M 64k"))
    fails(t, "an exit code", lambda: t.run("false"))
    fails(t, "a program that hangs", lambda: t.run("sleep", "60", timeout_s=0.1))
    fails(t, "a wait", lambda: t.wait_until(lambda: False, "never", deadline_s=0.1))
    fails(t, "an early end", lambda: t.daemon("false", "false", ready=lambda: False))

    t.pattern_file("p", (1 << 20) + 5, seed=1)
    t.pattern_file("q", (1 << 20) + 5, seed=1)
    t.pattern_file("r", (1 << 20) + 5, seed=2)
    t.equal(t.sha256("p"), t.sha256("q"), "two files of one seed")
    t.expect(t.sha256("p") != t.sha256("r"), "seeds differ")
    t.expect(t.sha256("p", 0, 512) != t.sha256("p", 512, 512), "ranges differ")
    with open("q", "r+b") as file:
        file.write(b"x")
    t.equal(t.sha256("p", 1), t.sha256("q", 1), "everything but the first byte")
    t.expect(t.sha256("p") != t.sha256("q"), "the first byte")

    listener = t.daemon("listener", sys.executable, "-c", LISTENER, "l.sock",
                        ready=lambda: t.listens("l.sock"))
    listener.pause()
    listener.resume()
    listener.kill9()
    t.expect(not t.listens("l.sock"), "nobody listens after kill -9")
    # The runner would find the socket that it left: the library removes it at the end.
    t.expect((t.dir / "l.sock").is_socket(), "its socket is left")

    port = t.free_port()
    with socket.create_server(("127.0.0.1", port)):
        t.expect(t.listens_tcp(port), "somebody listens")
    t.log(f"{t.dir}/a at 127.0.0.1:{port}, process {listener.pid}, 2026-01-02T03:04:05.6Z")


brep_iotest.main(run)
