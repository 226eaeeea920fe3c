"""Tokens as they come from callers: checked before anything is done with them."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from edge_mmllm.errors import UsageError
from edge_mmllm_runtime.engine import Float32, Int64


def checked_ids(ids: Any, vocab_size: int) -> Int64:
    """Token ids as int64 `(n,)`.

    Raises:
        UsageError: empty, not integers, or outside the vocabulary.
    """
    if isinstance(ids, np.ndarray):
        if ids.dtype.kind not in "iu" or ids.ndim != 1:
            raise UsageError(
                "token ids must be integers in one dimension",
                found=f"{ids.dtype} {ids.shape}",
            )
        values = ids
    else:
        try:
            values = np.array([_index(i) for i in ids], dtype=np.int64)
        except (TypeError, OverflowError) as error:
            raise UsageError("token ids must be integers", found=str(error)) from error
    if not values.size:
        raise UsageError("no tokens given", expected="at least one token")
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= vocab_size:
        raise UsageError(
            "a token id is outside the vocabulary",
            expected=f"0 to {vocab_size - 1}",
            found=str(low if low < 0 else high),
        )
    return np.ascontiguousarray(values, np.int64)


def checked_rows(rows: Any, total: int) -> Int64:
    """Which of `total` tokens' logits are wanted, int64 `(n,)`. Raises: UsageError."""
    try:
        found = np.asarray(rows)
    except (ValueError, TypeError, OverflowError):
        found = np.empty((0, 0))
    good = found.ndim == 1 and found.size > 0 and found.dtype.kind in "iu"
    if not good or found.min() < 0 or found.max() >= total:
        raise UsageError(
            "unknown value of logits",
            expected=f"last, all, or positions from 0 to {total - 1} in what is read",
            found=repr(rows)[:80],
        )
    return found.astype(np.int64)


def checked_embeddings(x: Float32, hidden_size: int) -> Float32:
    """Embeddings as float32 `(n, hidden)`.

    Raises:
        UsageError: empty, or a wrong shape.
    """
    if x.ndim != 2 or x.shape[1] != hidden_size or not len(x):
        raise UsageError(
            "embeddings of a wrong shape", expected=f"(n >= 1, {hidden_size})", found=str(x.shape)
        )
    return np.ascontiguousarray(x, np.float32)


def check_positions(positions: Sequence[int] | Int64 | None, start: int, count: int) -> None:
    """Raises `UsageError` unless `positions` is None or the `count` numbers from `start` on."""
    if positions is None:
        return
    if not np.array_equal(np.asarray(positions), np.arange(start, start + count)):
        raise UsageError(
            "this bundle takes sequential positions only",
            expected=f"{start} to {start + count - 1}",
            fix="leave positions out",
        )


def _index(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError("a bool")
    return operator.index(value)


def common_prefix(a: Sequence[int] | Int64, b: Sequence[int] | Int64) -> int:
    """How many leading ids two sequences share."""
    shared = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:shared]) != np.asarray(b[:shared]))
    return int(differ[0]) if differ.size else shared
