"""Speeds of brep side by side with a pair of QEMUs, qemu-nbd and nbdkit.

A row is one load on all contenders of a group. A round measures every row once, the contenders
one right after the other and beginning with another one each time, each from a new checkpoint;
writes in the second epoch of the same load. A ratio is taken within a round, where the machine
was the same for both; medians of the rounds count.
"""

import argparse
import json
import sys

import brep_iotest
import contenders as c
import moments
import outage
import plot
import report
import serving as s
from loads import DEPTHS, LOADS, SPREAD, SWEEP
from studies import STUDIES, by_size, many


class Group:
    """`ours` are compared with `peers`; `others` are only shown."""

    def __init__(self, name, title, ours, peers, others=(), loads=LOADS):
        self.name, self.title, self.loads = name, title, loads
        self.ours, self.peers, self.others = ours, peers, list(others)

    def all(self):
        return self.ours + self.peers + self.others


def groups(t):
    return [
        Group("primary", "The guest's export of a pair",
              [c.BrepPair(t, "sync"), c.BrepPair(t, "async")], [c.QemuPair(t)], [s.Nbdkit(t, "null", "unix")]),
        Group("sweep", "The guest's export of a pair, by depth",
              [c.BrepPair(t, "sync"), c.BrepPair(t, "async")], [c.QemuPair(t)],
              [s.Nbdkit(t, "file", "unix")], SWEEP),
        Group("size", "A disk that is sparse behind what is loaded", by_size(t)[1:], by_size(t)[:1],
              [], LOADS[:4]),
        Group("many", "The same load on many disks of a pair, and on one", [many(t)],
              [c.BrepPair(t, "sync", "one", "one disk")], [], SPREAD),
        Group("durability", "A pair that survives a loss of power, and one that need not",
              [c.BrepPair(t, "async", "power", "--durability power", "power")],
              [c.BrepPair(t, "async", "process", "--durability process")], [], LOADS[:4]),
        Group("secondary", "The secondary alone, written to by a plain client",
              [c.BrepPlainSecondary(t)], [c.QemuParent(t)]),
        *(Group(f"serve-{socket}", f"A plain server on {where}", [s.Brep(t, socket)],
                [s.Nbdkit(t, "file", socket), s.QemuNbd(t, socket)], [s.Nbdkit(t, "null", socket)],
                s.LOADS[socket])
          for socket, where in s.SOCKETS.items()),
        Group("serve-copy", "A plain server on a unix socket, read-only, that is copied",
              [s.Brep(t, "unix", True)],
              [s.Nbdkit(t, "file", "unix", True), s.QemuNbd(t, "unix", True)], [], s.LOADS["copy"]),
    ]


def main(t):
    options = parse()
    groups_all = groups(t)
    rows = [(group, load) for group in groups_all for load in group.loads
            if wanted(options, f"{group.name}/{load.name}")]
    dirtied = [mib for mib in moments.DIRTY_MIB if wanted(options, f"moments/{mib}")]
    outages = [kind for kind in outage.OUTAGES if wanted(options, f"outage/{kind}")]
    studies = [study for study in STUDIES if wanted(options, f"study/{study.name}")]
    if options.list:
        print("\n".join([f"{group.name}/{load.name}" for group, load in rows]
                        + [f"moments/{mib}" for mib in dirtied]
                        + [f"outage/{kind}" for kind in outages]
                        + [f"study/{study.name}" for study in studies]))
        return
    record = {"machine": report.machine(t), "options": vars(options), "rows": {}, "moments": {},
              "outages": {}, "studies": {}}
    report.print_head(record["machine"], options, {x.title: x.durability for g in groups_all
                                                   for x in g.all()})
    base = t.dir / "base.raw"
    fill(t, base, options.size_mib)
    for number in range(options.rounds):
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        for group in groups_all:
            loads = [load for of, load in rows if of is group]
            if loads:
                measure_group(record["rows"], group, loads, base, number, options)
        for mib in dirtied:
            moments.measure(record["moments"], t, mib, base, number)
        for kind in outages:
            outage.measure(record["outages"], t, kind, base, number)
        for study in studies:
            for title, figures in study.figures(t, base, number, options):
                of = record["studies"].setdefault(study.name, {}).setdefault(title, {})
                for name, value in figures.items():
                    of.setdefault(name, []).append(value)
    report.print_rows(rows, record["rows"])
    report.print_moments(record["moments"])
    report.print_figures(record["outages"], outage.OUTAGES)
    report.print_figures(record["studies"], {study.name: study.title for study in studies})
    if options.plot:
        draw(options.plot, groups_all, record)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)


def parse():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--runtime", type=float, default=2)
    parser.add_argument("--size-mib", type=int, default=1024)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    options = parser.parse_args()
    if options.plot and not all(wanted(options, f"sweep/{load.name}") for load in SWEEP):
        parser.error("--plot draws the rows of sweep/: let --only name them all")
    return options


def wanted(options, name):
    return not options.only or any(word in name for word in options.only)


def draw(path, groups_all, record):
    sweep = next(group for group in groups_all if group.name == "sweep")
    rows = [record["rows"][f"sweep/{load.name}"] for load in SWEEP]
    title = f"4 KiB random writes, {record['machine']['cpu']}, {record['machine']['cores']} processors"
    plot.draw(path, title, DEPTHS,
              {x.title: [row[x.title] for row in rows] for x in sweep.all()})


def fill(t, base, size_mib):
    """A sparse disk would make copying before a write nearly free."""
    block = brep_iotest.pattern(1 << 20, "base")
    with open(base, "wb") as file:
        for _ in range(size_mib):
            file.write(block)


def measure_group(rows, group, loads, base, number, options):
    """One round of a group; all its contenders are up all the time."""
    for contender in group.all():
        contender.start(base)
    for load in loads:
        results = rows.setdefault(f"{group.name}/{load.name}", {})
        for contender in rotated(group.all(), number):
            contender.checkpoint()
            if load.warms_up:
                load.measure(contender, options.runtime)
                contender.checkpoint()
            result = load.measure(contender, options.runtime)
            results.setdefault(contender.title, []).append(result)
    for contender in group.all():
        contender.stop()


def rotated(items, by):
    by %= len(items)
    return items[by:] + items[:by]


if __name__ == "__main__":
    brep_iotest.main(main)
