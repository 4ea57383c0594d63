"""What the guest notices when the secondary goes away for a while, and what the way back costs.

The guest writes 4 KiB anywhere, a thousand times a second, from shortly before the outage to its end;
then it rests, so that everything that is sent until the disks are equal again is resynchronisation.
"""

import json
import time

import contenders

OUTAGES = {"stopped": "secondary stopped (SIGSTOP)", "killed": "secondary killed, and started again"}

OUTAGE_S = 10
WRITES_A_SECOND = 1000
LEAD_S = 1


def measure(results, t, kind, base, number):
    """One round of one kind of outage, all pairs."""
    pairs = [contenders.BrepPair(t, "sync"), contenders.BrepPair(t, "async"), contenders.QemuPair(t)]
    for pair in pairs if number % 2 == 0 else reversed(pairs):
        pair.start(base)
        pair.checkpoint()
        for name, value in outage(t, pair, kind).items():
            results.setdefault(kind, {}).setdefault(pair.title, {}) \
                .setdefault(name, []).append(value)
        pair.stop()


def outage(t, pair, kind):
    guest = t.daemon(
        f"{pair.name}-guest", "fio", "--name=load", "--ioengine=nbd", f"--uri={pair.uri()}",
        "--rw=randwrite", "--bs=4k", "--iodepth=4", f"--rate_iops={WRITES_A_SECOND}",
        "--time_based", f"--runtime={LEAD_S + OUTAGE_S}", "--output-format=json",
        f"--output={pair.name}-guest.json")
    time.sleep(LEAD_S)
    pair.lose_secondary(kind)
    time.sleep(OUTAGE_S)
    if kind == "stopped":
        pair.return_secondary(kind)
    guest.wait(deadline_s=120)
    said = (t.dir / f"{pair.name}-guest.json").read_text()
    write = json.loads(said[said.index("{"):])["jobs"][0]["write"]
    figures = {"longest write, ms": write["clat_ns"]["max"] / 1e6}
    if isinstance(pair, contenders.BrepPair):
        figures |= way_back(t, pair, kind)
    return figures


def way_back(t, pair, kind):
    """Until all disks are equal again, and how much was sent for it."""
    before = pair.control.execute("query-status")
    started = time.monotonic()
    if kind == "killed":
        pair.return_secondary(kind)
    after = {}

    def in_sync():
        after.update(pair.control.execute("query-status"))
        return all(disk["state"] == "in-sync" for disk in after["disks"])

    t.wait_until(in_sync, f"{pair.title} is in sync", 120)
    took_ms = (time.monotonic() - started) * 1000
    sent = after["counters"]["replicated-bytes"] - before["counters"]["replicated-bytes"]
    dirtied = sum(disk["bytes-behind"] for disk in before["disks"])
    figures = {"until in sync, ms": took_ms}
    if kind == "killed":
        # One that was only stopped is back before this was looked at.
        figures |= {"dirtied, MiB (whole granules)": dirtied / 2**20, "sent again, MiB": sent / 2**20}
    return figures
