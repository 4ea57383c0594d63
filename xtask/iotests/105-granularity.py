"""Maps of another granularity are converted at the next start, and nothing is forgotten.

Seen to fail with: maps of another granularity made anew.
"""

import brep_iotest
from brep_pair import Pair

SIZE = 16 << 20


def run(t):
    pair = Pair(t, size=SIZE).start()
    pair.secondary.stop()
    pair.wait_state("alpha", "disconnected")
    # Two pages of one granule of 64 KiB, and one of another.
    pair.write("write -P 1 0 4k", "write -P 2 60k 4k", "write -P 3 8M 4k")
    t.equal(behind(pair), 128 << 10, "bytes behind with the default")
    for granularity, expected in (("4K", 128 << 10), ("1M", 2 << 20), ("64K", 2 << 20)):
        pair.primary.stop()
        pair.start_primary("--granularity", granularity)
        t.equal(behind(pair), expected, f"bytes behind with {granularity}")
    # What is written from now on is noted in the new granules.
    pair.primary.stop()
    pair.start_primary("--granularity", "4K")
    pair.write("write -P 4 12M 4k")
    t.equal(behind(pair), (2 << 20) + (4 << 10), "bytes behind after another write")
    # A kill does not mind either.
    pair.primary.kill9()
    (t.dir / "p.sock").unlink(missing_ok=True)
    pair.start_primary("--granularity", "16K")
    t.equal(behind(pair), (2 << 20) + (16 << 10), "bytes behind after a kill")
    pair.start_secondary()
    pair.wait_state("alpha", "in-sync")
    sent = pair.status("alpha")["counters"]["replicated-bytes"]
    t.equal(sent, (2 << 20) + (16 << 10), "bytes sent")
    pair.wait_promotable()
    pair.stop()
    pair.equal_files()
    t.log("converted, resynced, equal")
    for bad in "3K", "2K", "32M", "x":
        t.log(t.brep("primary", "--granularity", bad, "--disk", "vda=p.raw", "--state-dir", "a",
                     "--guest-listen", t.uri("q.sock"), code=2).stderr)


def behind(pair):
    return pair.disk_status("alpha")["bytes-behind"]


brep_iotest.main(run)
