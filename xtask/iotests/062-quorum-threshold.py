"""A write that fewer children take than the threshold says fails; options that make no sense.

Seen to fail with: one success too few is enough.
"""

import os

import brep_iotest
from brep_mirror import Mirror, refusal

OPTIONS = [
    "vote-threshold=1",
    "vote-threshold=1,children=a.raw",
    "vote-threshold=1,children.1.filename=a.raw",
    "children.0.filename=a.raw",
    "vote-threshold=0,children.0.filename=a.raw",
    "vote-threshold=2,children.0.filename=a.raw",
    "vote-threshold=many,children.0.filename=a.raw",
    "read-pattern=fifo,vote-threshold=0,children.0.filename=a.raw",
    "vote-threshold=1,read-pattern=lifo,children.0.filename=a.raw",
    "vote-threshold=1,rewrite-corrupted=perhaps,children.0.filename=a.raw",
    "vote-threshold=1,children.0=nobody",
    "vote-threshold=1,children.0.filename=a.raw,children.0.colour=red",
    "vote-threshold=1,children.0=a,children.0.ignore-errors=on",
    "vote-threshold=1,children.0.node-name=a",
    "vote-threshold=1,colour=red,children.0.filename=a.raw",
    "vote-threshold=1,children.0.filename=a.raw,children.1.filename=short.raw",
    "vote-threshold",
]


def run(t):
    for file in ["a.raw", "b.raw", "c.raw"]:
        t.qemu_img("create", "-f", "raw", file, "4M")
    t.qemu_img("create", "-f", "raw", "short.raw", "2M")
    for options in OPTIONS:
        t.log(f"{options}: {refusal(t, options)}")

    # Two of three must take a write. The third fails: reported, and no more.
    first = t.qemu_nbd("first", "b.raw", "b.sock")
    second = t.qemu_nbd("second", "c.raw", "c.sock")
    mirror = Mirror(t, "vote-threshold=2,children.1.node-name=first,children.2.node-name=second",
                    "a.raw", t.uri("b.sock"), t.uri("c.sock"))
    mirror.io("write -P 1 0 64k")
    second.kill9()
    mirror.io("write -P 2 0 64k", "flush", "read -P 2 0 64k")
    event = mirror.wait_event("QUORUM_REPORT_BAD", node_name="second", type="write")["data"]
    t.expect("write of 65536 bytes at 0" in event.pop("error"), "the error says what failed")
    t.log("one of three:", event)

    # Two of three fail: the write does, the flush, and the read.
    first.kill9()
    mirror.io("write -P 3 4096 1k", code=1)
    mirror.wait_event("QUORUM_REPORT_BAD", node_name="first")
    event = mirror.wait_event("QUORUM_FAILURE", reference="mirror")["data"]
    t.log("two of three:", event)
    mirror.io("flush", code=1)
    mirror.io("read 0 1k", code=1)
    # Nothing can be made durable any more, and it says so.
    mirror.execute("quit")
    t.equal(mirror.daemon.wait(), 1, "exit code")
    t.qemu_io("a.raw", "read -P 2 0 4k", "read -P 3 4096 1k")
    t.log("the child that took it keeps it")

    # With a threshold of 1 one is enough; failures that are expected are not reported.
    first = t.qemu_nbd("third", "b.raw", "d.sock")
    mirror = Mirror(t, "read-pattern=fifo,children.1.ignore-errors=on", "a.raw", t.uri("d.sock"),
                    name="fifo")
    first.kill9()
    mirror.io("write -P 4 0 64k", "flush", "read -P 4 0 64k", "write -z 1M 64k", "discard 2M 64k")
    t.equal(mirror.events(), [], "events")
    mirror.quit()
    t.qemu_io("a.raw", "read -P 4 0 64k")
    t.log("fifo with one of two: as if nothing had happened")
    t.expect(not os.path.exists("refused.sock"), "no refusal has left a socket")


brep_iotest.main(run)
