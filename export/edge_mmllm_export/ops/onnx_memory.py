"""How the ops over memories become ONNX. See `memory.MemoryOps` for what they do.

MultiHeadAttention takes a memory's keys and values as they lie in the state, `(1, heads, rows, d)`.
Measured with onnxruntime 1.32, two cores of a Zen 4, 32 heads of 64: 0.19 ms for one query over 512
rows (0.18 by MatMul and Softmax), 0.8 over 1601 (1.1), 5.7 for 32 queries over 512 (10.3).

A bias by distance goes into GroupQueryAttention (`attention_bias`), which still appends in place:
0.08 ms for one query over 128 tokens with and without it (MultiHeadAttention with past 0.11), 0.27
over 511 (0.75, for it copies the past), 36 for a prefill of 256 (36; 30 without a bias).
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.memory import Blind, RelativeBias
from edge_mmllm_export.ops.onnx_graph import GraphBuilder
from edge_mmllm_export.ops.onnx_values import Value
from edge_mmllm_export.ops.onnx_weights import WeightStore

#: Added to scores of what is not seen: its exponential is 0, and a row of it alone no NaN.
_NOTHING = -1e30


class _Builder(Protocol):
    """What these ops need of `OnnxOps`."""

    graph: GraphBuilder
    weights: WeightStore

    #: Values that are made once a graph, by what they are.
    _shared: dict[str, str]

    def _use(self, x: Value) -> str: ...


class OnnxMemory:
    """The part of `OnnxOps` that reads and fills memories."""

    def remember(self: _Builder, x: Value, state: StateSpec) -> None:
        g, heads = self.graph, state.shape[1]
        apart = g.node("Reshape", [self._use(x), g.ints(0, 0, heads, x.width // heads)])[0]
        g.node("Transpose", [apart], [f"next.{state.name}"], perm=[0, 2, 1, 3])

    def remember_span(self: _Builder, x: Value, span: Value, state: StateSpec) -> None:
        g = self.graph
        count = g.node("Shape", [self._use(x)], start=1, end=2)[0]
        shape = g.node("Concat", [g.ints(1), count, g.ints(2)], axis=0)[0]
        g.node("Expand", [span.name, shape], [f"next.{state.name}"])

    def cross_attention(
        self: _Builder,
        q: Value,
        k_state: StateSpec,
        v_state: StateSpec,
        *,
        heads: int,
        scale: float,
        span: StateSpec | None = None,
        blind: Blind = "nothing",
    ) -> Value:
        """Where a head of the memory serves several of q's, those become further rows of it, so
        that the memory is not copied."""
        g, kv_heads, d = self.graph, k_state.shape[1], q.width // heads
        name, share = self._use(q), heads // k_state.shape[1]
        if share > 1:
            apart = g.node("Reshape", [name, g.ints(0, 0, kv_heads, share, d)])[0]
            apart = g.node("Transpose", [apart], perm=[0, 1, 3, 2, 4])[0]
            name = g.node("Reshape", [apart, g.ints(0, -1, kv_heads * d)])[0]
        inputs = [name, f"state.{k_state.name}", f"state.{v_state.name}"]
        if span is not None:
            inputs += ["", "", _hidden(self, span, share, blind)]
        y = g.microsoft("MultiHeadAttention", inputs, num_heads=kv_heads, scale=float(scale))[0]
        if share > 1:
            apart = g.node("Reshape", [y, g.ints(0, -1, share, kv_heads, d)])[0]
            apart = g.node("Transpose", [apart], perm=[0, 1, 3, 2, 4])[0]
            y = g.node("Reshape", [apart, g.ints(0, 0, q.width)])[0]
        if span is not None and blind == "nothing":
            y = g.node("Mul", [y, _sight(self, span)])[0]
        return Value(y, q.width)

    def sees(self: _Builder, x: Value, span: StateSpec) -> Value:
        return Value(_sight(self, span), 1)

    def relative_bias(self: _Builder, x: Value, bias: RelativeBias) -> Value:
        """The value is `(1, heads, seq, seq)`, as MultiHeadAttention wants it."""
        seq = self.graph.node("Shape", [self._use(x)], start=1, end=2)[0]
        return Value(distance_bias(self, bias, seq, seq), 1)


def distance_bias(op: _Builder, bias: RelativeBias, queries: str, keys: str) -> str:
    """`(1, heads, queries, keys)` for the last `queries` of `keys` positions, both int64 `(1,)`."""
    g, limit = op.graph, bias.max_distance
    table = op.weights.fixed(bias.table, ".by_distance", bias.by_distance())
    last = 2 * limit if bias.both_ways else limit
    zero, one, last_column, shift = (
        g.constant("int", np.asarray(i, np.int64)) for i in (0, 1, last, limit)
    )
    total = g.node("Squeeze", [keys])[0]
    every = g.node("Range", [zero, total, one])[0]
    first = g.node("Sub", [total, g.node("Squeeze", [queries])[0]])[0]
    own = g.node("Range", [first, total, one])[0]
    # A key's distance ahead of the query, counted from the table's first column.
    start = g.node("Sub", [own, shift])[0]
    start = g.node("Unsqueeze", [start, g.ints(1)])[0]
    index = g.node("Clip", [g.node("Sub", [every, start])[0], zero, last_column])[0]
    rows = g.node("Gather", [table, index], axis=1)[0]
    return g.node("Unsqueeze", [rows, g.ints(0)])[0]


def _hidden(op: _Builder, span: StateSpec, share: int, blind: Blind) -> str:
    """`(1, 1, seq * share, rows)`: a large negative number where a token does not see a row; each
    token counts `share` times in a row. A token that sees none does not see any, or sees all."""
    key = f"hidden.{span.name}.{share}.{blind}"
    if key not in op._shared:
        g, scope, op.graph.scope = op.graph, op.graph.scope, ""
        zero, none = (g.constant("bias", np.asarray(x, np.float32)) for x in (0, _NOTHING))
        seen = _seen(op, span, share)
        if blind == "all":
            number = g.node("Cast", [seen], to=1)[0]
            count = g.node("ReduceSum", [number, g.ints(1)], keepdims=1)[0]
            seen = g.node("Or", [seen, g.node("Equal", [count, zero])[0]])[0]
        bias = g.node("Where", [seen, zero, none])[0]
        op._shared[key] = g.node("Unsqueeze", [bias, g.ints(0, 1)])[0]
        op.graph.scope = scope
    return op._shared[key]


def _sight(op: _Builder, span: StateSpec) -> str:
    """`(1, seq, 1)`: 1 where a token sees any row, else 0."""
    key = f"sight.{span.name}"
    if key not in op._shared:
        g, scope, op.graph.scope = op.graph, op.graph.scope, ""
        seen = g.node("Cast", [_seen(op, span, 1)], to=1)[0]
        count = g.node("ReduceSum", [seen, g.ints(1)], keepdims=1)[0]
        some = g.node("Min", [count, g.constant("bias", np.asarray(1, np.float32))])[0]
        op._shared[key] = g.node("Unsqueeze", [some, g.ints(0)])[0]
        op.graph.scope = scope
    return op._shared[key]


def _seen(op: _Builder, span: StateSpec, share: int) -> str:
    """Which rows each token sees, bool `(seq * share, rows)`."""
    g = op.graph
    source = "input_ids" if "input_ids" in g.plain_inputs() else "inputs_embeds"
    zero, one, times = (g.constant("int", np.asarray(i, np.int64)) for i in (0, 1, share))
    length = g.node("Squeeze", [g.node("Shape", [source], start=0, end=1)[0]])[0]
    count = g.node("Mul", [length, times])[0]
    own = g.node("Div", [g.node("Range", [zero, count, one])[0], times])[0]
    own = g.node("Unsqueeze", [g.node("Add", [own, "position"])[0], g.ints(1)])[0]
    first, end = (
        g.node(
            "Gather", [f"state.{span.name}", g.constant("int", np.asarray(i, np.int64))], axis=2
        )[0]
        for i in (0, 1)
    )
    begun = g.node("LessOrEqual", [first, own])[0]
    return g.node("And", [begun, g.node("Less", [own, end])[0]])[0]
