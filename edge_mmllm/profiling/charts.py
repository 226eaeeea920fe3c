"""Charts as inline SVG: no script, no network, colours from the page's style sheet.

Every chart is 400 units wide, so that its letters stay readable on a phone; a page gives it the
width it has. Text from outside goes through `text`, numbers through `number`: nothing else of a
record reaches the page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

WIDTH = 400
#: Colours (and dashes, for those who do not see colours) before they begin again.
COLOURS = 8
_DASHES = ("", "6 3", "2 3", "9 3 2 3")
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 18, 10, 40
_HEIGHT = 250
_ROW = 40
#: Values this many times apart are drawn on a logarithmic axis: the small ones would not be seen.
_WIDE = 30


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart; `low` and `high` are drawn as its interval."""

    label: str
    value: float
    colour: int = 0
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Line:
    """A line of a line chart, in order of x; `label` stands in the legend."""

    label: str
    points: Sequence[tuple[float, float]]
    colour: int = 0


@dataclass(frozen=True)
class Point:
    """A point of a scatter chart."""

    label: str
    x: float
    y: float
    colour: int = 0


def text(value: object) -> str:
    """Any text for HTML and SVG: escaped, without control characters and overrides of its
    direction."""
    kept = "".join(c if c.isprintable() else "\ufffd" for c in str(value))
    return html.escape(kept, quote=True)


def number(value: float) -> str:
    """A number for people: three digits that count."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else "?"
    size = abs(value)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.2g}"
    if size >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def wide(values: Sequence[float]) -> bool:
    """Whether values lie so far apart that an axis is logarithmic."""
    return bool(values) and min(values) > 0 and max(values) / min(values) > _WIDE


def bars(title: str, rows: Sequence[Bar], unit: str) -> str:
    """Horizontal bars from 0, each with its name above and its value behind; where the values are
    `wide`, points on a logarithmic axis, since a bar's length would mean nothing."""
    largest = max((max(r.value, r.high or 0) for r in rows), default=0) or 1
    log = wide([r.value for r in rows])
    least = 10 ** math.floor(math.log10(min(r.value for r in rows))) if log else 0.0

    def across(value: float) -> float:
        if log:
            share = math.log(max(value, least) / least) / math.log(largest / least)
        else:
            share = value / largest
        return max(share * (WIDTH - 92), 1)

    shapes = []
    for i, row in enumerate(rows):
        y = _ROW * i
        end = across(row.value)
        shapes.append(f"<text x='0' y='{y + 13}'>{text(_short(row.label, 58))}</text>")
        told = f"<title>{text(row.label)}: {number(row.value)} {text(unit)}{text(row.note)}</title>"
        colour = row.colour % COLOURS
        shapes.append(
            f"<path class='grid' d='M0 {y + 25}H{WIDTH - 92}'/>"
            f"<circle class='c{colour}' cx='{end:.1f}' cy='{y + 25}' r='6'>{told}</circle>"
            if log
            else f"<rect class='c{colour}' x='0' y='{y + 18}' width='{end:.1f}' height='14'>"
            f"{told}</rect>"
        )
        tip = end + (4 if log else 0)
        if row.low is not None and row.high is not None:
            a, b = across(row.low), across(row.high)
            tip = max(tip, b)
            shapes.append(
                f"<path class='whisker' d='M{a:.1f} {y + 25}H{b:.1f}M{a:.1f} {y + 21}v8"
                f"M{b:.1f} {y + 21}v8'/>"
            )
        shapes.append(f"<text x='{tip + 6:.1f}' y='{y + 30}'>{number(row.value)}</text>")
    about = f"points on a logarithmic axis, {unit}" if log else f"bars in {unit}"
    return _svg(title, about, _ROW * len(rows), shapes)


