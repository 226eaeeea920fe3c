"""Throughput over a long decode: whether the device keeps its speed when it grows hot."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_mmllm.profiling.sensors import ROOT, read_climate
from edge_mmllm.profiling.stats import median

if TYPE_CHECKING:
    from edge_mmllm_runtime.session import Session

#: Points of the curve at most, and the shortest time between two.
_POINTS, _SHORTEST_S = 120, 0.25


def sustained(
    session: Session, seconds: float, prompt_tokens: int, new_tokens: int, *, root: Path = ROOT
) -> dict[str, Any]:
    """Decodes for so long. A context of `prompt_tokens` grows by `new_tokens` and begins again,
    so that the work is the same all the time; reading the prompt is not counted.

    Returns:
        `points`: [seconds, tokens/s, degrees C or null, MHz or null]; `drop`: what the last fifth
        is slower than the first, as a share (negative: faster); `tokens`, `seconds`.
    """
    window = max(seconds / _POINTS, _SHORTEST_S)
    ids = [0] * prompt_tokens
    points: list[list[float | None]] = []
    clock = time.perf_counter
    started = clock()
    tokens, busy, total = 0, 0.0, 0
    left = 0
    while clock() - started < seconds:
        if left == 0:
            session.reset()
            session.prefill(ids)
            left = new_tokens
        begun = clock()
        session.step(0)
        busy += clock() - begun
        left -= 1
        tokens += 1
        if busy >= window:
            climate = read_climate(root)
            points.append(
                [clock() - started, tokens / busy, climate.temperature_c, climate.frequency_mhz]
            )
            total += tokens
            tokens, busy = 0, 0.0
    return {
        "points": points,
        "drop": drop([float(p[1] or 0) for p in points]),
        "tokens": total,
        "seconds": clock() - started,
    }


def drop(rates: list[float]) -> float | None:
    """1 - the last fifth's median over the first fifth's; None with fewer than 5 points."""
    fifth = len(rates) // 5
    if not fifth or not (first := median(rates[:fifth])):
        return None
    return 1 - median(rates[-fifth:]) / first
