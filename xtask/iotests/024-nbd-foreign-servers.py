"""brep's client reads what foreign servers export: qemu-nbd, and nbdkit in its odder moods.

Seen to fail with: simple replies refused.
"""

import brep_iotest

# Arguments of nbdkit, and whether brep has to get on with it.
MOODS = {
    "plain": [],
    "no structured replies": ["--no-sr"],
    "old style": ["--oldstyle"],
    "no zero padding": ["--mask-handshake=3"],
    "fixed newstyle only": ["--mask-handshake=1"],
    "blocks of 4 KiB": ["--filter=blocksize-policy", "blocksize-minimum=4096",
                        "blocksize-maximum=65536", "blocksize-error-policy=error"],
    "slow": ["--filter=delay", "rdelay=20ms"],
    "one request at a time": ["--filter=noparallel"],
}


def run(t):
    t.pattern_file("a.raw", 8 << 20, seed=1)
    t.pattern_file("b.raw", 8 << 20, seed=1)
    with open("b.raw", "r+b") as file:
        file.seek((8 << 20) - 1)
        file.write(b"x")
    t.qemu_img("convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2")

    server = t.qemu_nbd("qemu-nbd", "a.qcow2", "q.sock", "-r", "-x", "vda")
    check(t, "qemu-nbd", t.uri("q.sock", "vda"))
    t.brep("nbd", "info", t.uri("q.sock", "vdb"), code=1)
    server.stop()

    t.require("nbdkit")
    for mood, options in MOODS.items():
        filters = [o for o in options if o.startswith("-")]
        parameters = [o for o in options if not o.startswith("-")]
        server = t.daemon("nbdkit", "nbdkit", "-f", "-r", "-U", t.dir / "k.sock", *filters, "file",
                          t.dir / "a.raw", *parameters, ready=lambda: t.listens("k.sock"))
        if mood == "old style":
            refused = t.brep("nbd", "info", t.uri("k.sock"), code=1)
            t.expect("old" in refused.stderr.lower(), f"says why: {refused.stderr}")
            t.log(f"nbdkit, {mood}: refused")
        else:
            check(t, f"nbdkit, {mood}", t.uri("k.sock"))
        server.stop(code=None)
        (t.dir / "k.sock").unlink(missing_ok=True)


def check(t, name, uri):
    info = t.brep("nbd", "info", uri).stdout
    t.expect("8 MiB" in info or "8388608" in info, f"the size in: {info}")
    t.brep("image", "compare", "a.raw", uri)
    t.brep("image", "compare", "b.raw", uri, code=1)
    t.log(f"{name}: good")


brep_iotest.main(run)