def stacked(
    title: str, rows: Sequence[tuple[str, Sequence[tuple[str, int, float]]]], unit: str
) -> str:
    """Bars made of parts (name, colour, value): where a whole goes."""
    largest = max((sum(v for _, _, v in parts) for _, parts in rows), default=0) or 1
    scale = (WIDTH - 76) / largest
    shapes = []
    for i, (label, parts) in enumerate(rows):
        y, x = _ROW * i, 0.0
        shapes.append(f"<text x='0' y='{y + 13}'>{text(_short(label, 58))}</text>")
        for name, colour, value in parts:
            width = value * scale
            shapes.append(
                f"<rect class='c{colour % COLOURS} part' x='{x:.2f}' y='{y + 18}' "
                f"width='{width:.2f}' height='14'>"
                f"<title>{text(label)}: {text(name)} {number(value)} {text(unit)}</title></rect>"
            )
            x += width
        total = sum(v for _, _, v in parts)
        shapes.append(f"<text x='{x + 6:.1f}' y='{y + 30}'>{number(total)} {text(unit)}</text>")
    return _svg(title, f"stacked bars in {unit}", _ROW * len(rows), shapes)


def lines(
    title: str, x_title: str, y_title: str, series: Sequence[Line], *, marks: bool = True,
    log_x: bool = False, from_zero: bool = True,
) -> str:  # fmt: skip
    """Lines over two axes; y begins at 0 unless told, and is logarithmic where it is `wide`."""
    points = [p for line in series for p in line.points]
    if not points:
        return ""
    frame = _Frame.over(points, log_x=log_x, from_zero=from_zero)
    shapes = frame.axes(x_title, y_title)
    for line in series:
        place = [frame.place(x, y) for x, y in line.points]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in place)
        dash = _DASHES[line.colour % len(_DASHES)]
        shapes.append(
            f"<path class='line k{line.colour % COLOURS}' stroke-dasharray='{dash}' d='{path}'>"
            f"<title>{text(line.label)}</title></path>"
        )
        if marks or len(place) == 1:
            for (x, y), (px, py) in zip(line.points, place, strict=True):
                shapes.append(
                    f"<circle class='c{line.colour % COLOURS}' cx='{px:.1f}' cy='{py:.1f}' r='3.5'>"
                    f"<title>{text(line.label)}: {number(x)}, {number(y)}</title></circle>"
                )
    return _svg(title, f"{y_title} against {x_title}", _HEIGHT, shapes)


def scatter(
    title: str, x_title: str, y_title: str, points: Sequence[Point],
    fronts: Sequence[Sequence[tuple[float, float]]] = (),
) -> str:  # fmt: skip
    """Points over two axes, and a line through each Pareto front."""
    if not points:
        return ""
    frame = _Frame.over([(p.x, p.y) for p in points], log_x=False, from_zero=True)
    shapes = frame.axes(x_title, y_title)
    for front in fronts:
        path = "M" + "L".join("{:.1f} {:.1f}".format(*frame.place(x, y)) for x, y in front)
        shapes.append(f"<path class='front' d='{path}'><title>Pareto front</title></path>")
    for p in points:
        x, y = frame.place(p.x, p.y)
        shapes.append(
            f"<circle class='c{p.colour % COLOURS}' cx='{x:.1f}' cy='{y:.1f}' r='5'>"
            f"<title>{text(p.label)}: {number(p.x)}, {number(p.y)}</title></circle>"
        )
    return _svg(title, f"{y_title} against {x_title}", _HEIGHT, shapes)


