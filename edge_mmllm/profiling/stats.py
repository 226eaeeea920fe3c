"""Order statistics of repeated measurements.

Medians and quartiles, not means: on a shared machine a few runs are slow for reasons of others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from edge_mmllm.errors import UsageError


@dataclass(frozen=True)
class Summary:
    """What a set of repeated measurements says. All in the measurements' own unit.

    Attributes:
        count: how many.
        median, minimum, maximum: of the values.
        iqr: 75th minus 25th percentile.
        spread: `iqr / |median|`, without unit; None where the median is 0.
    """

    count: int
    median: float
    minimum: float
    maximum: float
    iqr: float
    spread: float | None


def percentile(values: Iterable[float], percent: float) -> float:
    """The value that `percent` % of `values` do not exceed, interpolated linearly.

    The same as `numpy.percentile` with its default method.

    Raises:
        UsageError: no values, one that is not finite, or `percent` outside [0, 100].
    """
    ordered = _ordered(values)
    if not 0 <= percent <= 100:
        raise UsageError("not a percentage", expected="0 to 100", found=str(percent))
    position = (len(ordered) - 1) * percent / 100
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def median(values: Iterable[float]) -> float:
    """The middle value. Raises: UsageError, as `percentile`."""
    return percentile(values, 50)


def iqr(values: Iterable[float]) -> float:
    """The width of the middle half. Raises: UsageError, as `percentile`."""
    ordered = _ordered(values)
    return percentile(ordered, 75) - percentile(ordered, 25)


def spread(values: Iterable[float]) -> float | None:
    """`iqr / |median|`; None where the median is 0. Raises: UsageError, as `percentile`."""
    ordered = _ordered(values)
    middle = median(ordered)
    return iqr(ordered) / abs(middle) if middle else None


def summarize(values: Iterable[float]) -> Summary:
    """All of the above. Raises: UsageError, as `percentile`."""
    ordered = _ordered(values)
    return Summary(
        count=len(ordered),
        median=median(ordered),
        minimum=ordered[0],
        maximum=ordered[-1],
        iqr=iqr(ordered),
        spread=spread(ordered),
    )


#: Resamples of a bootstrap. The ends of a 95 % interval are then the 50th of 2000 at each side.
_RESAMPLES = 2000


def bootstrap_interval(
    values: Iterable[float],
    statistic: Callable[[Sequence[float]], float] | None = None,
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """A percentile bootstrap confidence interval of a statistic of repeated measurements.

    With five values it is a rough one: its ends can only be values that were seen.

    Args:
        values: one for each repetition.
        statistic: None for the median.
        confidence: between 0 and 1.
        seed: of the resampling; the same values give the same interval.

    Returns:
        Its ends; None with fewer than 3 values.

    Raises:
        UsageError, as `percentile`; a confidence outside (0, 1).

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, chapter 13.3.
    """
    ordered = _ordered(values)
    of, draw = statistic or median, random.Random(seed)  # noqa: S311 - no secret
    seen = [of(draw.choices(ordered, k=len(ordered))) for _ in range(_RESAMPLES)]
    ends = _tails(seen, confidence)
    return None if len(ordered) < 3 else ends


def ratio_interval(
    before: Sequence[Sequence[float]],
    after: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, float] | None:
    """The same for `median(after) / median(before) - 1`, each side a list of processes' values.

    Values of one process are alike: what the machine did while it ran hit all of them. So
    processes are drawn anew, then the values within each (a two-stage bootstrap). One process a
    side gives the plain interval, which knows nothing of how processes differ.

    Returns:
        Its ends; None where a side has fewer than 3 values in all, or one of 0.

    Raises:
        UsageError: as `bootstrap_interval`; a process without values.

    Source: Davison and Hinkley, Bootstrap Methods and their Application, section 3.8.
    """
    sides = [[_ordered(values) for values in side] for side in (before, after)]
    pooled = [[value for values in side for value in values] for side in sides]
    if min(map(len, pooled)) < 3 or min(map(abs, pooled[0])) == 0:
        return None
    draw = random.Random(seed)  # noqa: S311 - no secret

    def drawn(side: Sequence[Sequence[float]]) -> float:
        chosen = draw.choices(side, k=len(side)) if len(side) > 1 else side
        return median(v for values in chosen for v in draw.choices(values, k=len(values)))

    ratios = [drawn(sides[1]) / drawn(sides[0]) - 1 for _ in range(_RESAMPLES)]
    return _tails(ratios, confidence)


def _tails(seen: Sequence[float], confidence: float) -> tuple[float, float]:
    """The ends that leave out as much at each side."""
    if not 0 < confidence < 1:
        raise UsageError("not a confidence", expected="between 0 and 1", found=str(confidence))
    tail = 50 * (1 - confidence)
    return percentile(seen, tail), percentile(seen, 100 - tail)


def _ordered(values: Iterable[float]) -> list[float]:
    ordered = sorted(float(value) for value in values)
    if not ordered:
        raise UsageError("there are no measurements to summarize")
    if not all(map(math.isfinite, ordered)):
        raise UsageError("a measurement is not a finite number")
    return ordered
