"""What is not a load in a column: each study gives figures of its own for each contender.

A study has a `name`, a `title`, and `figures(t, base, number, options)`, which yields a contender's
title and its figures by name; one round of it.
"""

import contextlib
import json
import os
import re
import shutil
import statistics
import threading
import time

import contenders as c
import loads
from brep_iotest import Failed


class Hidden:
    """How much is written into the buffer of pre-images, by what a file system and what calls say."""

    name, title = "hidden", "Bytes into the hidden disk for each byte that a guest touched first"
    BLOCK = 4096

    def figures(self, t, base, number, options):
        for pair in rotated([c.BrepPair(t, "sync"), c.QemuPair(t)], number):
            pair.start(base)
            touched = self.BLOCK * min(4096, base.stat().st_size // self.BLOCK // 4)
            buffers = set(t.dir.glob("**/*")) - {t.dir / pair.disk("secondary", base)}
            buffers = [path for path in buffers if path.is_file()]
            allocated = -allocated_in(buffers)
            with traced_writes(t, pair) as written:
                # fio goes over a map: no block twice.
                t.run("fio", "--name=touch", "--ioengine=nbd", f"--uri={pair.uri()}",
                      "--rw=randwrite", f"--bs={self.BLOCK}", "--iodepth=8",
                      f"--io_size={touched}", timeout_s=120)
            allocated += allocated_in(buffers)
            disk = pair.disk("secondary", base)
            into = {path: count for path, count in written.items()
                    if not path.endswith(f"/{disk}") and not path.endswith(".log")}
            yield pair.title, {"by allocated blocks": allocated / touched,
                               "by write calls": sum(into.values()) / touched}
            pair.stop()


@contextlib.contextmanager
def traced_writes(t, pair):
    """Bytes that write calls of the secondary put into each file meanwhile, by path."""
    t.require("strace")
    written, log = {}, t.dir / "writes.log"
    process = pair.processes()[1]
    tracer = t.daemon("strace", "strace", "-f", "-y", "-qq", "-s", "0", "-o", log, "-e",
                      "trace=write,writev,pwrite64,pwritev,pwritev2,copy_file_range,splice",
                      "-p", process.process.pid)
    t.wait_until(lambda: "TracerPid:\t0" not in status_of(process), "strace is attached")
    yield written
    tracer.process.terminate()
    tracer.process.wait(timeout=30)
    for call in log.read_text().splitlines():
        # An answer that another thread's call cut off stands without its path: such are counted.
        if found := re.search(r"\(\d+<(/[^>]*)>.* = (\d+)$", call):
            written[found[1]] = written.get(found[1], 0) + int(found[2])
        elif re.search(r"resumed>.* = \d+$", call):
            written["?"] = written.get("?", 0) + int(call.rsplit(" = ", 1)[1])


def status_of(process):
    with open(f"/proc/{process.process.pid}/status") as file:
        return file.read()


def allocated_in(paths):
    return sum(path.stat().st_blocks * 512 for path in paths if path.exists())


class Steady:
    """Small random writes, without checkpoints and with one every so often.

    Not of QEMU: its secondary aborts when a checkpoint finds writes under way, and nothing but a
    guest that is stopped around each prevents it.
    """

    name, title = "steady", "4 KiB random writes at depth 32 under checkpoints"

    EVERY_S = 0.1

    def figures(self, t, base, number, options):
        for pair in rotated([c.BrepPair(t, "sync"), c.BrepPair(t, "async")], number):
            pair.start(base)
            load = loads.Fio("steady", "", "randwrite", "4k", 32)
            load.measure(pair, options.runtime)
            pair.checkpoint()
            without = load.measure(pair, options.runtime)
            pair.checkpoint()
            with checkpoints(pair, self.EVERY_S) as times_ms:
                during = load.measure(pair, options.runtime)
            yield pair.title, {
                "seconds between checkpoints": self.EVERY_S,
                "operations a second without": without["iops"],
                "operations a second with": during["iops"],
                "with / without": during["iops"] / without["iops"],
                "99.9th percentile without, µs": without["p999_us"],
                "99.9th percentile with, µs": during["p999_us"],
                "checkpoints": len(times_ms),
                "median checkpoint, ms": statistics.median(times_ms),
                "longest checkpoint, ms": max(times_ms)}
            pair.stop()


@contextlib.contextmanager
def checkpoints(pair, every_s):
    """One every so often meanwhile; how long each took. One that fails fails the study."""
    times_ms, errors, over = [], [], threading.Event()

    def run():
        try:
            while not over.wait(every_s):
                started = time.monotonic()
                pair.checkpoint()
                times_ms.append((time.monotonic() - started) * 1000)
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield times_ms
    finally:
        over.set()
        thread.join()
    if errors:
        raise Failed(f"{pair.title}: a checkpoint failed: {errors[0]}")


class Rates:
    """Merge and resynchronisation next to what fio does on such files with the same reads and writes."""

    name, title = "rates", "Merge and resynchronisation, next to fio with the same reads and writes"

    def figures(self, t, base, number, options):
        pair = c.BrepPair(t, "async")
        mib = options.size_mib // 2
        pair.start(base)
        loads.dirty(pair, mib)
        pair.checkpoint()
        pair.lose_secondary("killed")
        loads.dirty(pair, mib)
        behind = pair.control.execute("query-status")["disks"][0]["bytes-behind"]
        resync_s = seconds(lambda: self.resync(t, pair))
        pair.checkpoint()
        loads.dirty(pair, mib)
        hidden = pair.secondary_control.execute("query-status")["disks"][0]["hidden-bytes"]
        started_s = time.time()
        pair.lose_primary()
        pair.failover()
        merge_s = pair.wait_merged() - started_s
        pair.stop()
        # A copied byte is read, read again where it is overwritten, put aside, and written; a merged
        # one is read and written.
        resync_fio_s = self.fio(t, pair, behind, 2)
        merge_fio_s = self.fio(t, pair, hidden, 1)
        yield pair.title, {
            "resynchronised, MiB": behind / 2**20,
            "resynchronised, MiB/s": behind / 2**20 / resync_s,
            "fio with these reads and writes, MiB/s": behind / 2**20 / resync_fio_s,
            "resynchronisation / fio": resync_fio_s / resync_s,
            "merged, MiB": hidden / 2**20,
            "merged, MiB/s": hidden / 2**20 / merge_s,
            "fio with those reads and writes, MiB/s": hidden / 2**20 / merge_fio_s,
            "merge / fio": merge_fio_s / merge_s}

    def resync(self, t, pair):
        pair.return_secondary("killed")
        t.wait_until(lambda: all(disk["state"] == "in-sync" for disk in
                                 pair.control.execute("query-status")["disks"]),
                     f"{pair.title} is in sync", 300, step_s=0.005)

    def fio(self, t, pair, length, times):
        """Seconds for reading and writing so much so many times, 64 KiB somewhere each."""
        file = t.dir / pair.disk("primary", None)
        said = t.run("fio", "--name=mix", "--ioengine=psync", f"--filename={file}", "--rw=randrw",
                     "--bs=64k", f"--io_size={2 * times * length}", "--norandommap",
                     "--rwmixread=50", "--end_fsync=1", "--output-format=json",
                     timeout_s=600).stdout
        job = json.loads(said[said.index("{"):])["jobs"][0]
        return max(job["read"]["runtime"], job["write"]["runtime"], job["job_runtime"]) / 1000


class Moments:
    """A checkpoint and a failover of small and large disks, of one and of many, after 64 MiB."""

    name, title = "large", "A checkpoint and a failover after 64 MiB were dirtied, by the disks"
    MIB = 64

    def figures(self, t, base, number, options):
        for pair in rotated(by_size(t) + [many(t)], number):
            pair.start(base)
            loads.dirty(pair, self.MIB)
            pair.checkpoint()
            loads.dirty(pair, self.MIB)
            checkpoint_s = seconds(pair.checkpoint)
            loads.dirty(pair, self.MIB)
            resident = resident_mib(pair)
            pair.lose_primary()
            failover_s = seconds(pair.failover)
            yield pair.title, {"checkpoint, ms": checkpoint_s * 1000,
                               "failover, ms": failover_s * 1000,
                               "resident memory of the primary, MiB": resident[0],
                               "resident memory of the secondary, MiB": resident[1]}
            pair.wait_merged()
            pair.stop()


def resident_mib(pair):
    found = [re.search(r"VmRSS:\s+(\d+) kB", status_of(process)) for process in pair.processes()]
    return [int(each[1]) / 1024 for each in found]


def by_size(t):
    return [c.BrepPair(t, "sync", "10g", "10 GiB", size=10 << 30),
            c.BrepPair(t, "sync", "16t", "16 TiB", size=(16 << 40) - (1 << 20))]


def many(t):
    return c.BrepPair(t, "sync", "many", "64 disks", disks=64)


STUDIES = [Hidden(), Steady(), Rates(), Moments()]


def seconds(action):
    started = time.monotonic()
    action()
    return time.monotonic() - started


def rotated(items, by):
    by %= len(items)
    return items[by:] + items[:by]
