"""Images that other programs made read through brep as they do through qemu-img.

Seen to fail with: the length of a compressed cluster taken without its last sector; clusters that
a snapshot shares written in place.
"""

import brep_iotest

SIZE = 8 << 20


def run(t):
    t.pattern_file("random.raw", SIZE, seed=3)
    with open("half.raw", "wb") as file:
        # Compressible text, holes and noise, so that clusters of every kind come to be.
        file.truncate(SIZE)
        for at in range(0, SIZE, 256 << 10):
            file.seek(at)
            file.write(b"abcdefgh" * (8 << 10))
            file.seek(at + (128 << 10))
            file.write(brep_iotest.pattern(5000, at))
    for shape, options in {
        "v2": ["-o", "compat=0.10"],
        "compressed": ["-c"],
        "compressed-4k": ["-c", "-o", "cluster_size=4k"],
        "sub": ["-o", "extended_l2=on"],
        "prealloc": ["-o", "preallocation=full"],
        "refbits8": ["-o", "refcount_bits=8"],
    }.items():
        for source in ("random.raw", "half.raw"):
            t.qemu_img("convert", "-f", "raw", "-O", "qcow2", *options, source, "a.qcow2")
            same_through_brep(t, "a.qcow2", source)
        t.log(f"{shape}: good")

    # Internal snapshots share clusters, so writes have to copy.
    t.qemu_img("convert", "-f", "raw", "-O", "qcow2", "half.raw", "a.qcow2")
    t.qemu_img("snapshot", "-c", "one", "a.qcow2")
    server = t.serve("serve", "a.qcow2", "s.sock")
    t.qemu_io(t.uri("s.sock"), "write -P 5 1000k 300k", "write -P 6 0 512", "flush")
    server.stop()
    t.qemu_img("check", "a.qcow2")
    t.qemu_io("a.qcow2", "read -P 5 1000k 300k", "read -P 6 0 512")
    t.qemu_img("snapshot", "-a", "one", "a.qcow2")
    t.qemu_img("compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "half.raw")
    t.log("snapshot: unharmed by writes")

    # A write into a compressed cluster.
    t.qemu_img("convert", "-f", "raw", "-O", "qcow2", "-c", "half.raw", "a.qcow2")
    server = t.serve("serve", "a.qcow2", "s.sock")
    t.qemu_io(t.uri("s.sock"), "write -P 5 1000k 300k", "flush")
    server.stop()
    t.qemu_img("check", "a.qcow2")
    t.qemu_io("half.raw", "write -P 5 1000k 300k")
    t.qemu_img("compare", "-f", "qcow2", "-F", "raw", "a.qcow2", "half.raw")
    t.log("compressed: written")


def same_through_brep(t, image, source):
    server = t.serve("serve", image, "s.sock", "--read-only")
    t.qemu_img("convert", "-f", "raw", "-O", "raw", t.uri("s.sock"), "copy.raw")
    server.stop()
    t.equal(t.sha256("copy.raw"), t.sha256(source), f"{source} through {image}")
    before = t.sha256(image)
    t.equal(t.sha256(image), before, "an image that was only read")


brep_iotest.main(run)
