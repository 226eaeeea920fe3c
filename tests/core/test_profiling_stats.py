"""Order statistics, against numpy."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.stats import Summary, iqr, median, percentile, spread, summarize


def test_percentiles_equal_numpys() -> None:
    draw = random.Random(5)
    for count in range(1, 12):
        values = [draw.uniform(-10, 10) for _ in range(count)]
        for percent in (0, 1, 25, 50, 90, 99, 100):
            assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_a_summary() -> None:
    assert summarize([4, 1, 3, 2, 100]) == Summary(
        count=5, median=3, minimum=1, maximum=100, iqr=2, spread=2 / 3
    )
    assert (median([1, 2]), iqr([1, 2, 3, 4, 5]), spread([7, 7])) == (1.5, 2, 0)


def test_an_outlier_moves_neither_median_nor_spread() -> None:
    quiet, noisy = summarize([10, 10, 11, 11, 12]), summarize([10, 10, 11, 11, 900])
    assert (quiet.median, quiet.spread) == (noisy.median, noisy.spread)


def test_spread_of_a_median_of_zero_is_unknown() -> None:
    assert summarize([-1, 0, 1]).spread is None
    assert summarize([-2, -2, -2]).spread == 0


@pytest.mark.parametrize("values", [[], [1, math.nan], [math.inf]])
def test_what_cannot_be_summarized(values: list[float]) -> None:
    with pytest.raises(UsageError):
        summarize(values)


@pytest.mark.parametrize("percent", [-1, 101, math.nan])
def test_a_percentage_lies_between_0_and_100(percent: float) -> None:
    with pytest.raises(UsageError, match="percentage"):
        percentile([1], percent)
