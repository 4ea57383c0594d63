"""Block status of an export: qemu-img map sees the holes and the data that the file has.

Seen to fail with: holes reported as data.
"""

import json

import brep_iotest

EDGES = [(1 << 20, 64 << 10), (4 << 20, 192 << 10), (10 << 20, 1 << 20), ((16 << 20) - 65536, 65536)]


def run(t):
    for image in ("a.raw", "a.qcow2"):
        t.brep("image", "create", image, "16M")
        t.qemu_io(image, *[f"write -P 1 {at} {length}" for at, length in EDGES])
        server = t.serve("serve", image, "s.sock", "--read-only")
        found = data_ranges(t, t.uri("s.sock"))
        t.equal(found, EDGES, f"data of {image}")
        server.stop()
        t.log(f"{image}: data where data are")

    server = t.serve("serve", "a.qcow2", "s.sock")
    t.qemu_io(t.uri("s.sock"), "write -z -u 10M 512k", "write -P 2 1088k 64k")
    t.equal(data_ranges(t, t.uri("s.sock")),
            [(1 << 20, 128 << 10), EDGES[1], ((10 << 20) + (512 << 10), 512 << 10), EDGES[3]], "after zeroes and a write")
    server.stop()
    t.log("status follows writes")


def data_ranges(t, uri):
    """Ranges that do not read as zero for sure, joined."""
    joined = []
    for part in json.loads(t.qemu_img("map", "-f", "raw", "--output=json", uri).stdout):
        if part["zero"] or not part["data"]:
            continue
        if joined and sum(joined[-1]) == part["start"]:
            joined[-1] = (joined[-1][0], joined[-1][1] + part["length"])
        else:
            joined.append((part["start"], part["length"]))
    return joined


brep_iotest.main(run)
