"""Throughput and latency over the queue depth, as a picture (SVG).

Left the operations a second; right the median latency and, dashed, its 99th percentile, on a
logarithmic scale. Each point is the median of the rounds.
"""

import math
import statistics

WIDTH, HEIGHT = 420, 300
LEFT, TOP, BOTTOM, GAP = 70, 50, 50, 90
COLOURS = ["#0b6e4f", "#4ea8de", "#c1121f", "#8d99ae"]


def draw(path, title, depths, measured):
    """`measured` maps a title to the figures of each depth, in the order of `depths`."""
    throughput = {name: [median(each, "iops") for each in rows] for name, rows in measured.items()}
    latency = {name: [[median(each, figure) for each in rows] for figure in ("p50_us", "p99_us")]
               for name, rows in measured.items()}
    left = Panel(LEFT, depths, Linear(max(map(max, throughput.values()))), "operations a second")
    slowest = max(max(tail) for _, tail in latency.values())
    fastest = min(min(middle) for middle, _ in latency.values())
    right = Panel(LEFT + WIDTH + GAP, depths, Logarithmic(fastest, slowest),
                  "latency in microseconds: median, 99th percentile (dashed)")
    parts = [*left.frame(), *right.frame()]
    for name, colour in zip(measured, COLOURS):
        parts += left.line(throughput[name], colour)
        middle, tail = latency[name]
        parts += right.line(middle, colour) + right.line(tail, colour, dashed=True)
    parts += legend(measured)
    with open(path, "w") as file:
        file.write(document(title, parts))


def median(results, figure):
    return statistics.median(result[figure] for result in results)


class Linear:
    """From nothing to `most`."""

    def __init__(self, most):
        step = 10 ** math.floor(math.log10(most))
        self.step = next(step * by for by in (0.2, 0.5, 1, 2) if most / (step * by) <= 6)
        self.top = math.ceil(most / self.step) * self.step

    def marks(self):
        return [self.step * number for number in range(round(self.top / self.step) + 1)]

    def share(self, value):
        return value / self.top


class Logarithmic:
    """Whole powers of ten that hold all values."""

    def __init__(self, least, most):
        self.low = math.floor(math.log10(least))
        self.high = max(math.ceil(math.log10(most)), self.low + 1)

    def marks(self):
        return [10 ** power for power in range(self.low, self.high + 1)]

    def share(self, value):
        return (math.log10(value) - self.low) / (self.high - self.low)


class Panel:
    def __init__(self, left, depths, scale, title):
        self.left, self.depths, self.scale, self.title = left, depths, scale, title

    def x(self, number):
        return self.left + WIDTH * number / (len(self.depths) - 1)

    def y(self, value):
        return TOP + HEIGHT * (1 - self.scale.share(value))

    def frame(self):
        parts = [text(self.left, TOP - 12, self.title)]
        for value in self.scale.marks():
            y = self.y(value)
            parts.append(f'<path d="M{self.left} {y:.1f}h{WIDTH}" stroke="#ddd"/>')
            parts.append(text(self.left - 8, y + 4, f"{value:,.0f}", "end"))
        for number, depth in enumerate(self.depths):
            parts.append(text(self.x(number), TOP + HEIGHT + 20, depth, "middle"))
        return parts + [text(self.left + WIDTH / 2, TOP + HEIGHT + 40, "queue depth", "middle")]

    def line(self, values, colour, dashed=False):
        points = [(self.x(number), self.y(value)) for number, value in enumerate(values)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        dashes = ' stroke-dasharray="5 4"' if dashed else ""
        return [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>',
                *(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points)]


def legend(names):
    parts = []
    for number, (name, colour) in enumerate(zip(names, COLOURS)):
        x, y = LEFT + 200 * number, TOP + HEIGHT + 75
        parts.append(f'<path d="M{x} {y}h24" stroke="{colour}" stroke-width="3"/>')
        parts.append(text(x + 32, y + 4, name))
    return parts


def text(x, y, content, anchor="start"):
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{content}</text>'


def document(title, parts):
    width, height = LEFT + 2 * WIDTH + GAP + 30, TOP + HEIGHT + BOTTOM + 45
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="13" fill="#222">',
        f"<title>{title}</title>", '<rect width="100%" height="100%" fill="white"/>',
        text(LEFT, 18, title), *parts, "</svg>", ""])
