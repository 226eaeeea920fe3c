"""Lowers a definition to TVM Relax: naive float32, right before it is fast.

Activations are Relax variables `(seq, width)`. Weights are function parameters under their own
names, so nothing of a checkpoint is baked into the module; states are parameters too, written in
place by the kernels of `relax_kernels`. No fusion, no schedules, no quantization: those belong to
the MLC exporter. Needs `edge-mmllm[mlc]` alone, not onnx.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from tvm import relax, te, tirx

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops import relax_kernels
from edge_mmllm_export.ops.base import Activation, Attention, Rope
from edge_mmllm_export.ops.relax_missing import MissingOps
from edge_mmllm_export.weights import Weight

#: A Relax variable, `(seq, width)` float32 (tvm ships no type hints).
Value = Any


class RelaxOps(MissingOps[Value]):
    """Builds the body of one Relax function.

    Args:
        builder: an open `relax.BlockBuilder` function scope, inside a dataflow block.
        weights, states: the function's parameters, each by its own name (the two may share names).
        capacity: tokens that the kv states hold.
        position: int64 `(1,)`, index of the first new token; None where no op asks for it.
        wanted: int64 `(rows,)`, rows to compute logits for; None = all.
    """

    def __init__(
        self,
        builder: Any,
        weights: Mapping[str, Value],
        states: Mapping[str, Value],
        *,
        capacity: int,
        position: Value | None = None,
        wanted: Value | None = None,
    ) -> None:
        self._builder, self._weights, self._states = builder, weights, states
        self._capacity, self._position, self._wanted = capacity, position, wanted

    # -- plumbing --------------------------------------------------------------------------

    def _emit(self, expr: Value) -> Value:
        return self._builder.emit(expr)

    def _of(self, w: Weight) -> Value:
        return self._weights[w.name]

    def _in_place(
        self, kernel: Any, name: str, inputs: list[Value], states: list[StateSpec], width: int
    ) -> Value:
        """Call a kernel that writes states in place and gives one new value `(seq, width)`."""
        seq = inputs[0].ty.shape[0]
        buffers = [self._states[s.name] for s in states]
        first = len(inputs)
        call = relax.op.call_tir_inplace(
            self._builder.add_func(kernel, name),
            [*inputs, *buffers],
            [-1, *range(first, first + len(buffers))],
            [relax.TensorType((seq, width), "float32"), *(b.ty for b in buffers)],
        )
        return self._emit(relax.TupleGetItem(self._emit(call), 0))

    # -- ops -------------------------------------------------------------------------------

    def rows(self, table: Weight, index: Value) -> Value:
        """An id outside the table gives NaN (the default mode reads wild memory)."""
        return self._emit(relax.op.take(self._of(table), index, axis=0, mode="nan"))

    def logit_rows(self, x: Value) -> Value:
        if self._wanted is None:
            return x
        return self._emit(relax.op.take(x, self._wanted, axis=0, mode="nan"))

    def linear(
        self, x: Value, *w: Weight, bias: tuple[Weight | None, ...] = ()
    ) -> tuple[Value, ...]:
        outputs = []
        for i, weight in enumerate(w):
            y = self._builder.emit_te(_matmul, x, self._of(weight), primfunc_name_hint="matmul")
            own = bias[i] if bias else None
            outputs.append(y if own is None else self._emit(relax.op.add(y, self._of(own))))
        return tuple(outputs)

    def norm(
        self,
        x: Value,
        weight: Weight,
        *,
        eps: float,
        groups: int = 1,
        bias: Weight | None = None,
    ) -> Value:
        scale, (seq, width) = self._of(weight), x.ty.shape
        if bias is not None:
            return self._emit(relax.op.nn.layer_norm(x, scale, self._of(bias), -1, eps))
        if groups == 1:
            return self._emit(relax.op.nn.rms_norm(x, scale, axes=-1, epsilon=eps))
        # Normalize each group without a weight, then scale the whole width.
        part = int(width) // groups
        parts = self._emit(relax.op.reshape(x, (seq * groups, part)))
        normed = self.unit_rms(parts, eps=eps)
        flat = self._emit(relax.op.reshape(normed, (seq, width)))
        return self._emit(relax.op.multiply(flat, scale))

    def unit_rms(self, x: Value, *, eps: float) -> Value:
        ones = relax.const(np.ones(int(x.ty.shape[-1]), np.float32))
        return self._emit(relax.op.nn.rms_norm(x, ones, axes=-1, epsilon=eps))

    def add_norm(
        self,
        x: Value,
        delta: Value | None,
        weight: Weight,
        *,
        eps: float,
        bias: Weight | None = None,
    ) -> tuple[Value, Value]:
        x = x if delta is None else self.add(x, delta)
        return x, self.norm(x, weight, eps=eps, bias=bias)

    def add(self, a: Value, b: Value) -> Value:
        return self._emit(relax.op.add(a, b))

    def mul(self, a: Value, b: Value) -> Value:
        return self._emit(relax.op.multiply(a, b))

    def split(self, x: Value, sizes: tuple[int, ...]) -> tuple[Value, ...]:
        ends = np.cumsum(sizes)[:-1].tolist()
        parts = self._emit(relax.op.split(x, ends, axis=-1))
        return tuple(self._emit(relax.TupleGetItem(parts, i)) for i in range(len(sizes)))

    def activation(self, x: Value, kind: Activation) -> Value:
        if kind == "quick_gelu":
            gate = relax.op.sigmoid(relax.op.multiply(x, relax.const(1.702, "float32")))
            return self._emit(relax.op.multiply(x, gate))
        function = {
            "silu": relax.op.nn.silu,
            "relu": relax.op.nn.relu,
            "gelu": relax.op.nn.gelu,
            "gelu_tanh": relax.op.nn.gelu_tanh,
        }[kind]
        return self._emit(function(x))

    def glu(self, gate: Value, up: Value, kind: Activation) -> Value:
        return self.mul(self.activation(gate, kind), up)

    # -- sequence mixing -------------------------------------------------------------------

    def attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        k_state: StateSpec,
        v_state: StateSpec,
        spec: Attention,
    ) -> Value:
        if spec.q_norm is not None and spec.k_norm is not None:
            q = self._head_norm(q, spec.q_norm, spec)
            k = self._head_norm(k, spec.k_norm, spec)
        if spec.rope is not None:
            q = self._rotated(q, spec.heads, spec.rope)
            k = self._rotated(k, spec.kv_heads, spec.rope)
        return self._in_place(
            relax_kernels.attention(spec, self._capacity),
            "attention",
            [q, k, v, self._position],
            [k_state, v_state],
            spec.heads * spec.head_dim,
        )

    def _head_norm(self, x: Value, weight: Weight, spec: Attention) -> Value:
        seq, width = x.ty.shape
        heads = int(width) // spec.head_dim
        parts = self._emit(relax.op.reshape(x, (seq * heads, spec.head_dim)))
        normed = self.norm(parts, weight, eps=spec.norm_eps)
        return self._emit(relax.op.reshape(normed, (seq, width)))

    def _rotated(self, x: Value, heads: int, rope: Rope) -> Value:
        inv_freq = relax.const(rope.inv_freq)
        return self._builder.emit_te(
            _rope, x, inv_freq, self._position, heads, rope.scale, primfunc_name_hint="rope"
        )

    def causal_conv(
        self, x: Value, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
    ) -> Value:
        channels, width = weight.shape
        kernel = relax_kernels.causal_conv(channels, width)
        y = self._in_place(kernel, "causal_conv", [x, self._of(weight)], [state], channels)
        if bias is not None:
            y = self._emit(relax.op.add(y, self._of(bias)))
        return self.activation(y, "silu") if silu else y

    def time_step(self, dt: Value, bias: Weight | None, limit: tuple[float, float]) -> Value:
        if bias is not None:
            dt = self._emit(relax.op.add(dt, self._of(bias)))
        return self._builder.emit_te(_time_step, dt, limit, primfunc_name_hint="time_step")

    def selective_scan(
        self,
        x: Value,
        dt: Value,
        b: Value,
        c: Value,
        decay: Weight,
        skip: Weight,
        state: StateSpec,
    ) -> Value:
        d_inner, d_state = decay.shape
        y = self._in_place(
            relax_kernels.selective_scan(d_inner, d_state),
            "selective_scan",
            [x, dt, b, c, self._of(decay)],
            [state],
            d_inner,
        )
        return self.add(y, self._emit(relax.op.multiply(x, self._of(skip))))

    def gated_linear_attention(
        self,
        q: Value,
        k: Value,
        v: Value,
        dt: Value,
        decay: Weight,
        state: StateSpec,
        *,
        groups: int,
    ) -> Value:
        _, heads, d_k, d_v = state.shape
        return self._in_place(
            relax_kernels.gated_linear_attention(heads, groups, d_k, d_v),
            "gated_linear_attention",
            [q, k, v, dt, self._of(decay)],
            [state],
            heads * d_v,
        )

    def head_scale(self, x: Value, weight: Weight) -> Value:
        return self._builder.emit_te(
            _head_scale, x, self._of(weight), primfunc_name_hint="head_scale"
        )


# Tensor expressions: what Relax has no op for, or only with a copy of the weight.


def _matmul(x: Any, w: Any) -> Any:
    """`x @ w.T`, w `(N, K)` as stored; `relax.op.linear` would transpose a copy in each call."""
    k = te.reduce_axis((0, w.shape[1]), "k")
    return te.compute((x.shape[0], w.shape[0]), lambda t, n: te.sum(x[t, k] * w[n, k], axis=k))


def _rope(x: Any, inv_freq: Any, position: Any, heads: int, scale: float) -> Any:
    """x `(seq, heads * d)`, halves of each head rotated; angles in float32, as trained."""
    width = int(x.shape[1]) // heads
    half = width // 2

    def rotated(t: Any, c: Any) -> Any:
        j = c % width
        angle = (position[0] + t).astype("float32") * inv_freq[j % half]
        other = te.if_then_else(j < half, -x[t, c + half], x[t, c - half])
        return (x[t, c] * te.cos(angle) + other * te.sin(angle)) * tirx.const(scale, "float32")

    return te.compute(x.shape, rotated)


def _time_step(dt: Any, limit: tuple[float, float]) -> Any:
    """`clamp(softplus(dt), limit)`, softplus as `max(x, 0) + log1p(exp(-|x|))`."""

    def step(t: Any, h: Any) -> Any:
        x = dt[t, h]
        y = te.max(x, tirx.const(0, "float32")) + te.log(1 + te.exp(-te.abs(x)))
        if limit[0] > 0:
            y = te.max(y, tirx.const(limit[0], "float32"))
        return te.min(y, tirx.const(limit[1], "float32")) if np.isfinite(limit[1]) else y

    return te.compute(dt.shape, step)


def _head_scale(x: Any, weight: Any) -> Any:
    width = int(x.shape[1]) // int(weight.shape[0])
    return te.compute(x.shape, lambda t, c: x[t, c] * weight[c // width])
