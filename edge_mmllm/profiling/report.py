"""One self-contained HTML page from benchmark records: a table, and a bar for each speed."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

#: Column title -> how a record becomes its cell.
_COLUMNS: Mapping[str, tuple[str, float, str]] = {
    "load ms": ("load_ms", 1, ".0f"),
    "first token ms": ("ttft_ms", 1, ".0f"),
    "prefill tokens/s": ("prefill_tokens_per_s", 1, ".0f"),
    "decode tokens/s": ("decode_tokens_per_s", 1, ".1f"),
    "p50 ms": ("itl_ms_p50", 1, ".2f"),
    "p99 ms": ("itl_ms_p99", 1, ".2f"),
    "peak RSS MB": ("peak_rss_bytes", 1e-6, ".0f"),
    "state kB": ("state_bytes", 1e-3, ".0f"),
    "threads": ("threads", 1, ".0f"),
}
_BARS = ("prefill_tokens_per_s", "decode_tokens_per_s")

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
.bar{fill:#4477aa}pre{background:#f6f6f6;padding:.8em;white-space:pre-wrap}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre{background:#222}
th,td{border-color:#444}.bar{fill:#77aadd}text{fill:#ddd}}
"""


def write_html(
    path: str | os.PathLike[str],
    title: str,
    records: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the page.

    Args:
        records: benchmark records with a `name`; fields they lack read "not measured".
        notes: (heading, text) blocks shown below the table, e.g. the device, answers given.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        _table(records),
        *(_bars(field, records) for field in _BARS),
        *(f"<h2>{html.escape(h)}</h2><pre>{html.escape(text)}</pre>" for h, text in notes),
    ]
    Path(path).write_text("\n".join(parts) + "\n", encoding="utf-8")


def _table(records: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{html.escape(c)}" for c in ("bundle", *_COLUMNS))
    rows = []
    for record in records:
        cells = [f"<td>{html.escape(str(record.get('name', '?')))}"]
        for field, factor, form in _COLUMNS.values():
            value = record.get(field)
            text = "not measured" if value is None else format(value * factor, form)
            cells.append(f"<td>{html.escape(text)}")
        rows.append("<tr>" + "".join(cells))
    return f"<table><tr>{head}\n" + "\n".join(rows) + "</table>"


def _bars(field: str, records: Sequence[Mapping[str, Any]]) -> str:
    """Horizontal bars, each as long as its share of the largest."""
    found = [(str(r.get("name", "?")), float(r[field])) for r in records if r.get(field)]
    if not found:
        return ""
    largest = max(value for _, value in found)
    title = next(c for c, (f, _, _) in _COLUMNS.items() if f == field)
    shapes = []
    for i, (name, value) in enumerate(found):
        y = 28 * i
        shapes.append(
            f"<text x=0 y={y + 18}>{html.escape(name)}</text>"
            f"<rect class=bar x=220 y={y + 4} height=20 width={400 * value / largest:.1f}></rect>"
            f"<text x={228 + 400 * value / largest:.1f} y={y + 18}>{value:.0f}</text>"
        )
    height = 28 * len(found) + 4
    return (
        f"<h2>{html.escape(title)}</h2><svg viewBox='0 0 720 {height}' width=720 "
        f"height={height} role=img>{''.join(shapes)}</svg>"
    )
