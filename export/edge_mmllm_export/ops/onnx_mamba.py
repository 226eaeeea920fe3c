"""How the ops of Mamba and Mamba-2 become ONNX. Functions of `OnnxOps`, names in, names out.

Values are `(1, seq, width)`. Measurements: `benchmarks/`, two cores of a Zen 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.onnx_graph import Body, GraphBuilder
from edge_mmllm_export.weights import Weight

if TYPE_CHECKING:
    from edge_mmllm_export.ops.onnx import OnnxOps

#: The end of an axis, for Slice.
_END = np.iinfo(np.int64).max
#: From here on five nodes are faster than one scalar kernel.
_WIDE = 256


def causal_conv(
    op: OnnxOps, x: str, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
) -> str:
    """CausalConvWithState for one token; for several, shifted copies of the sequence, each times
    its tap, and their sum: 1.8 ms for 512 tokens of 1536 channels where the kernel, which is
    scalar, takes 8.3 (one thread)."""
    g, (channels, width) = op.graph, weight.shape
    rows_of_taps = op.weights.fixed(weight, ".taps", np.ascontiguousarray(weight.values.T))
    # onnxruntime computes what depends on constants alone when it loads a graph.
    taps = [
        g.node("Gather", [rows_of_taps, g.constant("tap", np.asarray(i))])[0] for i in range(width)
    ]
    kernel = g.node("Transpose", [rows_of_taps], perm=[1, 0])[0]
    kernel = g.node("Unsqueeze", [kernel, g.ints(1)])[0]
    shift = op.weights.vector(bias) if bias is not None else ""
    with g.body("one") as one:
        inputs = [x, kernel, shift, f"state.{state.name}"]
        activation = "silu" if silu else "none"
        y, after = g.microsoft(
            "CausalConvWithState", inputs, 2, channels_last=1, activation=activation
        )
        one.output(y, [1, "seq", channels])
        one.output(after, [1, width - 1, channels])
    with g.body("several") as several:
        rows = g.node("Concat", [f"state.{state.name}", x], axis=1)[0]
        total = g.node("Mul", [x, taps[-1]])[0]
        if shift:
            total = g.node("Add", [total, shift])[0]
        for i, tap in enumerate(taps[:-1]):
            shifted = _rows(g, rows, i, i - (width - 1))
            total = g.node("Add", [total, g.node("Mul", [shifted, tap])[0]])[0]
        y = g.microsoft("QuickGelu", [total], alpha=1.0)[0] if silu else total
        several.output(y, [1, "seq", channels])
        several.output(_rows(g, rows, 1 - width, _END), [1, width - 1, channels])
    outputs = [g.fresh("conv"), f"next.{state.name}"]
    branches = {"then_branch": one.graph(), "else_branch": several.graph()}
    g.node("If", [op._lengths().one], outputs, **branches)
    return outputs[0]


def _rows(g: GraphBuilder, x: str, start: int, end: int) -> str:
    """Rows `[start, end)` of a value `(1, rows, width)`."""
    return g.node("Slice", [x, g.ints(start), g.ints(end), g.ints(1)])[0]


def time_step(
    op: OnnxOps, dt: str, width: int, bias: Weight | None, limit: tuple[float, float]
) -> str:
    """softplus, and Clip where there is a limit.

    Softplus has a scalar kernel: 19 us for 1536 channels, where five vectorized nodes take 6.
    """
    g = op.graph
    if bias is not None:
        dt = g.node("Add", [dt, op.weights.vector(bias)])[0]
    if width < _WIDE:
        name = g.node("Softplus", [dt])[0]
    else:
        # log(1 + exp(x)), which is x itself long before exp overflows.
        small = g.node("Min", [dt, _scalar(g, 50.0)])[0]
        sum_ = g.node("Add", [g.node("Exp", [small])[0], _scalar(g, 1.0)])[0]
        name = g.node("Max", [g.node("Log", [sum_])[0], dt])[0]
    if limit[0] > 0 or np.isfinite(limit[1]):
        name = g.node("Clip", [name, _scalar(g, limit[0]), _scalar(g, limit[1])])[0]
    return name


def gated_linear_attention(
    op: OnnxOps, q: str, k: str, v: str, dt: str, decay: Weight, state: StateSpec, *, groups: int
) -> str:
    """LinearAttention with one log decay a head. It shares q and k among the heads of a group
    itself (inverse GQA: `q_num_heads` below `kv_num_heads`), so neither is repeated."""
    g = op.graph
    _, heads, _, d_v = state.shape
    log_decay = g.node("Mul", [dt, op.weights.vector(decay)])[0]
    v4 = g.node("Reshape", [v, g.ints(0, 0, heads, d_v)])[0]
    dt4 = g.node("Unsqueeze", [dt, g.ints(3)])[0]
    weighted = g.node("Mul", [v4, dt4])[0]
    weighted = g.node("Reshape", [weighted, g.ints(0, 0, heads * d_v)])[0]
    op.in_place.append(state.name)  # the kernel starts from a copy of the state in its output
    name = g.fresh("linear_attention")
    g.microsoft(
        "LinearAttention",
        [q, k, weighted, f"state.{state.name}", log_decay],
        [name, f"next.{state.name}"],
        q_num_heads=groups,
        kv_num_heads=heads,
        update_rule="gated",
        scale=1.0,
    )
    return name


def head_scale(op: OnnxOps, x: str, width: int, weight: Weight) -> str:
    """Multiply by the weight repeated over each head's width (a constant)."""
    g = op.graph
    name = op.weights.fixed(weight, ".wide", np.repeat(weight.values, width // weight.shape[0]))
    return g.node("Mul", [x, name])[0]


def selective_scan(
    op: OnnxOps, x: str, dt: str, b: str, c: str, decay: Weight, skip: Weight, state: StateSpec
) -> str:
    """A Scan over tokens; one token alone does without (an If costs 2 us, a Scan 10).

    The state is `(d_state, d_inner)`, so that every broadcast runs along the contiguous axis of
    channels: 20 us a token of 1536 channels and 16 states, with the axes swapped 200.
    """
    g = op.graph
    _, n, d = state.shape
    rates = op.weights.fixed(decay, ".transposed", np.ascontiguousarray(decay.values.T))
    if decay.scheme.bits == 16:
        rates = op.widened(rates)
    token = _Token(f"state.{state.name}", dt, g.node("Mul", [dt, x])[0], b, c, rates)
    with g.body("one") as one:
        after, y = _update(g, token)
        one.output(y, [1, "seq", d])
        one.output(after, [1, n, d])
    with g.body("several") as several:
        _scan(g, token, several, n, d)
    # The state is read in the first half of a token's update and written in the second.
    op.in_place.append(state.name)
    outputs = [g.fresh("selective_scan"), f"next.{state.name}"]
    branches = {"then_branch": one.graph(), "else_branch": several.graph()}
    g.node("If", [op._lengths().one], outputs, **branches)
    return g.node("Add", [outputs[0], g.node("Mul", [x, op.weights.vector(skip)])[0]])[0]


@dataclass(frozen=True)
class _Token:
    """Names: state `(1, n, d)`, dt and dt * x `(1, 1, d)`, b and c `(1, 1, n)`, rates `(n, d)`."""

    state: str
    dt: str
    input: str
    b: str
    c: str
    rates: str


def _update(g: GraphBuilder, t: _Token) -> tuple[str, str]:
    """The next state and y `(1, 1, d)`."""
    gate = g.node("Exp", [g.node("Mul", [t.dt, t.rates])[0]])[0]
    kept = g.node("Mul", [gate, t.state])[0]
    new = g.microsoft("FusedMatMul", [t.b, t.input], transA=1)[0]
    after = g.node("Add", [kept, new])[0]
    return after, g.node("MatMul", [t.c, after])[0]


def _scan(g: GraphBuilder, t: _Token, outer: Body, n: int, d: int) -> None:
    """The same over tokens, without the batch axis, so that Gemm can add the new to the kept."""
    with g.body("token") as body:
        state = body.input("state", [n, d])
        dt, new, b, c = (body.input(s, [1, w]) for s, w in zip("tubc", (d, d, n, n), strict=True))
        gate = g.node("Exp", [g.node("Mul", [dt, t.rates])[0]])[0]
        kept = g.node("Mul", [gate, state])[0]
        after = g.node("Gemm", [b, new, kept], transA=1)[0]
        body.output(after, [n, d])
        body.output(g.node("MatMul", [c, after])[0], [1, d])
    tokens = [
        g.node("Reshape", [name, g.ints(-1, 1, width)])[0]
        for name, width in ((t.dt, d), (t.input, d), (t.b, n), (t.c, n))
    ]
    start = g.node("Reshape", [t.state, g.ints(n, d)])[0]
    last, rows = g.node("Scan", [start, *tokens], 2, num_scan_inputs=4, body=body.graph())
    outer.output(g.node("Reshape", [rows, g.ints(1, -1, d)])[0], [1, "seq", d])
    outer.output(g.node("Reshape", [last, g.ints(1, n, d)])[0], [1, n, d])


def _scalar(g: GraphBuilder, value: float) -> str:
    return g.constant("scalar", np.asarray(value, np.float32))
