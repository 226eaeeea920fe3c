"""The figures of a report as data: what each shows and says. `page.py` makes SVG of them,
`pictures.py` PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from edge_mmllm.profiling import charts
from edge_mmllm.profiling.charts import Bar, Line, Point
from edge_mmllm.profiling.profiler import PHASES
from edge_mmllm.profiling.results import Result, as_number, numbers
from edge_mmllm.profiling.stats import percentile
from edge_mmllm.profiling.view import (
    chosen,
    grouped,
    label,
    names,
    pareto,
    phases,
    quality,
    with_media,
)

#: Less than this is rounding of float32, which no chart needs to tell apart.
_NO_LOSS = 1e-6


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from 0."""

    rows: Sequence[Bar]
    unit: str


@dataclass(frozen=True)
class Stacked:
    """Bars of parts: (name, parts), a part is (name, colour, value)."""

    rows: Sequence[tuple[str, Sequence[tuple[str, int, float]]]]
    unit: str


@dataclass(frozen=True)
class Lines:
    """Lines over two axes."""

    x_title: str
    y_title: str
    series: Sequence[Line]
    marks: bool = True
    log_x: bool = False


@dataclass(frozen=True)
class Scatter:
    """Points, and lines through Pareto fronts."""

    x_title: str
    y_title: str
    points: Sequence[Point]
    fronts: Sequence[Sequence[tuple[float, float]]]


