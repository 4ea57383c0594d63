"""Images that `brep image create` makes are what qemu-img would make.

Seen to fail with: an existing file overwritten.
"""

import json

import brep_iotest

SHAPES = [
    # name, size, options, expected virtual size, cluster size, extended L2
    ("plain.qcow2", "64M", [], 64 << 20, 65536, False),
    ("small-clusters.qcow2", "64M", ["--cluster-size", "4K"], 64 << 20, 4096, False),
    ("big-clusters.qcow2", "64M", ["--cluster-size", "2M"], 64 << 20, 2 << 20, False),
    ("sub-clusters.qcow2", "64M", ["--extended-l2"], 64 << 20, 65536, True),
    ("one-sector.qcow2", "512", [], 512, 65536, False),
    ("large.qcow2", "16T", [], 16 << 40, 65536, False),
]


def run(t):
    for name, size, options, bytes_, cluster, extended in SHAPES:
        t.brep("image", "create", name, size, *options)
        t.qemu_img("check", name)
        info = json.loads(t.qemu_img("info", "--output=json", name).stdout)
        data = info["format-specific"]["data"]
        t.equal(info["virtual-size"], bytes_, f"size of {name}")
        t.equal(info["cluster-size"], cluster, f"cluster size of {name}")
        t.equal(data["extended-l2"], extended, f"extended L2 of {name}")
        t.equal(data["compat"], "1.1", f"version of {name}")
        t.equal(data["lazy-refcounts"], False, f"lazy refcounts of {name}")
        t.expect("backing-filename" not in info, f"{name} has no backing file")
        t.log(f"{name}: good")

    t.brep("image", "create", "disk.raw", "3M")
    t.equal((t.dir / "disk.raw").stat().st_size, 3 << 20, "size of disk.raw")
    t.qemu_img("compare", "-f", "raw", "-F", "qcow2", "disk.raw", "plain.qcow2")
    t.qemu_io("plain.qcow2", "write -P 9 1M 64k", "read -P 9 1M 64k", "read -P 0 0 1M")
    t.qemu_img("check", "plain.qcow2")

    before = t.sha256("plain.qcow2")
    t.brep("image", "create", "plain.qcow2", "1M", code=1)
    t.equal(t.sha256("plain.qcow2"), before, "an image that was there already")
    for words in (["disk", "1M"], ["disk.vmdk", "1M"], ["a.qcow2", "1X"], ["a.qcow2"],
                  ["a.qcow2", "1M", "--cluster-size", "3K"], ["b.raw", "1M", "--nonsense"]):
        result = t.brep("image", "create", *words, code=2)
        t.expect(result.stderr.strip(), "a usage error says what is wrong")
        t.expect(not (t.dir / words[0]).exists(), f"no file after a usage error: {words}")
    t.brep("image", "create", "no-such-folder/a.raw", "1M", code=1)
    t.log("bad input: good")


brep_iotest.main(run)
