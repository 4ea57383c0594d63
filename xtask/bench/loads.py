"""Loads on an export: fio, and random reads with simple replies."""

import json
import os


class Fio:
    """fio's nbd engine; it asks for structured replies."""

    def __init__(self, name, title, rw, block, depth, connections=1):
        self.name, self.title = name, title
        self.rw, self.block, self.depth, self.connections = rw, block, depth, connections
        # Pairs run for long: what counts is an epoch that has one like it before it.
        self.warms_up = "write" in rw

    def measure(self, contender, runtime_s):
        return fio(contender, runtime_s, self.rw, self.block, self.depth, self.connections)


def fio(contender, runtime_s, rw, block, depth, connections=1):
    """A thread for each connection; `server_us` is what an operation costs all that serve."""
    before_s = used_s(contender)
    uris = contender.uris()
    span = [f"--size={contender.span}"] if contender.span else []
    said = contender.t.run(
        "fio", "--name=global", "--ioengine=nbd", f"--rw={rw}", f"--bs={block}",
        f"--iodepth={depth}", "--time_based", "--norandommap",
        f"--runtime={int(runtime_s * 1000)}ms", "--output-format=json", "--thread",
        f"--numjobs={connections // len(uris) or 1}", "--group_reporting", *span,
        *(part for uri in uris for part in ("--name=load", f"--uri={uri}")),
        timeout_s=runtime_s + 60).stdout
    server_s = used_s(contender) - before_s
    job = json.loads(said[said.index("{"):])["jobs"][0]
    side = job["read" if "read" in rw else "write"]
    percentiles = side["clat_ns"].get("percentile", {})
    return {"iops": side["iops"],
            "p50_us": percentiles.get("50.000000", 0) / 1000,
            "p99_us": percentiles.get("99.000000", 0) / 1000,
            "p999_us": percentiles.get("99.900000", 0) / 1000,
            "server_us": server_s * 1e6 / side["total_ios"],
            "load_processors": (job["usr_cpu"] + job["sys_cpu"]) / 100 * connections}


def used_s(contender):
    """Processor time of its processes so far, ended threads included."""
    ticks = 0
    for process in contender.processes():
        with open(f"/proc/{process.process.pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class SimpleReads:
    """The reads of `cargo xtask nbd-load`."""

    warms_up = False

    def __init__(self, name, title, length, depth):
        self.name, self.title, self.length, self.depth = name, title, length, depth

    def measure(self, contender, runtime_s):
        said = contender.t.run(
            os.environ["BREP_XTASK"], "nbd-load", contender.t.dir / contender.socket_name,
            "--export", contender.export, "--length", self.length, "--depth", self.depth,
            "--runtime", runtime_s, timeout_s=runtime_s + 60)
        return said.json


LOADS = [
    Fio("write-4k-qd1", "4 KiB random write, depth 1", "randwrite", "4k", 1),
    Fio("write-4k-qd32", "4 KiB random write, depth 32", "randwrite", "4k", 32),
    Fio("write-64k-qd8", "64 KiB random write, depth 8", "randwrite", "64k", 8),
    Fio("write-1m-qd4", "1 MiB sequential write, depth 4", "write", "1m", 4),
    Fio("read-4k-qd32", "4 KiB random read, depth 32, structured replies", "randread", "4k", 32),
    SimpleReads("read-simple-4k-qd32", "4 KiB random read, depth 32, simple replies", 4096, 32),
]

DEPTHS = [1, 2, 4, 8, 16, 32]
# What `--plot` draws.
SWEEP = [Fio(f"write-4k-qd{depth}", f"4 KiB random write, depth {depth}", "randwrite", "4k", depth)
         for depth in DEPTHS]
# 64 requests in flight, each on a connection of its own: over one disk, or over 64.
SPREAD = [Fio("write-4k-qd1-c64", "4 KiB random write, 64 connections", "randwrite", "4k", 1, 64),
          Fio("write-64k-qd1-c64", "64 KiB random write, 64 connections", "randwrite", "64k", 1, 64)]


def dirty(contender, mib):
    """Writes so much, each 64 KiB somewhere else, and waits for the last answer.

    That is the unit in which QEMU copies: smaller writes make its buffers many times larger.
    """
    if mib:
        uris = contender.uris()
        span = [f"--size={contender.span}"] if contender.span else []
        contender.t.run(
            "fio", "--name=global", "--ioengine=nbd", "--rw=randwrite", "--bs=64k", "--iodepth=8",
            f"--io_size={(mib << 20) // len(uris)}", *span,
            *(part for uri in uris for part in ("--name=dirty", f"--uri={uri}")), timeout_s=600)