@dataclass(frozen=True)
class Table:
    """The numbers of a figure."""

    caption: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        name: of its file.
        about: what it shows, in a sentence.
        heading: of the drawing itself, for those who do not see it.
        legend: (what, its colour).
    """

    name: str
    title: str
    about: str
    heading: str
    chart: Bars | Stacked | Lines | Scatter
    legend: Sequence[tuple[str, int]] = field(default=())
    table: Table | None = None


def figures(results: Sequence[Result]) -> list[Figure]:
    """Those that the results have something for."""
    colours = {name: i for i, name in enumerate(names(results))}
    shown = chosen(results)
    made = (
        _rates("decode", "Decode", "tokens/s, more is better; whiskers: 95 % interval of the "
               "median", shown, colours),
        _rates("prefill", "Prefill", "tokens of the prompt over the time to the first token, more "
               "is better", shown, colours),
        _phases(shown),
        _latency(shown, colours),
        _memory_parts(shown),
        _memory_over_time(shown, colours),
        _against_context(results, colours),
        _pareto(shown, colours),
        _throttling(results, colours),
    )  # fmt: skip
    return [figure for figure in made if figure is not None]


def _rates(
    name: str, title: str, about: str, shown: Sequence[Result], colours: dict[str, int]
) -> Figure | None:
    rows = []
    what = f"{name}_tokens_per_s"
    for r in shown:
        value = r.number(what)
        if value is None or value <= 0:
            continue
        ends = numbers(r.record.get(f"{what}_ci95"))
        low, high = ends if len(ends) == 2 else (None, None)
        rows.append(Bar(label(r, of=shown), value, colours[r.name], low, high, f" ({r.source})"))
    if not rows:
        return None
    if charts.wide([row.value for row in rows]):
        about += "; a logarithmic axis"
    return Figure(name, title, about, title, Bars(rows, "tokens/s"))


def _phases(shown: Sequence[Result]) -> Figure | None:
    rows, seen = [], set()
    for r in shown:
        parts = [(p, PHASES.index(p), v) for p, v in phases(r)]
        seen |= {p for p, _, _ in parts}
        if parts:
            rows.append((f"{label(r, of=shown)}: {r.text('new_tokens')} tokens", parts))
    if not rows:
        return None
    used = [p for p in PHASES if p in seen]
    cells = []
    for name, parts in rows:
        told = {phase: value for phase, _, value in parts}
        cells.append((name, *[charts.number(told[p]) if p in told else "" for p in used]))
    title = "Phases of one answer"
    return Figure(
        "phases",
        "Where the time goes",
        "one answer, from the prompt to the last token; median of each phase",
        title,
        Stacked(rows, "ms"),
        [(p, PHASES.index(p)) for p in used],
        Table(title, ("bundle", *[f"{p} ms" for p in used]), cells),
    )


def _latency(shown: Sequence[Result], colours: dict[str, int]) -> Figure | None:
    series, cells = [], []
    for r in shown:
        values = [v for v in numbers(r.record.get("itl_ms_values")) if v > 0]
        if len(values) < 5:
            continue
        points = [(percentile(values, p), float(p)) for p in (*range(0, 100, 5), 97, 99, 100)]
        series.append(Line(label(r, of=shown), points, colours[r.name]))
        cells.append((r.name, *[f"{percentile(values, p):.2f}" for p in (50, 90, 99, 100)]))
    if not series:
        return None
    heads = ("bundle", "p50", "p90", "p99", "longest")
    return Figure(
        "latency",
        "Latency",
        "share of the tokens that came within so many ms: steep is steady, left is fast",
        "Time between two tokens",
        Lines("ms between two tokens", "% of the tokens", series, marks=False, log_x=True),
        _keys(series),
        Table("Time between two tokens, ms", heads, cells),
    )


def _keys(series: Sequence[Line]) -> list[tuple[str, int]]:
    return [(s.label, s.colour) for s in series]


_MEMORY = (
    ("runtime", ("memory", "runtime_bytes")),
    ("weights, mapped", ("memory", "weights_resident_bytes")),
    ("weights, packed", ("memory", "packed_bytes")),
    ("state", ("memory", "state_bytes")),
    ("tokenizer", ("memory", "tokenizer_bytes")),
    ("scratch", ("memory", "scratch_bytes")),
)


def _memory_parts(shown: Sequence[Result]) -> Figure | None:
    rows, cells = [], []
    for r in shown:
        found = [(n, i, r.number(*path)) for i, (n, path) in enumerate(_MEMORY)]
        parts = [(n, i, v / 1e6) for n, i, v in found if v]
        if r.table("memory") and parts:
            rows.append((label(r, of=shown), parts))
            peak = r.number("peak_rss_bytes")
            shown_parts = ["" if v is None else f"{v / 1e6:.1f}" for _, _, v in found]
            cells.append((r.name, *shown_parts, "" if peak is None else f"{peak / 1e6:.1f}"))
    if not rows:
        return None
    heads = ("bundle", *[f"{n} MB" for n, _ in _MEMORY], "peak RSS MB")
    return Figure(
        "memory",
        "Memory",
        "of the process, at the end; the parts need not add up to the peak",
        "Memory by what it holds",
        Stacked(rows, "MB"),
        [(n, i) for i, (n, _) in enumerate(_MEMORY)],
        Table("Memory by what it holds", heads, cells),
    )


def _curve(points: Sequence[object], column: int, factor: float) -> list[tuple[float, float]]:
    found = []
    for point in points:
        row = point if isinstance(point, list) else []
        if len(row) > column:
            x, y = as_number(row[0]), as_number(row[column])
            if x is not None and y is not None:
                found.append((x, y * factor))
    return found


def _memory_over_time(shown: Sequence[Result], colours: dict[str, int]) -> Figure | None:
    series = [
        Line(label(r, of=shown), points, colours[r.name])
        for r in shown
        if len(points := _curve(r.rows("memory_over_time", "points"), 1, 1e-6)) > 1
    ]
    if not series:
        return None
    title, about = "Memory over time", "from before the load to the last repetition"
    chart = Lines("seconds", "RSS in MB", series, marks=False)
    return Figure("memory-over-time", title, about, title, chart, _keys(series))


def _against_context(results: Sequence[Result], colours: dict[str, int]) -> Figure | None:
    lines: dict[tuple[str, str], dict[float, float]] = {}
    for r in grouped(results):
        tokens, rate = r.number("prompt_tokens"), r.number("decode_tokens_per_s")
        tokens = r.number("depth") if tokens is None else tokens
        if not r.failed and tokens and rate and not with_media(r):
            lines.setdefault((r.name, r.text("threads")), {})[tokens] = rate
    several = len({threads for _, threads in lines}) > 1
    series = [
        Line(
            f"{name}, {threads} threads" if several else name, sorted(points.items()), colours[name]
        )
        for (name, threads), points in lines.items()
        if len(points) > 1
    ]
    if not series:
        return None
    title, about = "Speed against context", "decode after a prompt of so many tokens"
    chart = Lines("tokens before", "decode tokens/s", series, log_x=True)
    return Figure("context", title, about, title, chart, _keys(series))


def _pareto(shown: Sequence[Result], colours: dict[str, int]) -> Figure | None:
    points, losses, what = [], list[float](), ""
    models: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for r in shown:
        told, size = quality(r), r.number("size_bytes")
        if told is not None and size:
            what = told[0]
            drawn = max(told[1], _NO_LOSS)
            points.append(Point(r.name, size / 1e6, drawn, colours[r.name]))
            losses.append(told[1])
            model = (r.text("architecture"), r.text("parameters"))
            models.setdefault(model, []).append((size / 1e6, drawn))
    if len(points) < 2:
        return None
    fronts = [front for values in models.values() if len(front := pareto(values)) > 1]
    title = "Quality against size"
    about = "what the quality gate lost against the model in float32; dashed: the Pareto front of "
    about += "the bundles of one model"
    if min(losses) < _NO_LOSS:
        about += f"; what is below {_NO_LOSS:g} is drawn there"
    rows = [
        (p.label, charts.number(p.x), charts.number(loss))
        for p, loss in zip(points, losses, strict=True)
    ]
    chart = Scatter("bundle in MB", f"{what}, less is better", points, fronts)
    keys = [(p.label, p.colour) for p in points]
    return Figure(
        "quality", title, about, title, chart, keys, Table(title, ("bundle", "MB", what), rows)
    )


def _throttling(results: Sequence[Result], colours: dict[str, int]) -> Figure | None:
    longest = {r.name: r for r in results if len(r.rows("sustained", "points")) > 1}  # the last
    series = [
        Line(r.name, _curve(r.rows("sustained", "points"), 1, 1), colours[r.name])
        for r in grouped(list(longest.values()))
    ]
    if not series:
        return None
    about = "decode without a pause: a falling line is a device that grows too hot"
    chart = Lines("seconds", "decode tokens/s", series, marks=False)
    return Figure("throttling", "Throttling", about, "Throughput over time", chart, _keys(series))
