"""What was measured, as tables in Markdown."""

import os
import pathlib
import platform
import statistics


def machine(t):
    """Where and with what it was measured."""
    said = pathlib.Path("/proc/cpuinfo").read_text()
    models = [line.split(":", 1)[1].strip() for line in said.splitlines()
              if line.startswith("model name")]
    filesystem = t.run("stat", "--file-system", "--format=%T", ".").stdout.strip()
    return {
        "cpu": models[0] if models else platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "file system": filesystem,
        "load average at the start": round(os.getloadavg()[0], 1),
        "brep": first_line(t, t.brep_path, "--version"),
        "QEMU": first_line(t, "qemu-system-x86_64", "--version"),
        "qemu-nbd": first_line(t, "qemu-nbd", "--version"),
        "nbdkit": first_line(t, "nbdkit", "--version"),
        "fio": first_line(t, "fio", "--version"),
    }


def first_line(t, *argv):
    return t.run(*argv).stdout.splitlines()[0]


def print_head(machine, options, durability):
    print("\n".join(f"* {key}: {value}" for key, value in machine.items()))
    print(f"* {options.rounds} rounds of {options.runtime} s, disks of {options.size_mib} MiB")
    print("\nAn acknowledged write is in:\n")
    print("\n".join(f"* {title}: {where}" for title, where in durability.items()))


def print_rows(rows, measured):
    """Operations a second, then the ratios of ours to each peer."""
    groups = list(dict.fromkeys(group for group, _ in rows))
    for group in groups:
        loads = [load for of, load in rows if of is group]
        pairs = [(ours, peer) for ours in group.ours for peer in group.peers]
        head = [f"{x.title}" for x in group.all()] + [f"{a.title} / {b.title}" for a, b in pairs]
        print(f"\n{group.title}, operations a second:\n")
        table(["load"] + head, [
            [load.title] + cells(measured[f"{group.name}/{load.name}"], group.all(), pairs)
            for load in loads])
        for figure, title in COSTS.items():
            of = [load for load in loads if all(
                figure in result for each in measured[f"{group.name}/{load.name}"].values()
                for result in each)]
            if of:
                print(f"\n{group.title}, {title}:\n")
                table(["load"] + head, [
                    [load.title]
                    + cells(measured[f"{group.name}/{load.name}"], group.all(), pairs, figure)
                    for load in of])


# What is told besides the operations a second.
COSTS = {"server_us": "processor time of all that serve in microseconds an operation",
         "p50_us": "median latency in microseconds",
         "p99_us": "99th percentile of the latency in microseconds",
         "load_processors": "processors that the load keeps busy"}


def cells(results, contenders, pairs, figure="iops"):
    values = {title: [result[figure] for result in each] for title, each in results.items()}
    digits = 0 if figure == "iops" else 2 if figure == "load_processors" else 1
    return ([f"{statistics.median(values[x.title]):.{digits}f}" for x in contenders]
            + [ratio(values[a.title], values[b.title]) for a, b in pairs])


def print_moments(measured):
    """Milliseconds, and how many times longer QEMU takes."""
    for name, by_mib in measured.items():
        titles = sorted(next(iter(by_mib.values())), key=lambda title: "QEMU" in title)
        both = len(titles) == 2
        print(f"\n{name[0].upper()}{name[1:]}, milliseconds:\n")
        table(["dirtied, MiB"] + titles + ([f"{titles[0]}: times faster"] if both else []),
              [[mib] + [f"{statistics.median(each[title]):.1f}" for title in titles]
               + ([ratio(each[titles[1]], each[titles[0]])] if both else [])
               for mib, each in by_mib.items()])


def print_figures(measured, kinds):
    """Medians; what a pair cannot do is left empty."""
    for kind, by_title in measured.items():
        names = list(dict.fromkeys(name for figures in by_title.values() for name in figures))
        titles = sorted(by_title, key=lambda title: "QEMU" in title)
        print(f"\n{kinds[kind][0].upper()}{kinds[kind][1:]}:\n")
        table(["figure"] + titles, [
            [name] + [median(by_title[title].get(name)) for title in titles] for name in names])


def median(values):
    if not values:
        return ""
    value = statistics.median(values)
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def ratio(dividends, divisors):
    """The median of what the rounds give, each by itself."""
    both = [a / b for a, b in zip(dividends, divisors) if b]
    return f"{statistics.median(both):.2f}" if both else "–"


def table(head, rows):
    print("| " + " | ".join(head) + " |")
    print("|---" * len(head) + "|")
    for row in rows:
        print("| " + " | ".join(row) + " |")
