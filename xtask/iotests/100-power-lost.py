"""A secondary whose machine lost power has its last checkpoint, unless it ran with
--durability process; and both sides say what they keep their promises against.

The machine does not go down here: the state record is changed to another boot.

Seen to fail with: a secondary that goes by the mode of its present run, and not of its last one.
"""

import json
import struct
import zlib

import brep_iotest
from brep_pair import Pair

SLOT = 256 << 10


def other_boot(path):
    """The record says that it was saved under another boot of the machine."""
    data = bytearray(path.read_bytes())
    for base in (0, SLOT):
        header = data[base:base + 32]
        if header[:8] != b"BREPREC\0":
            continue
        length = struct.unpack_from(">I", header, 12)[0]
        record = json.loads(data[base + 32:base + 32 + length])
        record["boot"] = "another one"
        payload = json.dumps(record).encode()
        struct.pack_into(">I", header, 12, len(payload))
        struct.pack_into(">I", header, 24, zlib.crc32(bytes(header[:24]) + payload))
        data[base:base + 32 + len(payload)] = bytes(header) + payload
    path.write_bytes(data)


def run(t):
    # What counts is the mode under which the power was lost, not that of the start after it.
    for mode, then in (("power", "power"), ("power", "process"), ("process", "process"),
                       ("process", "power")):
        t.run("rm", "-rf", "alpha", "beta", "p.raw", "s.raw")
        pair = Pair(t, secondary=["--durability", mode]).start()
        pair.wait_promotable()
        status = pair.status("alpha")
        t.equal([status["durability"], status["peer-durability"]], ["power", mode], "both sides")
        pair.write("write -P 1 0 1M", "flush")
        pair.checkpoint()
        epoch = pair.status("beta")["checkpoint"]
        pair.write("write -P 2 512k 1M", "flush")
        pair.secondary.kill9()
        (t.dir / "s.sock").unlink(missing_ok=True)
        pair.wait_state("alpha", "disconnected")
        pair.primary.kill9()
        (t.dir / "p.sock").unlink(missing_ok=True)
        other_boot(t.dir / "beta" / "state")

        pair.secondary_options[-1] = then
        pair.start_secondary()
        status = pair.status("beta")
        t.expect("power was lost" in status["reason"], status["reason"])
        t.equal(status["promotable"], mode == "power", f"promotable after {mode}")
        t.equal(status["latest-ok"], False, "latest")
        t.equal(status["checkpoint"], epoch, "the checkpoint")
        if mode == then == "power":
            pair.start_primary()
            pair.wait_state("alpha", "in-sync", deadline_s=30)
            pair.wait_promotable()
            sent = pair.status("alpha")["counters"]["replicated-bytes"]
            t.expect(1 << 20 <= sent < pair.size, f"{sent} bytes were sent again")
            pair.stop()
            pair.equal_files()
        else:
            pair.secondary.stop()
        found = "the checkpoint is whole" if mode == "power" else "not promotable"
        t.log(f"{mode}, then {then}: {found}")


brep_iotest.main(run)
