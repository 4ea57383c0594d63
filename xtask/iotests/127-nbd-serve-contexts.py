"""Bitmaps and layers of a served image are told as qemu-nbd tells them, to libnbd's and QEMU's clients.

Seen to fail with: bits of a bitmap counted from the most significant of a byte; a depth counted from 0;
no bound on the bitmaps that are served together; outdated ones left out without a word.
"""

import json
import struct

import brep_iotest

CONTEXTS = ["base:allocation", "qemu:allocation-depth", "qemu:dirty-bitmap:nightly"]


def run(t):
    t.require("nbdinfo")
    make_image(t)
    serve = ["--read-only", "--allocation-depth", "--backing", "middle.qcow2", "--backing", "base.raw"]
    # One after the other: each has the image's lock.
    theirs = t.qemu_nbd("theirs", "top.qcow2", "theirs.sock", "-r", "-A", "-B", "nightly")
    expected = maps(t, "theirs.sock")
    theirs.stop()
    ours = t.serve("ours", "top.qcow2", "ours.sock", *serve, "--all-bitmaps")
    for what, map in maps(t, "ours.sock").items():
        t.equal(map, expected[what], what)
    shown(t)
    t.log("contexts:", *t.brep("nbd", "info", t.uri("ours.sock"), "--json").json["exports"][0]["contexts"])
    weekly = nbdinfo(t, "ours.sock", "qemu:dirty-bitmap:weekly")
    t.equal(weekly, [(0, 64 << 20, 0)], "a bitmap without marks")
    ours.stop()
    one(t, serve)
    refusals(t, serve)
    outdated(t)
    many(t)


def make_image(t):
    t.pattern_file("base.raw", 40 << 20)
    t.qemu_img("create", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "middle.qcow2", "64M")
    t.qemu_io("middle.qcow2", "write -P 1 1M 1M", "write -z 3M 64k")
    t.qemu_img("create", "-f", "qcow2", "-b", "middle.qcow2", "-F", "qcow2", "top.qcow2", "64M")
    t.qemu_img("bitmap", "--add", "-g", "4k", "top.qcow2", "nightly")
    t.qemu_io("top.qcow2", "write -P 2 5M 512", "write -P 3 6M 2M", "write -P 4 64000k 1536k")
    t.qemu_img("bitmap", "--add", "top.qcow2", "weekly")
    # qemu-nbd serves a bitmap read-only only if it is disabled.
    t.qemu_img("bitmap", "--disable", "top.qcow2", "nightly")


def one(t, serve):
    ours = t.serve("one", "top.qcow2", "one.sock", *serve, "-B", "nightly")
    info = t.brep("nbd", "info", t.uri("one.sock"), "--json").json
    t.log("one:", *info["exports"][0]["contexts"])
    ours.stop()


def refusals(t, serve):
    listen = ["--listen", "nbd+unix:///?socket=no.sock"]
    for args in [["top.qcow2", *serve, "-B", "nightly", "-B", "monthly"],
                 ["base.raw", "--read-only", "--all-bitmaps"],
                 ["base.raw", "--backing", "middle.qcow2"],
                 ["top.qcow2", "-B", "nightly"],
                 ["top.qcow2", "--read-only"]]:
        t.log_brep("nbd", "serve", *args, *listen)


def outdated(t):
    """A writer that does not keep bitmaps says so, in the image."""
    layers = ["--backing", "middle.qcow2", "--backing", "base.raw"]
    writer = t.serve("writer", "top.qcow2", "writer.sock", *layers)
    t.qemu_io(t.uri("writer.sock"), "write -P 9 0 64k")
    writer.stop()
    t.expect("outdated" in writer.log(), f"a warning: {writer.log()}")
    t.log_brep("nbd", "serve", "top.qcow2", "--read-only", *layers, "-B", "nightly",
               "--listen", "nbd+unix:///?socket=no.sock")
    reader = t.serve("reader", "top.qcow2", "reader.sock", "--read-only", *layers, "--all-bitmaps")
    reader.stop()
    t.expect("its bitmaps are outdated" in reader.log(), f"all there are is none: {reader.log()}")
    info = json.loads(t.qemu_img("info", "--output=json", "top.qcow2").stdout)
    bitmaps = info["format-specific"]["data"].get("bitmaps", [])
    t.expect(all("in-use" in b["flags"] for b in bitmaps), f"QEMU takes none for good: {bitmaps}")


def many(t):
    """A directory that names one bitmap again and again."""
    t.qemu_img("create", "-f", "qcow2", "many.qcow2", "1M")
    t.qemu_img("bitmap", "--add", "many.qcow2", "00000000")
    image = bytearray((t.dir / "many.qcow2").read_bytes())
    extension = image.index(bytes.fromhex("23852875")) + 8
    count, _, size, offset = struct.unpack_from(">IIQQ", image, extension)
    t.equal((count, size), (1, 32), "one entry")
    entry = image[offset:offset + 24]
    image += bytes(-len(image) % (64 << 10))
    struct.pack_into(">IIQQ", image, extension, 257, 0, 257 * 32, len(image))
    for number in range(257):
        image += entry + b"%08d" % number
    (t.dir / "many.qcow2").write_bytes(image)
    t.log_brep("nbd", "serve", "many.qcow2", "--read-only", "--all-bitmaps",
               "--listen", "nbd+unix:///?socket=no.sock")
    t.serve("named", "many.qcow2", "named.sock", "--read-only", "-B", "00000256").stop()


def maps(t, socket):
    found = {context: nbdinfo(t, socket, context) for context in CONTEXTS}
    return {**found, "qemu-img map": qemu_map(t, socket, "nightly")}


def shown(t):
    """By our own client: each alone, and all in one go."""
    uri = t.uri("ours.sock")
    for context in CONTEXTS:
        t.log(context)
        for line in t.brep("nbd", "info", uri, f"--map={context}").stdout.splitlines():
            t.log(" ", *line.split())
    together = [f"--map={context}" for context in CONTEXTS]
    t.log("together")
    for line in t.brep("nbd", "info", uri, *together).stdout.splitlines():
        t.log(" ", *line.split())
    totals = t.brep("nbd", "info", uri, *together, "--totals", "--json").json
    t.log(*[e["length"] for e in totals], [e["states"]["qemu:allocation-depth"]["type"] for e in totals])


def nbdinfo(t, socket, context):
    extents = json.loads(t.run("nbdinfo", f"--map={context}", "--json", t.uri(socket)).stdout)
    return brep_iotest.joined(extents)


def qemu_map(t, socket, bitmap):
    options = (f"driver=nbd,server.type=unix,server.path={t.dir / socket},"
               f"x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}")
    extents = json.loads(t.qemu_img("map", "--output=json", "--image-opts", options).stdout)
    return [(e["start"], e["length"], e["data"]) for e in extents]


brep_iotest.main(run)
