"""Reports from results: one HTML page, or Markdown for a README."""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.charts import text
from edge_mmllm.profiling.page import page
from edge_mmllm.profiling.results import Result, read_results
from edge_mmllm.profiling.view import COLUMNS, SHORT, devices, gates

#: First bytes of a picture's file -> its media type.
_PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg"}
#: What Markdown, or the HTML in it, would take for more than text.
_SPECIAL = str.maketrans(
    {c: f"\\{c}" for c in "\\`*_[]|"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}
)

TITLE = "edge-mmllm results"


def report(
    paths: Sequence[str | os.PathLike[str]],
    *,
    html: str | os.PathLike[str] | None = None,
    markdown: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
    title: str = TITLE,
) -> list[Result]:
    """Reads files of results and writes what is asked for.

    Args:
        paths: JSONL of `bench --out`, its `--json`, or llama-bench's JSON.
        html, markdown: files to write; replaced where they exist.
        png: a folder for the figures as PNG files, see `pictures.write_pictures`.

    Returns:
        The results.

    Raises:
        UsageError: see `results.read_results`; a file to write that is one of those to read.
        MissingDependency: `png` without matplotlib.
        OSError: a file cannot be written.
    """
    read = {Path(path).resolve() for path in paths}
    for out in (html, markdown):
        if out is not None and Path(out).resolve() in read:
            raise UsageError("the report would replace its own results", where=str(out))
    results = read_results(paths)
    if html is not None:
        Path(html).write_text(page(title, results), encoding="utf-8")
    if markdown is not None:
        Path(markdown).write_text(to_markdown(title, results), encoding="utf-8")
    if png is not None:
        from edge_mmllm.profiling.pictures import write_pictures

        write_pictures(png, results)
    return results


def write_html(
    path: str | os.PathLike[str],
    title: str,
    records: Sequence[Mapping[str, Any]],
    *,
    notes: Sequence[tuple[str, str]] = (),
    pictures: Mapping[str, str | os.PathLike[str]] | None = None,
) -> None:
    """Write a page of records that are in memory.

    Args:
        records: benchmark records with a `name`; fields they lack read "not measured".
        notes: (heading, text) blocks shown below the figures, e.g. answers given.
        pictures: heading of a note -> a PNG or JPEG file, which the page takes in.

    Raises:
        OSError: a picture cannot be read.
        UsageError: it is neither PNG nor JPEG.
    """
    extra = []
    for heading, words in notes:
        extra.append(f"<h2>{text(heading)}</h2>")
        if heading in (pictures or {}):
            extra.append(_picture(Path((pictures or {})[heading])))
        extra.append("<pre>" + "\n".join(map(text, words.splitlines())) + "</pre>")
    results = [Result(record, f"record {i}") for i, record in enumerate(records, 1)]
    Path(path).write_text(page(title, results, extra), encoding="utf-8")


def to_markdown(title: str, results: Sequence[Result]) -> str:
    """Tables for a README."""
    columns = [c for c in COLUMNS if c.title in SHORT]
    rows = [["bundle", *[c.title for c in columns]]]
    rows += [[r.name, *[c.cell(r) for c in columns]] for r in results]
    parts = [f"# {_plain(title)}", _markdown_table(rows)]
    noisy = [r for r in results if r.rows("noise")]
    if noisy:
        lines = "\n".join(
            f"- {_plain(r.name)}, {_plain(r.test)}: "
            + "; ".join(_plain(str(x)[:200]) for x in r.rows("noise"))
            for r in noisy
        )
        parts.append("Noisy runs:\n\n" + lines)
    told = gates(results)
    if told:
        titles = list(dict.fromkeys(t for _, _, figures in told for t in figures))
        verdicts = [["bundle", "quality gate", *titles]]
        verdicts += [[name, verdict, *[f.get(t, "") for t in titles]] for name, verdict, f in told]
        parts.append(_markdown_table(verdicts))
    for lines, fields in devices(results):
        said = "; ".join(f"{_plain(name)}: {_plain(value)}" for name, value in fields)
        parts.append(f"Device of {_plain(lines)}: {said}.")
    return "\n\n".join(parts) + "\n"


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(map(_plain, row)) + " |" for row in rows]
    lines.insert(
        1, "|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(rows[0]))) + "|"
    )
    return "\n".join(lines)


def _plain(value: str) -> str:
    """Text that Markdown shows as it is."""
    kept = "".join(c if c.isprintable() else "\ufffd" for c in value)
    return kept.translate(_SPECIAL)


def _picture(path: Path) -> str:
    """A picture as part of the page. Raises: OSError, UsageError."""
    content = path.read_bytes()
    for start, kind in _PICTURES.items():
        if content.startswith(start):
            data = base64.b64encode(content).decode()
            return f"<img alt='{text(path.name)}' src='data:{kind};base64,{data}'>"
    raise UsageError("a report shows PNG and JPEG only", where=str(path))
