"""A mirror over two files and an NBD server: a child that lies is outvoted and reported.

Seen to fail with: the smallest group of equal contents wins; an outvoted child not reported.
"""

import brep_iotest
from brep_mirror import Mirror, lie, qemu_quorum

FILES = ["a.raw", "b.raw", "c.raw"]


def run(t):
    for file in FILES:
        t.qemu_img("create", "-f", "raw", file, "4M")
    server = t.qemu_nbd("server", "c.raw", "c.sock")
    mirror = Mirror(t, "vote-threshold=2,children.2.node-name=remote",
                    "a.raw", "b.raw", t.uri("c.sock"))
    mirror.io("write -P 1 0 1M", "write -P 2 1M 64k", "write -z 512k 64k", "discard 3M 1M", "flush")
    for file in FILES[1:]:
        t.equal(t.sha256(file), t.sha256("a.raw"), f"content of {file}")
    mirror.io("read -P 1 0 512k", "read -P 0 512k 64k", "read -P 2 1M 64k", "read -P 0 2M 2M")
    t.equal(mirror.events(), [], "events")
    t.log("written to all, read by all")

    # One lies: the others agree.
    lie("b.raw", 4096, 66)
    wrong = t.sha256("b.raw", 4096, 512)
    mirror.io("read -P 1 4096 512")
    event = mirror.wait_event("QUORUM_REPORT_BAD", node_name="b.raw")
    t.log("outvoted:", event["data"])
    lie("c.raw", 1 << 20, 67)
    mirror.io("read -P 2 1M 4k")
    t.log("outvoted:", mirror.wait_event("QUORUM_REPORT_BAD", node_name="remote")["data"])
    t.equal(t.sha256("b.raw", 4096, 512), wrong, "the liar, which nobody repairs")

    # Two lie differently: nobody has a majority. Two lie alike: they have.
    lie("b.raw", 8192, 66)
    lie("c.raw", 8192, 67)
    said = mirror.io("read 8192 512", code=1)
    t.expect("Input/output error" in said.stdout + said.stderr, said.describe())
    t.log("no majority:", mirror.wait_event("QUORUM_FAILURE")["data"])
    lie("c.raw", 8192, 66)
    mirror.io("read -P 66 8192 512")
    mirror.wait_event("QUORUM_REPORT_BAD", node_name="a.raw", sector_num=16)
    t.log("a majority that lies wins")

    # A write makes them equal again.
    mirror.io("write -P 3 8192 512", "write -P 4 4096 512", "write -P 5 1M 4k")
    mirror.quit()
    server.stop()
    for file in FILES[1:]:
        t.equal(t.sha256(file), t.sha256("a.raw"), f"content of {file}")
    verdicts(t)


def verdicts(t):
    """The cases above on QEMU's own quorum."""
    cases = [
        ([1, 66, 1], "read -P 1 0 512", 0),
        ([1, 66, 67], "read 0 512", 1),
        ([1, 66, 66], "read -P 66 0 512", 0),
    ]
    for contents, command, code in cases:
        for file, byte in zip(FILES, contents):
            lie(file, 0, byte)
        qemu_quorum(t, FILES, command, code=code, vote_threshold=2)
        mirror = Mirror(t, "vote-threshold=2", *FILES)
        mirror.io(command, code=code)
        mirror.quit()
    t.log("QEMU's quorum decides the same")


brep_iotest.main(run)
