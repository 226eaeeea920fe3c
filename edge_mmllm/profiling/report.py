"""One self-contained HTML page from benchmark records: a table, and a bar for each speed."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_mmllm.errors import UsageError

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

#: First bytes of a picture's file -> its media type.
_PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.3em .8em;text-align:right;border-bottom:1px solid #ddd}
th:first-child,td:first-child{text-align:left}
.bar{fill:#4477aa}pre{background:#f6f6f6;padding:.8em;white-space:pre-wrap}
img{height:8em;image-rendering:pixelated}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}pre{background:#222}
th,td{border-color:#444}.bar{fill:#77aadd}text{fill:#ddd}}
"""


def write_html(
    path: str | os.PathLike[str],
    title: str,
    records: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[tuple[str, str]] = (),
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Write the page.

    Args:
        records: benchmark records with a `name`; fields they lack read "not measured".
        notes: (heading, text) blocks shown below the table, e.g. the device, answers given.
        pictures: heading of a note -> a PNG or JPEG file, which the page takes in.

    Raises:
        OSError: a picture cannot be read.
        UsageError: it is neither PNG nor JPEG.
    """
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        _table(records),
        _split(records),
        *(_bars(field, records) for field in _BARS),
    ]
    for heading, text in notes:
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        if heading in (pictures or {}):
            parts.append(_picture(Path((pictures or {})[heading])))
        parts.append(f"<pre>{html.escape(text)}</pre>")
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


def _split(records: Sequence[Mapping[str, Any]]) -> str:
    """Where the time to the first token went, of records with pictures."""
    found = [r for r in records if r.get("split")]
    if not found:
        return ""
    names = list(dict.fromkeys(name for r in found for name in r["split"]))
    head = "".join(f"<th>{html.escape(n.removesuffix('_ms'))} ms" for n in names)
    rows = []
    for record in found:
        cells = (record["split"].get(name) for name in names)
        rows.append(
            f"<tr><td>{html.escape(str(record.get('name', '?')))}"
            + "".join(f"<td>{'' if v is None else format(v, '.1f')}" for v in cells)
        )
    title = "<h2>time to the first token</h2>"
    return f"{title}<table><tr><th>bundle{head}\n" + "\n".join(rows) + "</table>"


def _picture(path: Path) -> str:
    """A picture as part of the page. Raises: OSError, UsageError."""
    content = path.read_bytes()
    for start, kind in _PICTURES.items():
        if content.startswith(start):
            data = base64.b64encode(content).decode()
            return f"<img alt='{html.escape(path.name)}' src='data:{kind};base64,{data}'>"
    raise UsageError("a report shows PNG and JPEG only", where=str(path))


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
