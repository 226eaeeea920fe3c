"""Lowers a definition to TVM Relax: calls of TIR kernels over planned memory.

Activations are Relax variables `(seq, width)`. Weights are parameters of the function, made when
an op first asks for them (`parameters` lists them), so nothing of a checkpoint is baked into the
module; states are parameters too, written in place by the kernels. Needs `edge-mmllm[mlc]` alone,
not onnx.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from tvm import relax

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops import (
    relax_attention,
    relax_kernels,
    relax_linear,
    relax_math,
    relax_rows,
    relax_rwkv,
)
from edge_mmllm_export.ops.base import Activation, Attention, Rope, Wkv7, Wkv7Weights
from edge_mmllm_export.ops.relax_memory import RelaxMemory
from edge_mmllm_export.ops.relax_missing import MissingOps
from edge_mmllm_export.ops.relax_params import FLOAT32, Layouts, Packed, packed
from edge_mmllm_export.ops.relax_vision import RelaxVision
from edge_mmllm_export.ops.tir import scan
from edge_mmllm_export.ops.tir.isa import Isa
from edge_mmllm_export.weights import Weight
from edge_mmllm_runtime.mlc.packing import Packing

#: The packing of small tables that kernels read by vectors.
PACKED = "f32"

#: A Relax variable, `(seq, width)` float32 (tvm ships no type hints).
Value = Any


class RelaxOps(RelaxVision[Value], RelaxMemory[Value], MissingOps[Value]):
    """Builds the body of one Relax function.

    Args:
        builder: an open `relax.BlockBuilder` function scope, inside a dataflow block.
        layouts: of every weight.
        states: the function's parameters, by the states' names.
        isa: what the target has.
        exact: keep activations in float32 where a matrix is quantized.
        position: int64 `(1,)`, index of the first new token; None where no op asks for it.
        wanted: int64 `(rows,)`, rows to compute logits for; None = all.

    Attributes:
        parameters: name -> (what it is, the function's parameter), in the order of first use.
        remembered: state -> the new value of a cross_kv state.
    """

    def __init__(
        self,
        builder: Any,
        layouts: Layouts,
        states: Mapping[str, Value],
        *,
        isa: Isa,
        exact: bool = False,
        position: Value | None = None,
        wanted: Value | None = None,
    ) -> None:
        self._builder, self._layouts, self._states = builder, layouts, states
        self._isa, self._exact = isa, exact
        self._position, self._wanted = position, wanted
        self._turns: dict[int, tuple[Value, Value]] = {}
        self._distances: dict[str, Value] = {}
        self.parameters: dict[str, tuple[Packed, Value]] = {}
        self.remembered: dict[str, Value] = {}

    # -- plumbing --------------------------------------------------------------------------

    def _emit(self, expr: Value) -> Value:
        return self._builder.emit(expr)

    def _of(self, w: Weight, layout: str | None = None) -> Value:
        """The function's parameter of a weight, in a layout that its kernel asks for."""
        if w.name not in self.parameters:
            spec = packed(w, layout or self._layouts[w.name])
            variable = relax.Var(w.name, relax.TensorType(spec.shape, spec.dtype))
            self.parameters[w.name] = (spec, variable)
        return self.parameters[w.name][1]

    def _packing(self, w: Weight) -> Packing:
        return Packing.of(self._layouts[w.name], w.shape[0], w.shape[1])

    def _one(self, x: Value) -> bool:
        """Whether the number of rows is 1 at compile time."""
        seq = x.ty.shape[0]
        return not isinstance(seq, relax.Var) and getattr(seq, "value", None) == 1

    def finished(self, x: Value) -> Value:
        """The variable of an op's result: what a function may give back."""
        return relax_linear.emitted(x)

    def _length(self, x: Value) -> int | None:
        """1 where that is the number of rows at compile time."""
        return 1 if self._one(x) else None

    def _call(self, kernel: Any, name: str, inputs: list[Value], types: list[Any]) -> list[Value]:
        """Call a kernel that gives new values."""
        inputs = [relax_linear.emitted(i) for i in inputs]
        call = self._emit(relax.call_tir(self._builder.add_func(kernel, name), inputs, types))
        if len(types) == 1:
            return [call]
        return [self._emit(relax.TupleGetItem(call, i)) for i in range(len(types))]

    def _rows_like(self, x: Value, width: int) -> Any:
        return relax.TensorType((x.ty.shape[0], width), "float32")

    def _in_place(
        self,
        kernel: Any,
        name: str,
        inputs: list[Value],
        states: list[StateSpec],
        width: int,
        outputs: int = 1,
    ) -> list[Value]:
        """Call a kernel that writes states in place and gives new values `(seq, width)`."""
        inputs = [relax_linear.emitted(i) for i in inputs]
        buffers = [self._states[s.name] for s in states]
        first = len(inputs)
        call = relax.op.call_tir_inplace(
            self._builder.add_func(kernel, name),
            [*inputs, *buffers],
            [*range(first, first + len(buffers)), *[-1] * outputs],
            [*(b.ty for b in buffers), *[self._rows_like(inputs[0], width)] * outputs],
        )
        results = self._emit(call)
        return [self._emit(relax.TupleGetItem(results, len(buffers) + i)) for i in range(outputs)]

    def _pointwise(self, name: str, inputs: list[Value], *formulas: relax_rows.Formula) -> Any:
        """Numbers at the same place; vectors `(width,)` and single rows stand for every row."""
        shapes = [i.ty.shape for i in inputs]
        whole = next((i for i in inputs if len(i.ty.shape) == 2 and not self._one(i)), None)
        x = next(i for i in inputs if len(i.ty.shape) == 2) if whole is None else whole
        width = int(x.ty.shape[1])
        kinds = "".join(
            "v" if len(shape) == 1 else "b" if self._one(i) and whole is not None else "r"
            for i, shape in zip(inputs, shapes, strict=True)
        )
        kernel = relax_rows.pointwise(name, width, kinds, formulas, one=self._one(x))
        return self._call(kernel, name, inputs, [self._rows_like(x, width)] * len(formulas))

    # -- ops -------------------------------------------------------------------------------

    def rows(self, table: Weight, index: Value) -> Value:
        """An id outside the table gives NaN: nothing reads wild memory."""
        kind, one = self._layouts[table.name], self._one(index)
        if kind == FLOAT32:
            kernel = relax_rows.take(table.shape[0], table.shape[1], one=one)
        else:
            kernel = relax_rows.take_packed(self._packing(table), one=one)
        inputs = [self._of(table), index]
        return self._call(kernel, "rows", inputs, [self._rows_like(index, table.shape[1])])[0]

    def positions(self, x: Value, table: Weight, *, offset: int = 0) -> Value:
        kernel = relax_rows.positions(
            self._packing(table), offset, one=self._one(x), still=self._position is None
        )
        inputs = [self._of(table), *([] if self._position is None else [self._position])]
        return self._call(kernel, "positions", inputs, [self._rows_like(x, table.shape[1])])[0]

    def logit_rows(self, x: Value) -> Value:
        if self._wanted is None:
            return x
        width = int(x.ty.shape[1])
        kernel = relax_rows.take(None, width, one=False)
        types = [self._rows_like(self._wanted, width)]
        return self._call(kernel, "logit_rows", [x, self._wanted], types)[0]

    def linear(
        self, x: Value, *w: Weight, bias: tuple[Weight | None, ...] = ()
    ) -> tuple[Value, ...]:
        return relax_linear.linear(
            self._builder,
            relax_linear.emitted(x),
            [self._of(weight) for weight in w],
            [self._packing(weight) for weight in w],
            self._isa,
            biases=[None if b is None else self._of(b) for b in bias],
            exact=self._exact,
        )

    def norm(
        self,
        x: Value,
        weight: Weight,
        *,
        eps: float,
        groups: int = 1,
        bias: Weight | None = None,
    ) -> Value:
        return self._norm(x, None, weight, eps, groups, bias)[0]

    def unit_rms(self, x: Value, *, eps: float) -> Value:
        return self._norm(x, None, None, eps, 1, None)[0]

    def add_norm(
        self,
        x: Value,
        delta: Value | None,
        weight: Weight,
        *,
        eps: float,
        bias: Weight | None = None,
    ) -> tuple[Value, Value]:
        if delta is None:
            return x, self.norm(x, weight, eps=eps, bias=bias)
        total, y = self._norm(x, delta, weight, eps, 1, bias)
        return total, y

    def _norm(
        self,
        x: Value,
        delta: Value | None,
        weight: Weight | None,
        eps: float,
        groups: int,
        bias: Weight | None,
    ) -> list[Value]:
        width = int(x.ty.shape[1])
        kernel = relax_rows.norm(
            width,
            groups,
            eps,
            one=self._one(x),
            weight=weight is not None,
            bias=bias is not None,
            delta=delta is not None,
        )
        inputs = [
            x,
            *([] if delta is None else [delta]),
            *(self._of(w) for w in (weight, bias) if w is not None),
        ]
        types = [self._rows_like(x, width)] * (1 if delta is None else 2)
        return self._call(kernel, "norm", inputs, types)

    def add(self, a: Value, b: Value) -> Value:
        return self._pointwise("add", [a, b], lambda x, y: x + y)[0]

    def mul(self, a: Value, b: Value) -> Value:
        return self._pointwise("mul", [a, b], lambda x, y: x * y)[0]

    def split(self, x: Value, sizes: tuple[int, ...]) -> tuple[Value, ...]:
        types = [self._rows_like(x, size) for size in sizes]
        return tuple(self._call(relax_rows.split(sizes, one=self._one(x)), "split", [x], types))

    def activation(self, x: Value, kind: Activation) -> Value:
        if isinstance(x, relax_linear.Deferred) and (y := x.activated(kind)) is not None:
            return y
        return self._pointwise(kind, [x], lambda v: relax_math.activation(v, kind))[0]

    def glu(self, gate: Value, up: Value, kind: Activation) -> Value:
        return self._pointwise("glu", [gate, up], lambda g, u: relax_math.activation(g, kind) * u)[
            0
        ]

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
        inputs = [q, k, v, self._position]
        if spec.rope is not None:
            inputs += self._rope(q, spec.rope)
        shape = relax_attention.Shape(
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            spec.scale,
            spec.window,
            spec.softcap,
            turned=spec.rope is not None,
            distances=0 if spec.relative is None else spec.relative.max_distance + 1,
        )
        if spec.relative is not None:
            inputs.append(self._by_distance(spec.relative))
        kernel = (relax_attention.step if self._one(q) else relax_attention.chunk)(shape)
        width = spec.heads * spec.head_dim
        return self._in_place(kernel, "attention", inputs, [k_state, v_state], width)[0]

    def _head_norm(self, x: Value, weight: Weight, spec: Attention) -> Value:
        """Every head of a row is a group with the same weight."""
        width = int(x.ty.shape[1])
        kernel = relax_rows.norm(
            width, width // spec.head_dim, spec.norm_eps, one=self._one(x), shared=True
        )
        return self._call(kernel, "head_norm", [x, self._of(weight)], [self._rows_like(x, width)])[
            0
        ]

    def _rope(self, x: Value, rope: Rope) -> tuple[Value, Value]:
        """Cosines and sines of the new tokens' positions; layers share them."""
        key = id(rope)
        if key not in self._turns:
            half = len(rope.inv_freq)
            kernel = relax_attention.rope_tables(half, rope.scale, one=self._one(x))
            types = [self._rows_like(x, half)] * 2
            inputs = [self._position, relax.const(rope.inv_freq)]
            cos, sin = self._call(kernel, "rope", inputs, types)
            self._turns[key] = cos, sin
        return self._turns[key]

    def causal_conv(
        self, x: Value, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
    ) -> Value:
        channels, width = weight.shape
        kernel = scan.causal_conv(
            channels, width, self._isa, seq=self._length(x), bias=bias is not None, silu=silu
        )
        inputs = [x, self._of(weight, PACKED), *([] if bias is None else [self._of(bias)])]
        return self._in_place(kernel, "causal_conv", inputs, [state], channels)[0]

    def time_step(self, dt: Value, bias: Weight | None, limit: tuple[float, float]) -> Value:
        plain = bias is None and limit[0] <= 0 and math.isinf(limit[1])
        if plain and isinstance(dt, relax_linear.Deferred):
            y = dt.activated("softplus")
            if y is not None:
                return y

        def step(x: Any, *more: Any) -> Any:
            return relax_math.clamp(relax_math.softplus(x + more[0] if more else x), limit)

        return self._pointwise("time_step", [dt, *([self._of(bias)] if bias else [])], step)[0]

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
        kernel = scan.selective_scan(d_inner, d_state, self._isa, seq=self._length(x))
        inputs = [x, dt, b, c, self._of(decay, PACKED), self._of(skip)]
        return self._in_place(kernel, "selective_scan", inputs, [state], d_inner)[0]

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
        kernel = relax_kernels.gated_linear_attention(heads, groups, d_k, d_v, one=self._one(q))
        inputs = [q, k, v, dt, self._of(decay)]
        return self._in_place(kernel, "gated_linear_attention", inputs, [state], heads * d_v)[0]

    def head_scale(self, x: Value, weight: Weight) -> Value:
        width = int(x.ty.shape[1])
        kernel = relax_rows.head_scale(weight.shape[0], width, one=self._one(x))
        inputs = [x, self._of(weight)]
        return self._call(kernel, "head_scale", inputs, [self._rows_like(x, width)])[0]

    # -- RWKV ------------------------------------------------------------------------------

    def token_shift(self, x: Value, state: StateSpec) -> Value:
        width = int(x.ty.shape[1])
        kernel = relax_rwkv.token_shift(width, one=self._one(x))
        return self._in_place(kernel, "token_shift", [x], [state], width)[0]

    def mix(self, x: Value, previous: Value, *mu: Weight) -> tuple[Value, ...]:
        def mixed(i: int) -> relax_rows.Formula:
            return lambda x, y, *m: x + (y - x) * m[i]

        formulas = tuple(mixed(i) for i in range(len(mu)))
        return tuple(self._pointwise("mix", [x, previous, *map(self._of, mu)], *formulas))

    def lerp(self, x: Value, y: Value, amount: Value) -> Value:
        return self._pointwise("lerp", [x, y, amount], lambda a, b, m: a + (b - a) * m)[0]

    def wkv4(self, k: Value, v: Value, decay: Weight, bonus: Weight, state: StateSpec) -> Value:
        width = int(k.ty.shape[1])
        kernel = relax_rwkv.wkv4(width, one=self._one(k))
        inputs = [k, v, self._of(decay), self._of(bonus)]
        return self._in_place(kernel, "wkv4", inputs, [state], width)[0]

    def wkv6(
        self,
        r: Value,
        k: Value,
        v: Value,
        log_decay: Value | Weight,
        bonus: Weight,
        state: StateSpec,
    ) -> Value:
        heads, d = bonus.shape
        constant = isinstance(log_decay, Weight)
        kernel = relax_rwkv.wkv6(heads, d, one=self._one(k), constant=constant)
        decay = self._of(log_decay) if isinstance(log_decay, Weight) else log_decay
        inputs = [r, k, v, decay, self._of(bonus)]
        return self._in_place(kernel, "wkv6", inputs, [state], heads * d)[0]

    def wkv7(self, x: Wkv7[Value], w: Wkv7Weights, state: StateSpec) -> tuple[Value, Value]:
        heads, d = w.r_k.shape
        kernel = relax_rwkv.wkv7(heads, d, one=self._one(x.r))
        inputs = [x.r, x.gate, x.k, x.v, x.rate, *(self._of(v) for v in (w.k_k, w.k_a, w.r_k))]
        y, bonus = self._in_place(kernel, "wkv7", inputs, [state], heads * d, outputs=2)
        return y, bonus
