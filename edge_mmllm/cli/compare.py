"""`edge-mmllm compare`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import click

from edge_mmllm.cli._options import json_option
from edge_mmllm.cli._output import emit, grid, say

if TYPE_CHECKING:
    from edge_mmllm.profiling.compare import Change

    _FloatType = click.ParamType[float]
else:
    _FloatType = click.ParamType  # no generic class before click 8.2


class Percent(_FloatType):
    """`5%`, or `5`: percent, as a share."""

    name = "percent"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """A float passes; text is parsed."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*%?\s*", str(value))
        if match is None or not 0 < float(match[1]) < 1000:
            self.fail(f"{value!r} is not a percentage such as 5%", param, ctx)
        return float(match[1]) / 100


@click.command("compare")
@click.argument("before", metavar="BEFORE")
@click.argument("after", metavar="AFTER")
@click.option("--fail-on-regression", "threshold", type=Percent(), metavar="PERCENT",
              help="Exit with status 1 where a figure is worse by more than this.")  # fmt: skip
@json_option
def command(before: str, after: str, threshold: float | None, as_json: bool) -> None:
    """Compare two files of results: what changed, and is it a regression?

    A change counts where its 95 % confidence interval leaves out zero and it is above 2 %. Without
    --fail-on-regression, 5 % for the worse is called a regression, and the status is 0.
    """
    from edge_mmllm.profiling.compare import DEFAULT_THRESHOLD, compare

    found = compare(before, after, threshold=threshold or DEFAULT_THRESHOLD)
    if as_json:
        emit(found.to_json())
    else:
        heads = (
            "bundle",
            "test",
            "figure",
            "before",
            "after",
            "change",
            "95 % interval",
            "verdict",
        )
        grid(heads, [_row(change) for change in found.changes])
        for what, names in (("before", found.only_before), ("after", found.only_after)):
            for name in names:
                say(f"only {what}: {name}")
        worst = len(found.regressions)
        say(f"{worst} regression{'' if worst == 1 else 's'}" if worst else "no regression")
    if threshold is not None and found.regressions:
        sys.exit(1)


def _row(c: Change) -> tuple[str, ...]:
    from edge_mmllm.profiling.compare import METRICS

    between = "one value" if c.interval is None else f"{c.interval[0]:+.1%} to {c.interval[1]:+.1%}"
    verdict = f"{c.verdict} (noisy)" if c.noisy else c.verdict
    figures = (f"{c.before:,.5g}", f"{c.after:,.5g}", f"{c.change:+.1%}", between)
    return (c.name, c.test, METRICS[c.metric][0], *figures, verdict)
