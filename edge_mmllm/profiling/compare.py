"""Two sets of results: did anything change, and is it a regression?

Tests are paired by bundle name, test and threads. Several results of one test in a file are its
rounds (`bench --rounds`): processes at different times, which the interval knows apart. A change
is real where its 95 % bootstrap interval leaves out zero **and** it is larger than what two runs
of the same bundle differ by on a quiet machine (2 %); it is a regression where it is real, for the
worse, and larger than the threshold.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from edge_mmllm.errors import UsageError
from edge_mmllm.profiling.results import Result, read_results
from edge_mmllm.profiling.stats import median, ratio_interval

Verdict = Literal["no difference", "better", "worse", "regression", "unknown"]

#: Field -> (title, whether more is better, whether it can be a regression).
METRICS: dict[str, tuple[str, bool, bool]] = {
    "decode_tokens_per_s": ("decode tokens/s", True, True),
    "prefill_tokens_per_s": ("prefill tokens/s", True, True),
    "ttft_ms": ("first token ms", False, True),
    "itl_ms_p50": ("between tokens p50 ms", False, False),
    "itl_ms_p99": ("between tokens p99 ms", False, False),
    "load_ms": ("load ms", False, False),
    "peak_rss_bytes": ("peak RSS bytes", False, True),
    "size_bytes": ("bundle bytes", False, True),
}

#: Below this, two runs differ by how the machine happened to be.
_FLOOR = 0.02
DEFAULT_THRESHOLD = 0.05


@dataclass(frozen=True)
class Change:
    """One figure of one test.

    Attributes:
        name, test: of the bundle and the test.
        metric: a key of `METRICS`.
        before, after: medians.
        change: after / before - 1.
        interval: 95 % confidence interval of `change`; None with fewer than 3 repetitions: then
            its size alone decides.
        verdict: `regression` only for figures that can be one.
        noisy: whether either side was flagged.
    """

    name: str
    test: str
    metric: str
    before: float
    after: float
    change: float
    interval: tuple[float, float] | None
    verdict: Verdict
    noisy: bool


@dataclass(frozen=True)
class Comparison:
    """All changes, and the tests that only one side has."""

    changes: tuple[Change, ...]
    only_before: tuple[str, ...]
    only_after: tuple[str, ...]
    threshold: float

    @property
    def regressions(self) -> tuple[Change, ...]:
        """The changes for the worse that count."""
        return tuple(c for c in self.changes if c.verdict == "regression")

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "regressions": len(self.regressions)}


def compare(
    before: str | os.PathLike[str],
    after: str | os.PathLike[str],
    *,
    threshold: float = DEFAULT_THRESHOLD,
) -> Comparison:
    """Compares two files of results.

    Args:
        threshold: share from which a change for the worse is a regression.

    Raises:
        UsageError: see `read_results`; no test that both have; a threshold that is none.
    """
    if not 0 < threshold < 10:
        raise UsageError("not a threshold", expected="e.g. 5%", found=str(threshold))
    sides = [_grouped(read_results([path])) for path in (before, after)]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        raise UsageError(
            "the files have no test in common",
            expected="the same bundle names and token counts",
            found=f"{_some(sides[0])} against {_some(sides[1])}",
        )
    changes = [
        change
        for key in common
        for metric in METRICS
        if (change := _change(key, metric, sides[0][key], sides[1][key], threshold)) is not None
    ]
    return Comparison(
        tuple(changes),
        tuple(_called(key) for key in sides[0] if key not in sides[1]),
        tuple(_called(key) for key in sides[1] if key not in sides[0]),
        threshold,
    )


_Key = tuple[str, str, str]


def _grouped(results: Sequence[Result]) -> dict[_Key, list[Result]]:
    groups: dict[_Key, list[Result]] = {}
    for result in results:
        if not result.failed:
            key = (result.name, result.test, result.text("threads"))
            groups.setdefault(key, []).append(result)
    return groups


def _change(
    key: _Key, metric: str, before: Sequence[Result], after: Sequence[Result], threshold: float
) -> Change | None:
    runs = [[v for r in side if (v := r.values(metric))] for side in (before, after)]
    a, b = ([value for values in side for value in values] for side in runs)
    if not a or not b or not median(a):
        return None
    change = median(b) / median(a) - 1
    interval = ratio_interval(*runs)
    _, more_is_better, judged = METRICS[metric]
    noisy = any(result.rows("noise") for result in (*before, *after))
    verdict = judge(
        change, interval, more_is_better=more_is_better, threshold=threshold if judged else None
    )
    name = f"{key[1]}, {key[2]} threads"
    return Change(key[0], name, metric, median(a), median(b), change, interval, verdict, noisy)


def judge(
    change: float,
    interval: tuple[float, float] | None,
    *,
    more_is_better: bool,
    threshold: float | None,
) -> Verdict:
    """What a change means; see the top. `threshold` None: never a regression."""
    if interval is not None and interval[0] <= 0 <= interval[1]:
        return "no difference"
    if abs(change) < _FLOOR:
        return "no difference"
    if (change > 0) is more_is_better:
        return "better"
    return "regression" if threshold is not None and abs(change) >= threshold else "worse"


def _called(key: _Key) -> str:
    return f"{key[0]} ({key[1]}, {key[2]} threads)"


def _some(groups: dict[_Key, list[Result]]) -> str:
    return ", ".join(_called(key) for key in list(groups)[:3]) or "nothing"
