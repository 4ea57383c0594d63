"""Foreign clients on the secondary's port: nobody writes the replica, garbage harms no session.

Seen to fail with: the token of a data connection not looked at.
"""

import socket

import brep_iotest
from brep_pair import Pair


def run(t):
    pair = Pair(t).start()
    pair.write("write -P 1 0 1M")
    t.qemu_io(t.uri("s.sock", "vda"), "write -P 66 0 64k", code=1)
    t.qemu_io(t.uri("s.sock"), "write -P 66 0 64k", code=1)
    t.log("a stranger's write: refused")
    for n in range(30):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(0.05)
            client.connect("s.sock")
            try:
                client.sendall(brep_iotest.pattern(100 * n + 1, n))
                client.recv(4096)
            except OSError:
                continue
    t.log("garbage: survived")
    pair.write("write -P 2 512k 64k")
    pair.checkpoint()
    t.equal(pair.status("alpha")["link"], "connected", "the session")
    pair.stop()
    pair.equal_files()
    t.qemu_io("s.raw", "read -P 1 0 512k", "read -P 2 512k 64k")
    t.log("the pair: unharmed and equal")


brep_iotest.main(run)
