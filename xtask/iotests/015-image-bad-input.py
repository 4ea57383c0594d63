"""Missing, foreign, truncated and hostile images: a clear error, never a panic, nothing changed.

Seen to fail with: unknown incompatible features ignored; the name of a backing file ignored.
"""

import shutil
import struct

import brep_iotest

# Header field: offset, format, value.
HOSTILE = {
    "magic": (0, ">I", 0x4b444d56),
    "version": (4, ">I", 4),
    "cluster-bits-small": (20, ">I", 3),
    "cluster-bits-large": (20, ">I", 63),
    "size": (24, ">Q", (1 << 64) - 1),
    "encrypted": (32, ">I", 1),
    "l1-size": (36, ">I", 0xffffffff),
    "l1-too-small": (36, ">I", 0),
    "l1-offset-unaligned": (40, ">Q", 12345),
    "l1-offset-huge": (40, ">Q", 1 << 63),
    "refcount-table-huge": (56, ">I", 0xffffffff),
    "refcount-table-offset": (48, ">Q", (1 << 62) + 7),
    "snapshots": (60, ">I", 0xffffffff),
    "unknown-feature": (72, ">Q", 1 << 50),
    "data-file": (72, ">Q", 1 << 2),
    "refcount-order": (96, ">I", 7),
    "header-length": (100, ">I", 0xfffffff8),
    "backing-name-long": (16, ">I", 0xffffffff),
}


def run(t):
    t.qemu_img("create", "-f", "qcow2", "good.qcow2", "16M")
    t.qemu_io("good.qcow2", "write -P 1 0 1M")
    for name, (at, format, value) in HOSTILE.items():
        image = f"{name}.qcow2"
        shutil.copy("good.qcow2", image)
        with open(image, "r+b") as file:
            if name == "backing-name-long":
                file.seek(8)
                file.write(struct.pack(">Q", 0x200))
            file.seek(at)
            file.write(struct.pack(format, value))
        refused(t, name, image)

    with open("truncated.qcow2", "wb") as file:
        file.write((t.dir / "good.qcow2").read_bytes()[:70])
    refused(t, "truncated", "truncated.qcow2")
    (t.dir / "empty.qcow2").touch()
    refused(t, "empty", "empty.qcow2")
    t.pattern_file("noise.qcow2", 1 << 20)
    refused(t, "noise", "noise.qcow2")
    (t.dir / "folder.qcow2").mkdir()
    refused(t, "folder", "folder.qcow2")
    refused(t, "missing", "missing.qcow2")

    # Tables that point to the wrong places open well: reads fail or are zero, and never harm.
    shutil.copy("good.qcow2", "l2-beyond.qcow2")
    with open("l2-beyond.qcow2", "r+b") as file:
        file.seek(40)
        l1 = struct.unpack(">Q", file.read(8))[0]
        file.seek(l1)
        file.write(struct.pack(">Q", (1 << 63) | (1 << 55)))
    server = t.serve("serve", "l2-beyond.qcow2", "s.sock", "--read-only")
    t.qemu_io(t.uri("s.sock"), "read 0 64k", code=1, readonly=True)
    t.qemu_io(t.uri("s.sock"), "read -P 0 1G 0", code=None, readonly=True)
    t.expect(server.alive(), "the server outlives a corrupt table")
    server.stop()
    t.log("l2-beyond: the read fails, the server lives")

    # The guest chose this name; nobody on the host named it.
    t.pattern_file("secret.raw", 16 << 20, seed=9)
    t.qemu_img("create", "-f", "qcow2", "-b", t.dir / "secret.raw", "-F", "raw", "overlay.qcow2")
    result = t.brep("nbd", "serve", "overlay.qcow2", "--listen", t.uri("s.sock"), code=None,
                    timeout_s=10)
    t.expect(result.code in (1, 3), "an image with a backing file is not served without it")
    t.expect("secret.raw" in result.stderr, "the error names the backing file")
    t.log("backing file: not followed")

    # A raw disk whose guest has written itself a header stays raw.
    shutil.copy("good.qcow2", "disk.raw")
    server = t.serve("serve", "disk.raw", "s.sock", "--read-only")
    t.qemu_img("convert", "-f", "raw", "-O", "raw", t.uri("s.sock"), "copy.img")
    server.stop()
    t.equal(t.sha256("copy.img"), t.sha256("disk.raw"), "a raw disk that looks like qcow2")
    shutil.copy("good.qcow2", "disk")
    t.brep("image", "info", "disk", code=2)
    t.log("formats: never guessed")


def refused(t, name, image):
    before = t.sha256(image) if (t.dir / image).is_file() else None
    for words in (["image", "info", image], ["image", "check", image],
                  ["nbd", "serve", image, "--listen", t.uri("s.sock")]):
        result = t.brep(*words, code=None, timeout_s=10)
        what = f"{name}: {result.describe()}"
        t.expect(result.code not in (0, None), f"refused: {what}")
        t.expect(0 < result.code < 64, f"an exit code, not a panic or a signal: {what}")
        t.expect("panicked" not in result.stderr, what)
        found_by_check = words[1] == "check" and result.code == 2
        t.expect(found_by_check or image in result.stderr, f"the message names the file: {what}")
    if before:
        t.equal(t.sha256(image), before, f"{name}: an image that was refused")
    t.log(f"{name}: refused")


brep_iotest.main(run)
