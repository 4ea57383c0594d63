"""QEMU's clients use a brep export: unix socket and TCP, sizes, names, flags, read-only.

Seen to fail with: the export's size rounded down to 4 KiB; the socket left behind at the end.
"""

import json

import brep_iotest


def run(t):
    t.pattern_file("a.raw", 4 << 20, seed=1)
    t.pattern_file("same.raw", 4 << 20, seed=1)
    server = t.serve("serve", "a.raw", "s.sock")
    t.qemu_img("compare", "-f", "raw", "-F", "raw", t.uri("s.sock"), "same.raw")
    t.qemu_io(t.uri("s.sock"),
              "write -P 1 0 64k", "write -f -P 2 64k 64k", "write -z 128k 64k",
              "write -z -u 192k 64k", "aio_write -P 3 256k 64k", "aio_write -P 4 320k 64k",
              "aio_flush", "flush", "discard 3M 64k",
              "read -P 1 0 64k", "read -P 2 64k 64k", "read -P 0 128k 128k",
              "read -P 3 256k 64k", "read -P 4 320k 64k", "write -P 5 4095k 1k")
    t.qemu_io(t.uri("s.sock"), "read 4M 512", code=1)
    t.qemu_io(t.uri("s.sock"), "write 4095k 2k", code=1)
    t.qemu_img("info", "-f", "raw", t.uri("s.sock", "no-such-export"), code=1)
    t.log("unix socket: good")
    server.stop()
    t.expect(not (t.dir / "s.sock").exists(), "the socket is gone after a clean stop")
    t.qemu_io("a.raw", "read -P 1 0 64k", "read -P 2 64k 64k", "read -P 0 128k 128k",
              "read -P 3 256k 64k", "read -P 4 320k 64k", "read -P 5 4095k 1k")

    port = t.free_port()
    tcp = f"nbd://127.0.0.1:{port}"
    server = t.brep_daemon("tcp", "nbd", "serve", "a.raw", "--listen", tcp, "--export", "vda",
                           ready=lambda: t.listens_tcp(port))
    for export in ("", "/", "/vda"):
        t.qemu_io(tcp + export, "read -P 1 0 64k")
    t.qemu_img("info", "-f", "raw", tcp + "/vdb", code=1)
    server.stop()
    t.log("TCP: good")

    before = t.sha256("a.raw")
    server = t.serve("serve", "a.raw", "s.sock", "--read-only")
    t.qemu_io(t.uri("s.sock"), "read -P 1 0 64k", readonly=True)
    t.qemu_io(t.uri("s.sock"), "write 0 64k", code=1)
    server.stop()
    t.equal(t.sha256("a.raw"), before, "a disk that was served read-only")
    t.log("read-only: good")

    for size in (512, 1536, (1 << 20) + 512, 1 << 40):
        with open("size.raw", "wb") as file:
            file.truncate(size)
        server = t.serve("serve", "size.raw", "s.sock")
        info = t.qemu_img("info", "-f", "raw", "--output=json", t.uri("s.sock")).stdout
        t.equal(json.loads(info)["virtual-size"], size, "the export's size")
        t.qemu_io(t.uri("s.sock"), f"write -P 7 {size - 512} 512", f"read -P 7 {size - 512} 512")
        server.stop()
        t.equal((t.dir / "size.raw").stat().st_size, size, "the file's size afterwards")
    t.log("sizes: good")


brep_iotest.main(run)
