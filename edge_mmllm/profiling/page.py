"""A report as one HTML page: nothing is fetched, nothing is a script.

The page's own policy forbids scripts, fonts, frames and connections; every text of a record is
escaped by `charts.text`. Wide tables scroll inside their frame, so that a phone shows the page at
its width.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_mmllm.profiling import charts
from edge_mmllm.profiling.charts import Bar, Line, Point, text
from edge_mmllm.profiling.profiler import PHASES
from edge_mmllm.profiling.results import Result, as_number, numbers
from edge_mmllm.profiling.stats import percentile
from edge_mmllm.profiling.view import (
    COLUMNS,
    chosen,
    devices,
    gates,
    grouped,
    label,
    names,
    noisy,
    pareto,
    phases,
    quality,
    with_media,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
#: Less than this is rounding of float32, which no chart needs to tell apart.
_NO_LOSS = 1e-6
_LIGHT = ["2f6db5", "c2491d", "23805a", "8250b8", "8f6a00", "0b7f92", "b03a6f", "5b6670"]
_DARK = ["7fb3ee", "f2925c", "6fcf9b", "c3a0ea", "e0b84a", "5fcfe0", "ee8fb8", "aab4be"]


def _colours(values: Sequence[str]) -> str:
    return "".join(f"--s{i}:#{value};" for i, value in enumerate(values))


_STYLE = (
    f":root{{color-scheme:light dark;--bg:#fff;--fg:#1c2126;--soft:#5b6670;--line:#d9dee3;"
    f"--card:#f5f7f9;{_colours(_LIGHT)}}}"
    f"@media(prefers-color-scheme:dark){{:root{{--bg:#14181c;--fg:#e6eaee;--soft:#a5b0ba;"
    f"--line:#39424b;--card:#1d2329;{_colours(_DARK)}}}}}"
    + "".join(
        f".c{i}{{fill:var(--s{i})}}.k{i}{{stroke:var(--s{i})}}" for i in range(charts.COLOURS)
    )
    + """
