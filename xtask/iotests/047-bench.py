"""`cargo xtask bench`, once and briefly: every contender is measured, and the tables have a shape.

Seen to fail with: a contender that is left out of a round.
"""

import json
import pathlib
import re
import sys

import brep_iotest
from brep_qemu import QEMU

# deadline_s: 120

BENCH = pathlib.Path(__file__).parent.parent / "bench/bench.py"


def run(t):
    t.require(QEMU, "fio", "nbdkit")
    said = t.run(sys.executable, "-B", BENCH, "--rounds", 1, "--runtime", 1, "--size-mib", 64,
                 "--only", "serve-unix/lean-read-4k-qd32-c1", "--only", "moments/0", "--json", "record.json",
                 timeout_s=100).stdout
    record = json.loads((t.dir / "record.json").read_text())
    for row, results in record["rows"].items():
        for title, rounds in results.items():
            t.expect(len(rounds) == 1 and rounds[0]["iops"] > 0, f"{title}: {rounds}")
        t.log(f"{row}: {', '.join(sorted(results))}")
    for name, by_mib in record["moments"].items():
        for mib, results in by_mib.items():
            t.expect(all(ms > 0 for rounds in results.values() for ms in rounds), f"{results}")
            t.log(f"{name}, {mib} MiB: {', '.join(sorted(results))}")
    # Figures differ from run to run, the rest does not.
    for line in said[said.index("A plain server"):].splitlines():
        t.log(re.sub(r"\d+\.?\d*(?= \|)", "N", line))


brep_iotest.main(run)
