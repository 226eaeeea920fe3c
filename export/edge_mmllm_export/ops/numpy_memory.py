"""The oracle's ops over memories. See `memory.MemoryOps` for what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.memory import Blind, RelativeBias

Array = NDArray[Any]


class NumpyMemory:
    """The part of `NumpyOps` that reads and fills memories."""

    states: dict[str, Array]
    position: int

    def remember(self, x: Array, state: StateSpec) -> None:
        self.states[state.name] = x.reshape(len(x), state.shape[1], -1).transpose(1, 0, 2)[None]

    def remember_span(self, x: Array, span: Array, state: StateSpec) -> None:
        self.states[state.name] = np.tile(span.astype(np.int64), (1, len(x), 1))

    def cross_attention(
        self,
        q: Array,
        k_state: StateSpec,
        v_state: StateSpec,
        *,
        heads: int,
        scale: float,
        span: StateSpec | None = None,
        blind: Blind = "nothing",
    ) -> Array:
        k, v = self.states[k_state.name][0], self.states[v_state.name][0]
        seen = np.ones((len(q), k.shape[1]), bool) if span is None else self._seen(q, span)
        if blind == "all":
            seen[~seen.any(axis=1)] = True
        y = np.zeros(q.shape, np.float32)
        some = seen.any(axis=1)
        d, share = q.shape[1] // heads, heads // len(k)
        for h in range(heads if some.any() else 0):
            own = slice(h * d, (h + 1) * d)
            scores = q[some, own] @ k[h // share].T * np.float32(scale)
            scores[~seen[some]] = -np.inf
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            y[some, own] = scores / scores.sum(axis=-1, keepdims=True) @ v[h // share]
        return y

    def sees(self, x: Array, span: StateSpec) -> Array:
        return np.asarray(self._seen(x, span).any(axis=1, keepdims=True), np.float32)

    def _seen(self, x: Array, span: StateSpec) -> Array:
        """Which rows each token of x sees: `(seq, rows)`."""
        own = np.arange(self.position, self.position + len(x))[:, None]
        first, end = self.states[span.name][0].T
        return np.asarray((own >= first) & (own < end))

    def relative_bias(self, x: Array, bias: RelativeBias) -> Array:
        return distance_bias(bias, np.arange(len(x)), np.arange(len(x)))


def distance_bias(bias: RelativeBias, queries: Array, keys: Array) -> Array:
    """`(heads, queries, keys)` for positions of queries and keys."""
    limit = bias.max_distance
    ahead = keys[None, :] - queries[:, None]
    index = np.clip(ahead, -limit, limit if bias.both_ways else 0) + limit
    return bias.by_distance()[:, index]
