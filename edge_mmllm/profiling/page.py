"""A report as one HTML page: nothing is fetched, nothing is a script.

The page's own policy forbids scripts, fonts, frames and connections; every text of a record is
escaped by `charts.text`. Wide tables scroll inside their frame, so that a phone shows the page at
its width.
"""

from __future__ import annotations

from collections.abc import Sequence

from edge_mmllm.profiling import charts
from edge_mmllm.profiling.charts import text
from edge_mmllm.profiling.figures import Bars, Figure, Lines, Stacked, figures
from edge_mmllm.profiling.results import Result, as_number
from edge_mmllm.profiling.view import (
    COLUMNS,
    chosen,
    devices,
    gates,
    grouped,
    names,
    noisy,
)

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
#: Colours of bundles and parts, on light and on dark.
LIGHT = ["2f6db5", "c2491d", "23805a", "8250b8", "8f6a00", "0b7f92", "b03a6f", "5b6670"]
_DARK = ["7fb3ee", "f2925c", "6fcf9b", "c3a0ea", "e0b84a", "5fcfe0", "ee8fb8", "aab4be"]


def _colours(values: Sequence[str]) -> str:
    return "".join(f"--s{i}:#{value};" for i, value in enumerate(values))


_STYLE = (
    f":root{{color-scheme:light dark;--bg:#fff;--fg:#1c2126;--soft:#5b6670;--line:#d9dee3;"
    f"--card:#f5f7f9;{_colours(LIGHT)}}}"
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
    shown = chosen(results)
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
        f"<div class='charts'>{''.join(map(_figure, figures(results)))}</div>",
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


def _svg(figure: Figure) -> str:
    chart, title = figure.chart, figure.heading
    if isinstance(chart, Bars):
        return charts.bars(title, chart.rows, chart.unit)
    if isinstance(chart, Stacked):
        return charts.stacked(title, chart.rows, chart.unit)
    if isinstance(chart, Lines):
        return charts.lines(title, chart.x_title, chart.y_title, chart.series, marks=chart.marks,
                            log_x=chart.log_x)  # fmt: skip
    return charts.scatter(title, chart.x_title, chart.y_title, chart.points, chart.fronts)


def _figure(figure: Figure) -> str:
    legend = charts.legend(figure.legend, dashed=isinstance(figure.chart, Lines))
    told = figure.table
    more = "" if told is None else table(told.caption, told.heads, told.rows)
    return (
        f"<figure><figcaption>{text(figure.title)}<span>{text(figure.about)}</span></figcaption>"
        f"{_svg(figure)}{legend if figure.legend else ''}"
        + (f"<details><summary>Figures</summary>{more}</details>" if more else "")
        + "</figure>"
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
