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
    drawn = _resampled((ordered,), lambda s: (statistic or median)(s[0]), confidence, seed)
    return None if len(ordered) < 3 else drawn


def ratio_interval(
    before: Iterable[float], after: Iterable[float], *, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float] | None:
    """The same for `median(after) / median(before) - 1`, both sides drawn anew; None where a side
    has fewer than 3 values, or a median of 0. Raises: UsageError, as `bootstrap_interval`."""
    sides = _ordered(before), _ordered(after)
    if min(map(len, sides)) < 3 or min(map(abs, sides[0])) == 0:
        return None
    return _resampled(sides, lambda s: median(s[1]) / median(s[0]) - 1, confidence, seed)


def _resampled(
    samples: Sequence[Sequence[float]],
    statistic: Callable[[Sequence[Sequence[float]]], float],
    confidence: float,
    seed: int,
) -> tuple[float, float]:
    if not 0 < confidence < 1:
        raise UsageError("not a confidence", expected="between 0 and 1", found=str(confidence))
    draw = random.Random(seed)  # noqa: S311 - no secret
    seen = [statistic([draw.choices(s, k=len(s)) for s in samples]) for _ in range(_RESAMPLES)]
    tail = 50 * (1 - confidence)
    return percentile(seen, tail), percentile(seen, 100 - tail)


def _ordered(values: Iterable[float]) -> list[float]:
    ordered = sorted(float(value) for value in values)
    if not ordered:
        raise UsageError("there are no measurements to summarize")
    if not all(map(math.isfinite, ordered)):
        raise UsageError("a measurement is not a finite number")
    return ordered
