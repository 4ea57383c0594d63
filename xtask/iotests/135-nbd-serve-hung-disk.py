"""A stop has an end although the disk hangs: clients hear ESHUTDOWN, and the process is gone.

Seen to fail with: the end left out that a stop has in any case.
"""

import os
import signal
import socket
import struct

import brep_iotest

GO, ACK = 7, 1
FLUSH, ESHUTDOWN = 3, 108


def run(t):
    t.require("strace")
    t.pattern_file("a.raw", 1 << 20)
    # A disk that takes its time for a flush.
    server = t.daemon(
        "server", "strace", "-f", "-qq", "-o", "trace", "-e", "trace=fdatasync,fsync",
        "-e", "inject=fdatasync,fsync:delay_enter=300s", str(t.brep_path), "nbd", "serve", "a.raw",
        "--listen", t.uri("s.sock"), "--stop-timeout", "1s", "--pid-file", "pid",
        ready=lambda: os.path.exists("pid"))
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect("s.sock")
        client.recv(18)
        client.sendall(struct.pack(">I8sIIIH", 3, b"IHAVEOPT", GO, 6, 0, 0))
        received = b""
        while not received.endswith(struct.pack(">III", GO, ACK, 0)):
            received += client.recv(4096)
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, FLUSH, 5, 0, 0))
        pid = int(open("pid").read())
        os.kill(pid, signal.SIGTERM)
        t.equal(struct.unpack(">IIQ", client.recv(16)), (0x67446698, ESHUTDOWN, 5), "the reply")
        t.equal(client.recv(1), b"", "and the end")
    t.wait_until(lambda: "not everything is closed" in server.log(), "its last word")
    # strace would keep the rest of the process until the flush is over.
    server.kill9()
    t.wait_until(lambda: not os.path.exists(f"/proc/{pid}"), "it is gone")
    t.expect(not os.path.exists("pid") and not os.path.exists("s.sock"), "nothing is left")
    t.log("a stop has an end")


brep_iotest.main(run)
