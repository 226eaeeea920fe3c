"""What the commands print: JSON for machines on stdout, tables and progress on stderr."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]

#: Control characters but tab and newline: a hostile name must not drive the terminal.
_CONTROLS = {c: "\ufffd" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n"}

#: Columns of a table that goes to a file.
_WIDTH = 160


def printable(text: str) -> str:
    """`text` with control characters (escape sequences among them) replaced."""
    return text.translate(_CONTROLS)


def say(message: str) -> None:
    """A line on stderr."""
    click.echo(printable(message).encode("utf-8", "replace"), err=True)


def emit(document: Any) -> None:
    """The one JSON document of a `--json` run: one ASCII line on stdout."""
    click.echo(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    """JSON knows neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size_text(size_bytes: int | None) -> str:
    """Bytes for people: `512 B`, `3.2 MiB`."""
    if size_bytes is None:
        return "unknown"
    if size_bytes < 1024:
        return f"{size_bytes} B"
    value = float(size_bytes)
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        value /= 1024
        if value < 1024 or unit == "TiB":
            break
    return f"{value:.1f} {unit}"


def console() -> Console:
    """The console on stderr; no markup, as names may hold brackets."""
    from rich.console import Console

    made = Console(stderr=True, markup=False, highlight=False)
    if not made.is_terminal:
        made = Console(stderr=True, markup=False, highlight=False, width=_WIDTH)
    return made


def table(rows: Sequence[tuple[str, object]], title: str | None = None) -> None:
    """Names and values on stderr; a value of None is left out."""
    from rich.table import Table

    shown = Table.grid(padding=(0, 2))
    shown.add_column(style="bold", no_wrap=True)
    shown.add_column(overflow="fold")
    for name, value in rows:
        if value is not None:
            shown.add_row(printable(name), printable(str(value)))
    target = console()
    if title:
        target.print(printable(title), style="bold")
    target.print(shown)


def grid(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table with a head on stderr; columns of numbers to the right."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        number = bool(rows) and all(isinstance(row[i], (int, float)) for row in rows)
        shown.add_column(head, justify="right" if number else "left", overflow="fold")
    for row in rows:
        shown.add_row(*(printable(str(cell)) for cell in row))
    console().print(shown)


@contextmanager
def progress_bars(*, shown: bool = True, transient: bool = False) -> Iterator[Progress]:
    """A bar for each phase that is reported with (phase, done, total), on a terminal only.

    Nothing is printed before the first report. Stdout is left alone.

    Args:
        shown: whether to show anything.
        transient: whether the bars vanish in the end.
    """
    target = console() if shown and sys.stderr.isatty() else None
    if target is None:
        yield lambda phase, done, total: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    bars = Progress(
        *columns,
        console=target,
        transient=transient,
        redirect_stdout=False,
        redirect_stderr=False,
    )
    tasks: dict[str, Any] = {}

    def report(phase: str, done: int, total: int) -> None:
        if phase not in tasks:
            bars.start()
            # A single step says nothing about its progress: let the bar pulse.
            tasks[phase] = bars.add_task(printable(phase), total=total if total > 1 else None)
        bars.update(tasks[phase], completed=done, total=total if total > 1 or done else None)

    try:
        yield report
    finally:
        if tasks:
            bars.stop()
