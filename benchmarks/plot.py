"""Line charts as one self-contained SVG, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 70, 130, 40, 45
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37", "#8250df", "#9a6700")


@dataclass(frozen=True)
class Line:
    """One series."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Points:
    """Marks with a label each: (x, y, label)."""

    name: str
    places: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        span: the least range of the y axis; None starts it at 0.
        points: besides the lines.
    """

    title: str
    x_title: str
    lines: Sequence[Line]
    span: tuple[float, float] | None = None
    points: Sequence[Points] = ()


def svg(charts: Sequence[Chart]) -> str:
    """The charts, one below the other."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT * len(charts)}"'
        ' font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, chart in enumerate(charts):
        parts += [f'<g transform="translate(0 {i * HEIGHT})">', *_chart(chart), "</g>"]
    return "\n".join([*parts, "</svg>\n"])


def _chart(chart: Chart) -> list[str]:
    marks = [place for group in chart.points for place in group.places]
    xs = [x for line in chart.lines for x in line.x] + [x for x, _, _ in marks] or [0.0]
    ys = [y for line in chart.lines for y in line.y] + [y for _, y, _ in marks] or [0.0]
    low, high = chart.span or (0.0, 1.1 * max(ys))
    low, high = min(low, *ys), max(high, *ys, low + 1e-9)
    end = max(xs) or 1.0

    def at(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (WIDTH - LEFT - RIGHT) * x / end
        return across, TOP + (HEIGHT - TOP - BOTTOM) * (high - y) / (high - low)

    out = [f'<text x="{LEFT}" y="22" font-size="14">{escape(chart.title)}</text>']
    for i in range(5):
        value = low + (high - low) * i / 4
        x, y = at(0, value)
        out.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        out.append(f'<text x="{x - 8:.1f}" y="{y + 4:.1f}" text-anchor="end">{value:.3g}</text>')
        x, y = at(end * i / 4, low)
        out.append(
            f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{end * i / 4:.4g}</text>'
        )
    title = escape(chart.x_title)
    out.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 8}" text-anchor="end">{title}</text>')
    for i, line in enumerate(chart.lines):
        colour = COLOURS[i % len(COLOURS)]
        points = " ".join(
            "{:.1f},{:.1f}".format(*at(x, y)) for x, y in zip(line.x, line.y, strict=True)
        )
        out.append(
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        place = f'x="{WIDTH - RIGHT + 10}" y="{TOP + 12 + 18 * i}" fill="{colour}"'
        out.append(f"<text {place}>{escape(line.name)}</text>")
    taken: list[tuple[float, float, float]] = []
    for i, group in enumerate(chart.points, len(chart.lines)):
        colour = COLOURS[i % len(COLOURS)]
        for left, up, label in group.places:
            x, y = at(left, up)
            out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
            row = _free_row(taken, x + 5, y - 4, 5.5 * len(label))
            out.append(
                f'<text x="{x + 5:.1f}" y="{row:.1f}" font-size="9" fill="{colour}">'
                f"{escape(label)}</text>"
            )
        place = f'x="{WIDTH - RIGHT + 10}" y="{TOP + 12 + 18 * i}" fill="{colour}"'
        out.append(f"<text {place}>{escape(group.name)}</text>")
    return out


def _free_row(taken: list[tuple[float, float, float]], x: float, y: float, width: float) -> float:
    """Where a label at x fits beside those before it, upwards from y."""
    while any(abs(y - row) < 9 and x < end and start < x + width for start, end, row in taken):
        y -= 2
    taken.append((x, x + width, y))
    return y
