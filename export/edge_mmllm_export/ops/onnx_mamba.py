"""How the ops of Mamba and Mamba-2 become ONNX. Functions of `OnnxOps`, names in, names out.

Values are `(1, seq, width)`. Measurements: `benchmarks/`, two cores of a Zen 4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from onnx import TensorProto, helper

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.weights import Weight

if TYPE_CHECKING:
    from edge_mmllm_export.ops.onnx import OnnxOps


def causal_conv(
    op: OnnxOps, x: str, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
) -> str:
    """CausalConvWithState: state, convolution and silu in one kernel, without a transpose."""
    g = op.graph
    kernel = f"{weight.name}.kernel"
    if not g.has(kernel):
        values = weight.values[:, None, :]
        g.data.write(g.external(kernel, "float32", values.shape), values)
        op._progress(weight.size)
    name = g.fresh("conv")
    g.microsoft(
        "CausalConvWithState",
        [x, kernel, op._vector(bias) if bias is not None else "", f"state.{state.name}"],
        [name, f"next.{state.name}"],
        channels_last=1,
        activation="silu" if silu else "none",
    )
    return name


def time_step(op: OnnxOps, dt: str, bias: Weight | None, limit: tuple[float, float]) -> str:
    """Softplus, and Clip where there is a limit."""
    g = op.graph
    if bias is not None:
        dt = g.node("Add", [dt, op._vector(bias)])[0]
    name = g.node("Softplus", [dt])[0]
    if limit[0] > 0 or np.isfinite(limit[1]):
        low = g.constant("low", np.asarray(limit[0], np.float32))
        high = g.constant("high", np.asarray(limit[1], np.float32))
        name = g.node("Clip", [name, low, high])[0]
    return name


def gated_linear_attention(
    op: OnnxOps, q: str, k: str, v: str, dt: str, decay: Weight, state: StateSpec, *, groups: int
) -> str:
    """LinearAttention with one log decay a head. It shares q and k among the heads of a group
    itself (inverse GQA: `q_num_heads` below `kv_num_heads`), so neither is repeated."""
    g = op.graph
    _, heads, _, d_v = state.shape
    log_decay = g.node("Mul", [dt, op._vector(decay)])[0]
    v4 = g.node("Reshape", [v, g.ints(0, 0, heads, d_v)])[0]
    dt4 = g.node("Unsqueeze", [dt, g.ints(3)])[0]
    weighted = g.node("Mul", [v4, dt4])[0]
    weighted = g.node("Reshape", [weighted, g.ints(0, 0, heads * d_v)])[0]
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
    name = f"{weight.name}.wide"
    if not g.has(name):
        values = np.repeat(weight.values, width // weight.shape[0])
        g.data.write(g.external(name, "float32", values.shape), values)
        op._progress(weight.size)
    return g.node("Mul", [x, name])[0]


def selective_scan(
    op: OnnxOps, x: str, dt: str, b: str, c: str, decay: Weight, skip: Weight, state: StateSpec
) -> str:
    """A Scan over tokens, the state `(d_state, d_inner)`: every broadcast runs along the
    contiguous axis of channels (22 us a token; with the axes swapped 200)."""
    g = op.graph
    _, n, d = state.shape
    rates = f"{decay.name}.transposed"
    if not g.has(rates):
        values = np.ascontiguousarray(decay.values.T)
        g.data.write(g.external(rates, "float32", values.shape), values)
        op._progress(decay.size)
    inputs = g.node("Mul", [dt, x])[0]
    columns = g.node("Reshape", [b, g.ints(-1, n, 1)])[0]
    tokens = [
        g.node("Reshape", [dt, g.ints(-1, 1, d)])[0],
        g.node("Reshape", [inputs, g.ints(-1, 1, d)])[0],
        columns,
        g.node("Reshape", [c, g.ints(-1, 1, n)])[0],
    ]
    start = g.node("Squeeze", [f"state.{state.name}", g.ints(0)])[0]
    last, rows = g.node("Scan", [start, *tokens], 2, num_scan_inputs=4, body=_token(rates, n, d))
    g.node("Unsqueeze", [last, g.ints(0)], [f"next.{state.name}"])
    y = g.node("Reshape", [rows, g.ints(1, -1, d)])[0]
    return g.node("Add", [y, g.node("Mul", [x, op._vector(skip)])[0]])[0]


def _token(rates: str, n: int, d: int) -> object:
    """One token's update: state `(n, d)`, dt and dt * x `(1, d)`, b `(n, 1)`, c `(1, n)`."""

    def value(name: str, *shape: int) -> object:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    nodes = [
        helper.make_node("Mul", ["dt", rates], ["exponent"]),
        helper.make_node("Exp", ["exponent"], ["gate"]),
        helper.make_node("Mul", ["gate", "state"], ["kept"]),
        helper.make_node("Mul", ["b", "input"], ["new"]),
        helper.make_node("Add", ["kept", "new"], ["next"]),
        helper.make_node("MatMul", ["c", "next"], ["y"]),
    ]
    inputs = [
        value("state", n, d),
        value("dt", 1, d),
        value("input", 1, d),
        value("b", n, 1),
        value("c", 1, n),
    ]
    return helper.make_graph(nodes, "token", inputs, [value("next", n, d), value("y", 1, d)])