def legend(entries: Sequence[tuple[str, int]], *, dashed: bool = False) -> str:
    """What each colour stands for."""
    items = []
    for label, colour in entries:
        if dashed:
            dash = _DASHES[colour % len(_DASHES)]
            key = f"<path class='line k{colour % COLOURS}' stroke-dasharray='{dash}' d='M0 6H24'/>"
        else:
            key = f"<rect class='c{colour % COLOURS}' x='6' width='12' height='12'/>"
        items.append(
            f"<li><svg viewBox='0 0 24 12' width='24' height='12' aria-hidden='true'>{key}</svg> "
            f"{text(label)}</li>"
        )
    return f"<ul class='legend'>{''.join(items)}</ul>"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers that cover a range."""
    if not high > low:
        high = low + (abs(low) or 1)
    raw = (high - low) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


@dataclass(frozen=True)
class _Frame:
    """Two axes: ticks, and where a value stands."""

    x_ticks: Sequence[float]
    y_ticks: Sequence[float]
    log_x: bool
    log_y: bool

    @classmethod
    def over(cls, points: Sequence[tuple[float, float]], *, log_x: bool, from_zero: bool) -> _Frame:
        xs, ys = [p[0] for p in points], [p[1] for p in points]
        log_x = log_x and min(xs) > 0
        if log_x:
            low, high = math.floor(math.log2(min(xs))), math.ceil(math.log2(max(xs)))
            high = max(high, low + 1)
            stride = -(-(high - low) // 6)
            x_ticks: Sequence[float] = [2.0**i for i in range(low, high + stride, stride)]
        else:
            x_ticks = ticks(min(0.0, *xs), max(xs))
        if log_y := wide(ys):
            low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
            stride = -(-(high - low) // 6)
            y_ticks: Sequence[float] = [10.0**i for i in range(low, high + stride, stride)]
        else:
            y_ticks = ticks(min(0.0, *ys) if from_zero else min(ys), max(ys))
        return cls(x_ticks, y_ticks, log_x, log_y)

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A value's place in the picture."""
        across = _share(x, self.x_ticks, log=self.log_x)
        up = _share(y, self.y_ticks, log=self.log_y)
        return (
            _LEFT + across * (WIDTH - _LEFT - _RIGHT),
            _HEIGHT - _BOTTOM - up * (_HEIGHT - _TOP - _BOTTOM),
        )

    def axes(self, x_title: str, y_title: str) -> list[str]:
        """Grid, ticks and titles."""
        shapes = []
        floor = _HEIGHT - _BOTTOM
        for y in self.y_ticks:
            _, py = self.place(self.x_ticks[0], y)
            shapes.append(
                f"<path class='grid' d='M{_LEFT} {py:.1f}H{WIDTH - _RIGHT}'/>"
                f"<text x='{_LEFT - 6}' y='{py + 4:.1f}' text-anchor='end'>{_tick(y)}</text>"
            )
        for x in self.x_ticks:
            px, _ = self.place(x, self.y_ticks[0])
            shapes.append(
                f"<path class='grid' d='M{px:.1f} {_TOP}V{floor}'/>"
                f"<text x='{px:.1f}' y='{floor + 15}' text-anchor='middle'>{_tick(x)}</text>"
            )
        middle = (_LEFT + WIDTH - _RIGHT) / 2
        half = (_TOP + floor) / 2
        shapes.append(
            f"<text x='{middle}' y='{_HEIGHT - 6}' text-anchor='middle'>{text(x_title)}</text>"
            f"<text transform='translate(11 {half}) rotate(-90)' text-anchor='middle'>"
            f"{text(y_title)}</text>"
        )
        return shapes


def _share(value: float, along: Sequence[float], *, log: bool) -> float:
    """How far along an axis a value lies, 0 to 1."""
    low, high = along[0], along[-1]
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)


def _tick(value: float) -> str:
    if 0 < value < 0.01:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.6g}"


def _short(label: str, most: int) -> str:
    return label if len(label) <= most else label[: most - 1] + "\u2026"


def _svg(title: str, description: str, height: float, shapes: Sequence[str]) -> str:
    return (
        f"<svg viewBox='0 0 {WIDTH} {height:.0f}' role='img' aria-label='{text(title)}'>"
        f"<title>{text(title)}</title><desc>{text(description)}</desc>{''.join(shapes)}</svg>"
    )