*{box-sizing:border-box}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;max-width:76rem;padding:1rem;
background:var(--bg);color:var(--fg);overflow-wrap:anywhere}
h1{font-size:1.6rem;margin:.4rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1rem 0 .3rem}p{margin:.4rem 0}.soft,figcaption span{color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,30rem),1fr));gap:1rem}
figure{margin:0;padding:1rem;background:var(--card);border-radius:.5rem;min-width:0}
figcaption{font-weight:600;margin-bottom:.5rem}figcaption span{display:block;font-weight:400;
font-size:.85rem}
svg{display:block;width:100%;height:auto;max-width:38rem}
svg text{font:12px system-ui,sans-serif;fill:var(--fg)}
.grid{stroke:var(--line);fill:none}.line{fill:none;stroke-width:2}
.whisker{stroke:var(--fg);fill:none;stroke-width:1.5}.part{stroke:var(--card);stroke-width:.8}
.front{fill:none;stroke:var(--soft);stroke-dasharray:5 4}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.5rem 0 0;
font-size:.85rem}.legend svg{display:inline-block;width:24px}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.9rem;width:100%}
caption{text-align:left;padding:.4rem .7rem;color:var(--soft)}
th,td{padding:.35rem .7rem;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
tbody th,thead th:first-child{text-align:left}tbody th{font-weight:600;position:sticky;left:0;
background:var(--bg)}thead th{border-top:0}td.words{text-align:left;
white-space:normal;min-width:14rem}
details{margin-top:.6rem;font-size:.9rem}summary{cursor:pointer}
pre{background:var(--card);padding:.8rem;white-space:pre-wrap;border-radius:.5rem}
img{max-width:100%;height:8rem;image-rendering:pixelated}
:focus-visible{outline:2px solid var(--s0)}
"""
)


def page(title: str, results: Sequence[Result], extra: Sequence[str] = ()) -> str:
    """The whole page. `extra`: HTML that is safe already, put at its end."""
    known = names(results)
    colours = {name: i for i, name in enumerate(known)}
    shown = chosen(results)
    figures = [
        figure
        for figure in (
            _decode(shown, colours),
            _prefill(shown, colours),
            _phases(shown),
            _latency(shown, colours),
            _memory_parts(shown),
            _memory_over_time(shown, colours),
            _against_context(results, colours),
            _pareto(shown, colours),
            _throttling(results, colours),
        )
        if figure
    ]
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'>",
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        "<meta name='viewport' content='width=device-width, initial-scale=1'>",
        f"<title>{text(title)}</title><style>{_STYLE}</style></head><body>",
        f"<main><h1>{text(title)}</h1>",
        f"<p class='soft'>{len(results)} results of {len(known)} bundles. Medians over the "
        "repetitions; each row of the table names the line of the file that it stands in."
        f"{_shown_test(shown)}</p>",
        _warning(results),
        f"<div class='charts'>{''.join(figures)}</div>",
        _gates(results),
        _devices(results),
        "<h2>All figures</h2>",
        _figures(results),
        _noise(results),
        _operators(shown),
        *extra,
        "</main></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def table(
    caption: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = ()
) -> str:
    """A table that scrolls inside its frame and says what it is; `words`: columns of text."""
    head = "".join(f"<th scope='col'>{text(h)}</th>" for h in heads)
    body = []
    for row in rows:
        cells = [f"<th scope='row'>{text(row[0])}</th>"]
        for i, cell in enumerate(row[1:], 1):
            kind = " class='words'" if i in words else ""
            cells.append(f"<td{kind}>{text(cell)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<div class='scroll' role='region' aria-label='{text(caption)}' tabindex='0'><table>"
        f"<caption>{text(caption)}</caption><thead><tr>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _figure(title: str, about: str, svg: str, *, after: str = "") -> str:
    if not svg:
        return ""
    return (
        f"<figure><figcaption>{text(title)}<span>{text(about)}</span></figcaption>"
        f"{svg}{after}</figure>"
    )


def _warning(results: Sequence[Result]) -> str:
    flagged = sum(bool(r.rows("noise")) for r in results)
    failed = sum(r.failed for r in results)
    told = []
    if flagged:
        told.append(f"{flagged} of {len(results)} runs were noisy: see below why")
    if failed:
        told.append(f"{failed} failed")
    return f"<p><strong>{text('; '.join(told))}.</strong></p>" if told else ""


def _shown_test(shown: Sequence[Result]) -> str:
    """Which test the charts of one run show."""
    tests = {r.test for r in shown}
    if len(tests) != 1:
        return ""
    return f" Charts show the test {text(*tests)} (tokens read + made), unless they say another."


def _noise(results: Sequence[Result]) -> str:
    """Why runs were flagged: reasons are long, so they have a table of their own."""
    rows = noisy(results)
    if not rows:
        return ""
    told = table("Noisy runs", ("bundle", "test", "why", "line"), rows, words=(2,))
    return f"<details><summary>Noisy runs ({len(rows)})</summary>{told}</details>"


def _rate_bars(
    field: str, title: str, about: str, shown: Sequence[Result], colours: dict[str, int]
) -> str:
    rows = []
    for r in shown:
        value = r.number(field)
        if value is None or value <= 0:
            continue
        ends = numbers(r.record.get(f"{field}_ci95"))
        low, high = ends if len(ends) == 2 else (None, None)
        rows.append(Bar(label(r, of=shown), value, colours[r.name], low, high, f" ({r.source})"))
    if charts.wide([row.value for row in rows]):
        about += "; a logarithmic axis"
    return _figure(title, about, charts.bars(title, rows, "tokens/s") if rows else "")


def _decode(shown: Sequence[Result], colours: dict[str, int]) -> str:
    about = "tokens/s, more is better; whiskers: 95 % interval of the median"
    return _rate_bars("decode_tokens_per_s", "Decode", about, shown, colours)


def _prefill(shown: Sequence[Result], colours: dict[str, int]) -> str:
    about = "tokens of the prompt over the time to the first token, more is better"
    return _rate_bars("prefill_tokens_per_s", "Prefill", about, shown, colours)


def _phases(shown: Sequence[Result]) -> str:
    rows, seen = [], set()
    for r in shown:
        parts = [(p, PHASES.index(p), v) for p, v in phases(r)]
        seen |= {p for p, _, _ in parts}
        if parts:
            rows.append((f"{label(r, of=shown)}: {r.text('new_tokens')} tokens", parts))
    used = [p for p in PHASES if p in seen]
    legend = charts.legend([(p, PHASES.index(p)) for p in used])
    cells = []
    for name, parts in rows:
        told = {phase: value for phase, _, value in parts}
        cells.append((name, *[charts.number(told[p]) if p in told else "" for p in used]))
    title = "Phases of one answer"
    more = _details(table(title, ("bundle", *[f"{p} ms" for p in used]), cells))
    svg = charts.stacked(title, rows, "ms") if rows else ""
    about = "one answer, from the prompt to the last token; median of each phase"
    return _figure("Where the time goes", about, svg, after=legend + more)


def _details(inside: str) -> str:
    return f"<details><summary>Figures</summary>{inside}</details>"


def _latency(shown: Sequence[Result], colours: dict[str, int]) -> str:
    series, cells = [], []
    for r in shown:
        values = [v for v in numbers(r.record.get("itl_ms_values")) if v > 0]
        if len(values) < 5:
            continue
        points = [(percentile(values, p), float(p)) for p in (*range(0, 100, 5), 97, 99, 100)]
        series.append(Line(label(r, of=shown), points, colours[r.name]))
        cells.append((r.name, *[f"{percentile(values, p):.2f}" for p in (50, 90, 99, 100)]))
    if not series:
        return ""
    svg = charts.lines("Time between two tokens", "ms between two tokens", "% of the tokens",
                       series, marks=False, log_x=True)  # fmt: skip
    legend = charts.legend([(s.label, s.colour) for s in series], dashed=True)
    rows = table("Time between two tokens, ms", ("bundle", "p50", "p90", "p99", "longest"), cells)
    more = _details(rows)
    about = "share of the tokens that came within so many ms: steep is steady, left is fast"
    return _figure("Latency", about, svg, after=legend + more)


_MEMORY = (
    ("runtime", ("memory", "runtime_bytes")),
    ("weights, mapped", ("memory", "weights_resident_bytes")),
    ("weights, packed", ("memory", "packed_bytes")),
    ("state", ("memory", "state_bytes")),
    ("tokenizer", ("memory", "tokenizer_bytes")),
    ("scratch", ("memory", "scratch_bytes")),
)


def _memory_parts(shown: Sequence[Result]) -> str:
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
        return ""
    svg = charts.stacked("Memory by what it holds", rows, "MB")
    legend = charts.legend([(n, i) for i, (n, _) in enumerate(_MEMORY)])
    heads = ("bundle", *[f"{n} MB" for n, _ in _MEMORY], "peak RSS MB")
    rows_ = table("Memory by what it holds", heads, cells)
    more = _details(rows_)
    about = "of the process, at the end; the parts need not add up to the peak"
    return _figure("Memory", about, svg, after=legend + more)


def _curve(points: Sequence[object], column: int, factor: float) -> list[tuple[float, float]]:
    found = []
    for point in points:
        row = point if isinstance(point, list) else []
        if len(row) > column:
            x, y = as_number(row[0]), as_number(row[column])
            if x is not None and y is not None:
                found.append((x, y * factor))
    return found


def _memory_over_time(shown: Sequence[Result], colours: dict[str, int]) -> str:
    series = [
        Line(label(r, of=shown), points, colours[r.name])
        for r in shown
        if len(points := _curve(r.rows("memory_over_time", "points"), 1, 1e-6)) > 1
    ]
    if not series:
        return ""
    svg = charts.lines("Memory over time", "seconds", "RSS in MB", series, marks=False)
    legend = charts.legend([(s.label, s.colour) for s in series], dashed=True)
    return _figure("Memory over time", "from before the load to the last repetition", svg,
                   after=legend)  # fmt: skip


def _against_context(results: Sequence[Result], colours: dict[str, int]) -> str:
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
        return ""
    svg = charts.lines("Speed against context", "tokens before", "decode tokens/s", series,
                       log_x=True)  # fmt: skip
    legend = charts.legend([(s.label, s.colour) for s in series], dashed=True)
    return _figure("Speed against context", "decode after a prompt of so many tokens", svg,
                   after=legend)  # fmt: skip


def _pareto(shown: Sequence[Result], colours: dict[str, int]) -> str:
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
        return ""
    fronts = [front for values in models.values() if len(front := pareto(values)) > 1]
    svg = charts.scatter("Quality against size", "bundle in MB", f"{what}, less is better", points,
                         fronts)  # fmt: skip
    about = "what the quality gate lost against the model in float32; dashed: the Pareto front of "
    about += "the bundles of one model"
    if min(losses) < _NO_LOSS:
        about += f"; what is below {_NO_LOSS:g} is drawn there"
    rows = [
        (p.label, charts.number(p.x), charts.number(loss))
        for p, loss in zip(points, losses, strict=True)
    ]
    more = _details(table("Quality against size", ("bundle", "MB", what), rows))
    legend = charts.legend([(p.label, p.colour) for p in points])
    return _figure("Quality against size", about, svg, after=legend + more)


def _throttling(results: Sequence[Result], colours: dict[str, int]) -> str:
    longest = {r.name: r for r in results if len(r.rows("sustained", "points")) > 1}  # the last
    series = [
        Line(r.name, _curve(r.rows("sustained", "points"), 1, 1), colours[r.name])
        for r in grouped(list(longest.values()))
    ]
    if not series:
        return ""
    svg = charts.lines("Throughput over time", "seconds", "decode tokens/s", series, marks=False)
    legend = charts.legend([(s.label, s.colour) for s in series], dashed=True)
    return _figure("Throttling", "decode without a pause: a falling line is a device that grows "
                   "too hot", svg, after=legend)  # fmt: skip


def _figures(results: Sequence[Result]) -> str:
    heads = ("bundle", *[c.title for c in COLUMNS])
    rows = [(r.name, *[c.cell(r) for c in COLUMNS]) for r in grouped(results)]
    words = [i for i, head in enumerate(heads) if head == "noise"]
    return table("Every result", heads, rows, words=words)


def _gates(results: Sequence[Result]) -> str:
    told = gates(results)
    if not told:
        return ""
    titles = list(dict.fromkeys(title for _, _, figures in told for title in figures))
    rows = [(name, verdict, *[f.get(t, "") for t in titles]) for name, verdict, f in told]
    heads = ("bundle", "verdict", *titles)
    return f"<h2>Quality gate</h2>{table('What the exporter found', heads, rows)}"


def _operators(shown: Sequence[Result]) -> str:
    parts = []
    for r in shown:
        for told in r.rows("operators"):
            if not isinstance(told, dict):
                continue
            for field, what in (("by_type", "operators"), ("by_layer", "layers")):
                listed = told.get(field)
                rows = [
                    (
                        str(s.get("name"))[:80],
                        *[_cell(s.get(n)) for n in ("calls", "us", "percent")],
                    )
                    for s in (listed if isinstance(listed, list) else [])
                    if isinstance(s, dict)
                ]
                if rows:
                    name = f"{r.name}: {what} in {told.get('what')}"
                    heads = (what, "calls", "us", "%")
                    parts.append(f"<details><summary>{text(name)}</summary>"
                                 f"{table(name, heads, rows[:40])}</details>")  # fmt: skip
    return f"<h2>Operators</h2>{''.join(parts)}" if parts else ""


def _cell(value: object) -> str:
    found = as_number(value)
    return "" if found is None else charts.number(found)


def _devices(results: Sequence[Result]) -> str:
    parts = [
        table(f"Device of {lines}", ("", "value"), rows, words=[1])
        for lines, rows in devices(results)
    ]
    return f"<h2>Device</h2>{''.join(parts)}" if parts else ""
