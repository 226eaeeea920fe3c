"""The part of `RelaxOps` for memories and T5's distances. See `memory.MemoryOps` for what the ops
compute.

A function that fills cross_kv states gives them as results; every step reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Generic, TypeVar, cast

import numpy as np
from numpy.typing import NDArray
from tvm import relax, te, tirx

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops import relax_attention
from edge_mmllm_export.ops.memory import Blind, RelativeBias
from edge_mmllm_export.ops.relax_build import arg, build, parallel, put, serial
from edge_mmllm_export.ops.relax_missing import missing
from edge_mmllm_export.weights import Weight

#: A Relax variable, `(seq, width)` float32 (tvm ships no type hints).
Value = Any
T = TypeVar("T")


class RelaxMemory(Generic[T]):
    """Needs `_call` and `_of` of `RelaxOps`.

    Attributes:
        remembered: state -> its new value `(1, heads, rows, d)`, of those filled so far.
    """

    _states: Mapping[str, Value]
    remembered: dict[str, Value]
    _distances: dict[str, Value]

    def _call(self, kernel: Any, name: str, inputs: list[Value], types: list[Any]) -> list[Value]:
        raise NotImplementedError

    def _of(self, w: Weight, layout: str | None = None) -> Value:
        raise NotImplementedError

    def remember(self, x: Value, state: StateSpec) -> None:
        _, heads, _, d = state.shape
        result = relax.TensorType((1, heads, x.ty.shape[0], d), "float32")
        self.remembered[state.name] = self._call(remember(heads, d), "remember", [x], [result])[0]

    def cross_attention(
        self,
        q: Value,
        k_state: StateSpec,
        v_state: StateSpec,
        *,
        heads: int,
        scale: float,
        span: StateSpec | None = None,
        blind: Blind = "nothing",
    ) -> Value:
        if span is not None:
            missing("cross_attention with spans")
        _, kv_heads, _, d = k_state.shape
        kernel = relax_attention.full(heads, kv_heads, d, scale, bias=False, stored=True)
        inputs = [q, self._states[k_state.name], self._states[v_state.name]]
        result = relax.TensorType((q.ty.shape[0], heads * d), "float32")
        return self._call(kernel, "cross_attention", inputs, [result])[0]

    def relative_bias(self, x: Value, bias: RelativeBias) -> Value:
        heads, seq = bias.table.shape[1], x.ty.shape[0]
        kernel = spread(heads, bias.max_distance, both_ways=bias.both_ways)
        result = relax.TensorType((heads, seq, seq), "float32")
        return self._call(kernel, "relative_bias", [self._by_distance(bias)], [result])[0]

    def _by_distance(self, bias: RelativeBias) -> Value:
        """`RelativeBias.by_distance` at run time: `(heads, n)`; layers share it."""
        if bias.table.name not in self._distances:
            buckets, heads = bias.table.shape
            index = _buckets(bias)
            kernel = gather(buckets, heads, index.size)
            inputs = [self._of(bias.table), relax.const(index, "int64")]
            result = relax.TensorType((heads, index.size), "float32")
            (found,) = self._call(kernel, "distances", inputs, [result])
            self._distances[bias.table.name] = found
        return self._distances[bias.table.name]


@dataclass(frozen=True)
class _Numbers:
    """A table whose rows are their own numbers."""

    shape: tuple[int, int]

    @property
    def values(self) -> NDArray[np.float32]:
        return np.arange(self.shape[0], dtype=np.float32)[:, None]


def _buckets(bias: RelativeBias) -> NDArray[np.int64]:
    """The bucket of each entry of `by_distance`."""
    numbers = cast("Weight", _Numbers((bias.table.shape[0], 1)))
    return np.asarray(replace(bias, table=numbers).by_distance()[0], np.int64)


@cache
def remember(heads: int, d: int) -> Any:
    """x `(rows, heads * d)` -> `(1, heads, rows, d)`."""

    def body() -> None:
        rows = tirx.Var("rows", "int64")
        x, output = arg("x", (rows, heads * d)), arg("output", (1, heads, rows, d))
        with parallel(rows) as t, serial(heads) as h, serial(d) as i:
            put(output, (0, h, t, i), x[t, h * d + i])

    return build("remember", body)


@cache
def gather(buckets: int, heads: int, count: int) -> Any:
    """table `(buckets, heads)`, index int64 `(n,)` -> `(heads, n)`."""

    def body() -> None:
        table, index = arg("table", (buckets, heads)), arg("index", (count,), "int64")
        output = arg("output", (heads, count))
        with serial(heads) as h, serial(count) as i:
            put(output, (h, i), table[index[i], h])

    return build("distances", body)


@cache
def spread(heads: int, limit: int, *, both_ways: bool) -> Any:
    """Biases by distance -> `(heads, seq, seq)`, of each query and key."""

    def body() -> None:
        seq = tirx.Var("seq", "int64")
        count = 2 * limit + 1 if both_ways else limit + 1
        table, output = arg("table", (heads, count)), arg("output", (heads, seq, seq))
        with serial(heads) as h, parallel(seq) as q, serial(seq) as k:
            ahead = te.max(k - q, tirx.const(-limit, "int64"))
            ahead = te.min(ahead, tirx.const(limit if both_ways else 0, "int64"))
            put(output, (h, q, k), table[h, ahead + limit])

    return build("relative_bias", body)
