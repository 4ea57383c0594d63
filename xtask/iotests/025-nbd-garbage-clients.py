"""Clients that send garbage, break off, or lie about lengths harm nobody else.

A good client's connection stays open all the time and its data are right at the end; the server
neither dies nor grows.

Seen to fail with: memory taken for an option before its length is checked.
"""

import random
import socket
import struct
import subprocess

import brep_iotest

OPTION_MAGIC = 0x49484156454F5054
REQUEST_MAGIC = 0x25609513
GO, READ, WRITE, TRIM, STATUS = 7, 0, 1, 4, 7
SIZE = 4 << 20


def run(t):
    t.brep("image", "create", "a.raw", str(SIZE))
    server = t.serve("serve", "a.raw", "s.sock")
    good = subprocess.Popen([t.which("qemu-io"), "-f", "raw", t.uri("s.sock")],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    good.stdin.write("write -P 1 0 1M\n")
    good.stdin.flush()
    t.wait_until(lambda: "wrote 1048576" in good.stdout.readline(), "the good client writes")
    before_kib = resident_kib(server)

    rng = random.Random(1)
    for _ in range(50):
        send(t, rng.randbytes(rng.randrange(1, 5000)))
    t.log("noise instead of a handshake: survived")
    for cut in range(0, 60, 3):
        send(t, handshake_bytes()[:cut])
    t.log("broken off in the handshake: survived")
    for option, length, data in [(GO, 0xffffffff, b""), (GO, 32 << 20, b"x" * 1000),
                                 (GO, 4, b"\xff\xff\xff\xff"), (3, 4, b"data"), (99, 10, b"0123456789"),
                                 (10, 8, b"\x00\x00\x00\x00\xff\xff\xff\xff"), (1, 5000, b"n" * 5000)]:
        send(t, struct.pack(">IQII", 3, OPTION_MAGIC, option, length) + data)
    t.log("options that lie: survived")
    huge = [(READ, 0, 0xffffffff, b""), (WRITE, 0, 0xffffffff, b"y" * 4096),
            (WRITE, SIZE - 512, 4096, b"y" * 4096), (READ, (1 << 64) - 512, 1024, b""),
            (TRIM, (1 << 64) - 1, 0xffffffff, b""), (STATUS, 0, 0, b""), (77, 0, 512, b"")]
    for command, offset, length, data in huge:
        send(t, handshake_bytes() + request(command, offset, length) + data)
    send(t, handshake_bytes() + struct.pack(">IHHQQI", 0x12345678, 0, READ, 1, 0, 512))
    send(t, handshake_bytes() + b"".join(request(READ, 0, 1 << 20) for _ in range(500)))
    send(t, handshake_bytes() + request(WRITE, 2 << 20, 1 << 20) + b"z" * 1000)
    t.log("requests that lie: survived")

    t.wait_until(lambda: sockets_of(server) <= 6, "the bad clients' connections are closed")
    grown_kib = resident_kib(server) - before_kib
    t.expect(grown_kib < 160 << 10, f"memory grew by {grown_kib} KiB")
    out, _ = good.communicate("read -P 1 0 1M\nread -P 0 1M 3M\nquit\n", timeout=30)
    t.equal(good.returncode, 0, f"the good client: {out}")
    t.expect("failed" not in out, out)
    server.stop()
    t.expect("panicked" not in server.log(), server.log())
    t.qemu_io("a.raw", "read -P 1 0 1M", "read -P 0 1M 3M")
    t.log("the good client was not harmed")


def handshake_bytes():
    """Client flags, and GO for the default export."""
    go = struct.pack(">IH", 0, 0)
    return struct.pack(">I", 3) + struct.pack(">QII", OPTION_MAGIC, GO, len(go)) + go


def request(command, offset, length):
    return struct.pack(">IHHQQI", REQUEST_MAGIC, 0, command, 1, offset, length)


def send(t, data):
    """Sends, takes what comes for a moment, and breaks off."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0.05)
        client.connect("s.sock")
        try:
            client.sendall(data)
            while client.recv(1 << 16):
                pass
        except OSError:
            # Closed by the server, or it waits for more: both are its good right.
            return


def resident_kib(daemon):
    for line in open(f"/proc/{daemon.pid}/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise brep_iotest.Failed("the server is gone")


def sockets_of(daemon):
    return len(daemon.sockets())


brep_iotest.main(run)
