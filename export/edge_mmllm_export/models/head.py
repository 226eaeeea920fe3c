"""The end of a language model with RMS norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Weight

T = TypeVar("T")


def logits(
    op: Ops[T], w: Mapping[str, Weight], x: T, delta: T | None, *, eps: float, tied: bool
) -> T:
    """Residual stream `(seq, hidden)` and what the last block adds to it, None where it is added
    already -> logits `(rows, vocab)` of the rows that are asked for."""
    x = op.logit_rows(x)
    delta = op.logit_rows(delta) if delta is not None else None
    _, x = op.add_norm(x, delta, w["norm"], eps=eps)
    return op.linear(x, w["embed"] if tied else w["head"])[0]
