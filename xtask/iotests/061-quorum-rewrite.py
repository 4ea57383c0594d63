"""rewrite-corrupted repairs children that lie; blkverify fails a read at the first difference.

Seen to fail with: children that lost a vote not rewritten; differences that blkverify lets pass.
"""

import shutil

import brep_iotest
from brep_mirror import Mirror, lie, qemu_quorum, refusal

FILES = ["a.raw", "b.raw", "c.raw"]
# Where, with what, in which file: one in a request, so that the others agree on all of it.
LIES = [(0, 201, "b.raw"), (1 << 20, 202, "c.raw"), ((2 << 20) + 5000, 203, "a.raw"),
        ((4 << 20) - 512, 204, "b.raw")]
EVERYTHING = ["read 0 1M", "read 1M 1M", "read 2M 1M", "read 3M 1M"]


def run(t):
    t.pattern_file("good.raw", 4 << 20)
    repairs(t)
    compares(t)
    t.log(refusal(t, "vote-threshold=2,blkverify=on,rewrite-corrupted=on", "a.raw", "b.raw"))
    t.log(refusal(t, "vote-threshold=2,blkverify=on", *FILES))
    t.log(refusal(t, "vote-threshold=1,blkverify=on", "a.raw", "b.raw"))


def repairs(t):
    for file in FILES:
        shutil.copy("good.raw", file)
    for offset, byte, file in LIES:
        lie(file, offset, byte)
    for file in FILES:
        shutil.copy(file, f"qemu-{file}")
    mirror = Mirror(t, "vote-threshold=2,rewrite-corrupted=on", *FILES)
    mirror.io(*EVERYTHING)
    for file in FILES:
        t.equal(t.sha256(file), t.sha256("good.raw"), f"content of {file}")
        t.expect(any(event["data"]["node-name"] == file and "error" not in event["data"]
                     for event in mirror.events()), f"{file} was reported as outvoted")
    t.log("repaired and reported:", ", ".join(FILES))
    mirror.io(*EVERYTHING)
    mirror.quit()
    for file in FILES:
        t.qemu_img("compare", "-f", "raw", "-F", "raw", file, "good.raw")
    qemu_quorum(t, [f"qemu-{file}" for file in FILES], *EVERYTHING, vote_threshold=2,
                rewrite_corrupted=True)
    for file in FILES:
        t.equal(t.sha256(f"qemu-{file}"), t.sha256(file), f"{file} as QEMU repairs it")
    t.log("as QEMU's quorum does")


def compares(t):
    mirror = Mirror(t, "vote-threshold=2,blkverify=on", "a.raw", "b.raw", name="verify")
    mirror.io("write -P 9 1M 64k", *EVERYTHING)
    t.equal(mirror.events(), [], "events")
    lie("b.raw", (1 << 20) + 1000, 10, length=1)
    mirror.io("read -P 9 1M 512")
    mirror.io("read 1M 64k", code=1)
    t.log("a difference:", mirror.wait_event("QUORUM_FAILURE")["data"])
    answer = mirror.refused("x-blockdev-change", parent="mirror", node="b.raw")
    t.log(answer)
    mirror.quit()


brep_iotest.main(run)
