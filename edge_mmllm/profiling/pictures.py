"""The figures of a report as PNG files, through matplotlib (`pip install 'edge-mmllm[png]'`)."""

from __future__ import annotations

import importlib
import os
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edge_mmllm.errors import MissingDependency
from edge_mmllm.profiling import charts
from edge_mmllm.profiling.figures import Bars, Figure, Lines, Scatter, Stacked, figures
from edge_mmllm.profiling.page import LIGHT
from edge_mmllm.profiling.results import Result

_WIDTH_IN, _ROW_IN, _DPI = 7.0, 0.42, 150
_DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 3)), (0, (9, 3, 2, 3)))


def write_pictures(folder: str | os.PathLike[str], results: Sequence[Result]) -> list[Path]:
    """Writes `decode.png`, `latency.png`, ...: one for each figure that the page would have.

    Args:
        folder: made where it is missing; files of the same names are replaced.

    Raises:
        MissingDependency: matplotlib is not installed.
        OSError: a file cannot be written.
    """
    try:
        agg: Any = importlib.import_module("matplotlib.backends.backend_agg")
        drawing: Any = importlib.import_module("matplotlib.figure")
    except ModuleNotFoundError as error:
        raise MissingDependency("matplotlib", "png") from error
    place, written = Path(folder), []
    place.mkdir(parents=True, exist_ok=True)
    for figure in figures(results):
        rows = len(figure.chart.rows) if isinstance(figure.chart, (Bars, Stacked)) else 0
        height = 1.6 + _ROW_IN * rows if rows else 4.6
        sheet = drawing.Figure(figsize=(_WIDTH_IN, height), dpi=_DPI, layout="constrained")
        agg.FigureCanvasAgg(sheet)
        sheet.suptitle(_plain(figure.title), x=0.01, ha="left", fontweight="bold")
        axes = sheet.add_subplot()
        _draw(axes, figure)
        if figure.legend:
            keys, words = axes.get_legend_handles_labels()
            sheet.legend(
                keys, words, loc="outside lower left", fontsize=7.5, frameon=False, ncols=4
            )
        written.append(place / f"{figure.name}.png")
        sheet.savefig(written[-1], format="png")
    return written


def _draw(axes: Any, figure: Figure) -> None:
    axes.set_title(textwrap.fill(_plain(figure.about), 100), loc="left", fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    chart = figure.chart
    if isinstance(chart, Bars):
        _bars(axes, chart)
    elif isinstance(chart, Stacked):
        _stacked(axes, chart)
    elif isinstance(chart, Lines):
        _lines(axes, chart)
    else:
        _scatter(axes, chart)


def _colour(number: int) -> str:
    return f"#{LIGHT[number % len(LIGHT)]}"


def _plain(words: str) -> str:
    """Text that matplotlib takes for text: `$` begins a formula."""
    return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in words).replace(
        "$", r"\$"
    )


def _rows(axes: Any, labels: Sequence[str], unit: str) -> None:
    axes.set_yticks(range(len(labels)), [_plain(label[:58]) for label in labels])
    axes.invert_yaxis()
    axes.set_xlabel(unit)


def _bars(axes: Any, chart: Bars) -> None:
    if charts.wide([row.value for row in chart.rows]):
        axes.set_xscale("log")
    for i, row in enumerate(chart.rows):
        axes.barh(i, row.value, height=0.55, color=_colour(row.colour))
        tip = row.value
        if row.low is not None and row.high is not None:
            axes.plot((row.low, row.high), (i, i), color="#1c2126", linewidth=1, marker="|")
            tip = max(tip, row.high)
        axes.annotate(charts.number(row.value), (tip, i), (5, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.margins(x=0.1)
    _rows(axes, [row.label for row in chart.rows], chart.unit)


def _stacked(axes: Any, chart: Stacked) -> None:
    named = set()
    for i, (_, parts) in enumerate(chart.rows):
        left = 0.0
        for name, colour, value in parts:
            key = None if name in named else _plain(name)
            named.add(name)
            axes.barh(i, value, left=left, height=0.55, color=_colour(colour), label=key)
            left += value
        axes.annotate(charts.number(left), (left, i), (5, 0), textcoords="offset points",
                      va="center", fontsize=8)  # fmt: skip
    axes.margins(x=0.1)
    _rows(axes, [name for name, _ in chart.rows], chart.unit)


def _lines(axes: Any, chart: Lines) -> None:
    for line in chart.series:
        axes.plot(
            [x for x, _ in line.points], [y for _, y in line.points], label=_plain(line.label),
            color=_colour(line.colour), linestyle=_DASHES[line.colour % len(_DASHES)],
            marker="o" if chart.marks else None, markersize=4,
        )  # fmt: skip
    if chart.log_x:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: charts.number(value))
    if charts.wide([y for line in chart.series for _, y in line.points]):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set(xlabel=chart.x_title, ylabel=chart.y_title)


def _scatter(axes: Any, chart: Scatter) -> None:
    for front in chart.fronts:
        axes.plot([x for x, _ in front], [y for _, y in front], "--", color="#5b6670", linewidth=1)
    for p in chart.points:
        axes.plot([p.x], [p.y], "o", color=_colour(p.colour), label=_plain(p.label))
    if charts.wide([p.y for p in chart.points]):
        axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set(xlabel=chart.x_title, ylabel=chart.y_title)
