"""Order statistics of repeated measurements.

Medians and quartiles, not means: on a shared machine a few runs are slow for reasons of others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
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


def _ordered(values: Iterable[float]) -> list[float]:
    ordered = sorted(float(value) for value in values)
    if not ordered:
        raise UsageError("there are no measurements to summarize")
    if not all(map(math.isfinite, ordered)):
        raise UsageError("a measurement is not a finite number")
    return ordered
