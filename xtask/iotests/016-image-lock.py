"""Two processes never open one disk for writing, and the error names the file.

Seen to fail with: a writer taking the lock that readers share.
"""

import brep_iotest


def run(t):
    for image in ("a.raw", "a.qcow2"):
        t.brep("image", "create", image, "16M")
        server = t.serve("serve", image, "s.sock")
        refused(t, "nbd", "serve", image, "--listen", t.uri("other.sock"))
        if image.endswith("qcow2"):
            refused(t, "image", "check", "--repair", "all", image)
        t.qemu_io(image, "write -P 8 0 64k", code=1)
        t.qemu_io(t.uri("s.sock"), "write -P 7 0 64k", "read -P 7 0 64k")
        # The lock goes with its process, however that ends.
        server.kill9()
        (t.dir / "s.sock").unlink()
        server = t.serve("serve", image, "s.sock")
        t.qemu_io(t.uri("s.sock"), "read -P 7 0 64k")
        server.stop()
        first = t.serve("first", image, "1.sock", "--read-only")
        second = t.serve("second", image, "2.sock", "--read-only")
        refused(t, "nbd", "serve", image, "--listen", t.uri("other.sock"))
        first.stop()
        second.stop()
        t.log(f"{image}: one writer, or many readers")


def refused(t, *words):
    result = t.brep(*words, code=None)
    t.expect(result.code in (1, 3), f"refused: {result.describe()}")
    image = next(word for word in words if word.startswith("a."))
    t.expect(image in result.stderr, f"the message names the file: {result.describe()}")


brep_iotest.main(run)
