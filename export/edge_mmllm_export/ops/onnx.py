"""Lowers a definition to an ONNX graph for onnxruntime, choosing its fused kernels.

Activations are `(1, seq, width)` in the graph, since onnxruntime's attention kernels want a
batch axis. Which kernel serves which op, and why, stands at each method; the measurements are in
`benchmarks/`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops import onnx_mamba, onnx_rwkv
from edge_mmllm_export.ops.base import Activation, Wkv7, Wkv7Weights
from edge_mmllm_export.ops.onnx_attention import OnnxAttention
from edge_mmllm_export.ops.onnx_graph import GraphBuilder
from edge_mmllm_export.ops.onnx_memory import OnnxMemory
from edge_mmllm_export.ops.onnx_values import Packed, Value
from edge_mmllm_export.ops.onnx_vision import OnnxVision
from edge_mmllm_export.ops.onnx_weights import WeightStore
from edge_mmllm_export.weights import Weight

__all__ = ["OnnxOps", "Packed", "Value"]


class OnnxOps(OnnxAttention, OnnxVision, OnnxMemory):
    """Builds one graph.

    Args:
        graph: where nodes and weights go.
        workers: run the quantization of tiles; None packs in the calling thread.
        stored: tensors already in the data file (shared by the stages of a bundle): name ->
            offsets of its regions.
        progress: called with the number of weights (elements) packed.
    """

    def __init__(
        self,
        graph: GraphBuilder,
        *,
        workers: Executor | None = None,
        stored: dict[str, tuple[int, ...]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        self.graph = graph
        self.weights = WeightStore(graph, workers, {} if stored is None else stored, progress)
        self._seq: tuple[str, str] | None = None
        self._length: onnx_rwkv.Sequence | None = None
        self._shared: dict[str, str] = {}
        self.written: set[str] = set()
        #: States whose next value may be written over the present one.
        self.in_place: list[str] = []

    def finish(self) -> None:
        """Wait until every weight is on disk; the first failure is raised."""
        self.weights.finish()

    # -- ops -------------------------------------------------------------------------------

    def _use(self, x: Value) -> str:
        """The name of a value, splitting its packed owner on first use."""
        if x.packed is None:
            return x.name
        packed = x.packed
        if packed.parts is None:
            packed.parts = self.graph.node(
                "Split",
                [packed.name, self.graph.ints(*packed.widths)],
                len(packed.widths),
                axis=-1,
            )
        return packed.parts[x.part]

    def _parts(self, name: str, widths: tuple[int, ...]) -> tuple[Value, ...]:
        if len(widths) == 1:
            return (Value(name, widths[0]),)
        packed = Packed(name, widths)
        return tuple(Value(name, width, packed, i) for i, width in enumerate(widths))

    def rows(self, table: Weight, index: Value) -> Value:
        """index is `(seq,)`; the result gets its batch axis here."""
        g, scheme = self.graph, table.scheme
        ids = g.node("Unsqueeze", [index.name, g.ints(0)])[0]
        if scheme.quantized:
            names = self._blocks([table], as_rows=True)
            name = g.microsoft(
                "GatherBlockQuantized",
                [names[0], ids, *names[1:]],
                bits=scheme.bits,
                block_size=scheme.block_size,
                gather_axis=0,
                quantize_axis=1,
            )[0]
            return Value(name, table.shape[1])
        name = g.node("Gather", [self.weights.floats(table), ids])[0]
        if scheme.bits == 16:
            name = g.node("Cast", [name], to=1)[0]
        return Value(name, table.shape[1])

    def positions(self, x: Value, table: Weight, *, offset: int = 0) -> Value:
        g = self.graph
        seq = g.node("Squeeze", [g.node("Shape", [self._use(x)], start=1, end=2)[0]])[0]
        zero, one = (g.constant("int", np.asarray(i, np.int64)) for i in (0, 1))
        index = g.node("Range", [zero, seq, one])[0]
        if "position" in g.plain_inputs():
            index = g.node("Add", [index, "position"])[0]
        if offset:
            index = g.node("Add", [index, g.ints(offset)])[0]
        return self.rows(table, Value(index, 1))

    def logit_rows(self, x: Value) -> Value:
        return Value(self.graph.node("Gather", [self._use(x), "logit_rows"], axis=1)[0], x.width)

    def linear(
        self, x: Value, *w: Weight, bias: tuple[Weight | None, ...] = ()
    ) -> tuple[Value, ...]:
        """MatMulNBits (int8 activations: accuracy_level 4; level 1 is 4 times slower at 4 bits
        and 300 times at 8), or a float32 product with the weight as it is stored, `(N, K)`."""
        quantized = w[0].scheme.quantized and w[0].scheme.zero != "float"
        if len(w) > 1 and quantized and all(v.scheme == w[0].scheme for v in w):
            return self._parts(self._matmul_nbits(x, w, bias), tuple(v.shape[0] for v in w))
        outputs = []
        for i, v in enumerate(w):
            own = bias[i : i + 1]
            name = (
                self._matmul_nbits(x, (v,), own) if v.scheme.quantized else self._matmul(x, v, own)
            )
            outputs.append(Value(name, v.shape[0]))
        return tuple(outputs)

    def _blocks(self, w: Sequence[Weight], as_rows: bool = False) -> list[str]:
        """The packed tensors as kernels for float32 activations take them."""
        codes, scale, *zero = self.weights.blocks(w, as_rows)
        if w[0].scheme.scale_bits == 16:
            scale = self.widened(scale)
        return [codes, scale, *zero]

    def widened(self, name: str) -> str:
        """A float16 weight as float32: folded once, when a graph is loaded."""
        wide = f"{name}.f32"
        if wide not in self.written:
            self.graph.node("Cast", [name], [wide], to=1)
            self.written.add(wide)
        return wide

    def _matmul_nbits(self, x: Value, w: Sequence[Weight], bias: Sequence[Weight | None]) -> str:
        scheme = w[0].scheme
        names = self._blocks(w)
        inputs = [self._use(x), *names]
        if any(bias):
            inputs += [""] * (5 - len(inputs))
            inputs.append(self.weights.joined(bias, w))
        return self.graph.microsoft(
            "MatMulNBits",
            inputs,
            K=w[0].shape[1],
            N=sum(v.shape[0] for v in w),
            bits=scheme.bits,
            block_size=scheme.block_size,
            accuracy_level=4,
        )[0]

    def _matmul(self, x: Value, w: Weight, bias: Sequence[Weight | None]) -> str:
        g, name = self.graph, self.weights.floats(w)
        if w.scheme.bits == 16:
            name = self.widened(name)
        y = g.microsoft("FusedMatMul", [self._use(x), name], transB=1)[0]
        own = bias[0] if bias else None
        return y if own is None else g.node("Add", [y, self.weights.vector(own)])[0]

    def norm(
        self,
        x: Value,
        weight: Weight,
        *,
        eps: float,
        groups: int = 1,
        bias: Weight | None = None,
    ) -> Value:
        g, name = self.graph, self._use(x)
        if bias is not None and groups > 1:
            return self._group_norm(x, weight, bias, eps, groups)
        if bias is not None:
            inputs = [name, self.weights.vector(weight), self.weights.vector(bias)]
            return Value(g.node("LayerNormalization", inputs, epsilon=eps)[0], x.width)
        if groups == 1:
            inputs = [name, self.weights.vector(weight)]
            return Value(g.node("SimplifiedLayerNormalization", inputs, epsilon=eps)[0], x.width)
        # Normalize each group with a weight of ones, then scale the whole width.
        width = x.width // groups
        parts = g.node("Reshape", [name, g.ints(0, 0, groups, width)])[0]
        inputs = [parts, self.weights.ones(width)]
        normed = g.node("SimplifiedLayerNormalization", inputs, epsilon=eps)[0]
        flat = g.node("Reshape", [normed, g.ints(0, 0, x.width)])[0]
        return Value(g.node("Mul", [flat, self.weights.vector(weight)])[0], x.width)

    def unit_rms(self, x: Value, *, eps: float) -> Value:
        inputs = [self._use(x), self.weights.ones(x.width)]
        name = self.graph.node("SimplifiedLayerNormalization", inputs, epsilon=eps)[0]
        return Value(name, x.width)

    def _group_norm(self, x: Value, weight: Weight, bias: Weight, eps: float, groups: int) -> Value:
        """A layer norm of each group, then scale and bias over the whole width."""
        g, width = self.graph, x.width // groups
        ones = g.fixed(f"ones.{width}", np.ones(width, np.float32))
        parts = g.node("Reshape", [self._use(x), g.ints(0, 0, groups, width)])[0]
        normed = g.node("LayerNormalization", [parts, ones], epsilon=eps)[0]
        flat = g.node("Reshape", [normed, g.ints(0, 0, x.width)])[0]
        scaled = g.node("Mul", [flat, self.weights.vector(weight)])[0]
        return Value(g.node("Add", [scaled, self.weights.vector(bias)])[0], x.width)

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
        if bias is not None:
            # SkipLayerNormalization takes 6 times as long over 512 rows, and twice over one.
            total = self.add(x, delta)
            return total, self.norm(total, weight, eps=eps, bias=bias)
        outputs = [self.graph.fresh("normed"), "", "", self.graph.fresh("residual")]
        self.graph.microsoft(
            "SkipSimplifiedLayerNormalization",
            [self._use(x), self._use(delta), self.weights.vector(weight)],
            outputs,
            epsilon=eps,
        )
        return Value(outputs[3], x.width), Value(outputs[0], x.width)

    def add(self, a: Value, b: Value) -> Value:
        return Value(self.graph.node("Add", [self._use(a), self._use(b)])[0], a.width)

    def mul(self, a: Value, b: Value) -> Value:
        return Value(self.graph.node("Mul", [self._use(a), self._use(b)])[0], a.width)

    def split(self, x: Value, sizes: tuple[int, ...]) -> tuple[Value, ...]:
        return self._parts(self._use(x), sizes)

    def activation(self, x: Value, kind: Activation) -> Value:
        g, name = self.graph, self._use(x)
        simple = {"relu": "Relu", "sigmoid": "Sigmoid", "tanh": "Tanh"}
        if kind in simple:
            return Value(g.node(simple[kind], [name])[0], x.width)
        if kind == "relu2":
            positive = g.node("Relu", [name])[0]
            return Value(g.node("Mul", [positive, positive])[0], x.width)
        if kind == "minus_exp":
            return Value(g.node("Neg", [g.node("Exp", [name])[0]])[0], x.width)
        if kind in ("silu", "quick_gelu"):
            alpha = 1.0 if kind == "silu" else 1.702
            return Value(g.microsoft("QuickGelu", [name], alpha=alpha)[0], x.width)
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        return Value(g.node("Gelu", [name], approximate=approximate)[0], x.width)

    def glu(self, gate: Value, up: Value, kind: Activation) -> Value:
        return self.mul(self.activation(gate, kind), up)

    # -- sequence mixing -------------------------------------------------------------------

    def stream_angles(
        self, state: StateSpec, inv_freq: NDArray[np.float32], streams: NDArray[np.int64]
    ) -> Value:
        """The value is `(seq, n)`, without a batch axis, as `rotary` wants its tables."""
        g, first = self.graph, f"state.{state.name}"
        at = g.node("Add", ["places", first])[0]
        last = g.node("Reshape", [g.node("ReduceMax", [at], keepdims=1)[0], g.ints(1)])[0]
        behind = g.node("Add", [last, g.ints(1)])[0]
        g.node("Max", [first, behind], [f"next.{state.name}"])
        table = np.zeros((3, len(inv_freq)), np.float32)
        table[streams, np.arange(len(inv_freq))] = inv_freq
        own = g.node("Transpose", [g.node("Cast", [at], to=1)[0]], perm=[1, 0])[0]
        name = g.node("MatMul", [own, g.fixed(f"{state.name}.turns", table)])[0]
        return Value(name, len(inv_freq))

    def causal_conv(
        self, x: Value, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
    ) -> Value:
        name = onnx_mamba.causal_conv(self, self._use(x), weight, bias, state, silu=silu)
        return Value(name, x.width)

    def time_step(self, dt: Value, bias: Weight | None, limit: tuple[float, float]) -> Value:
        return Value(onnx_mamba.time_step(self, self._use(dt), dt.width, bias, limit), dt.width)

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
        names = self._use(x), self._use(dt), self._use(b), self._use(c)
        return Value(onnx_mamba.selective_scan(self, *names, decay, skip, state), x.width)

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
        names = self._use(q), self._use(k), self._use(v), self._use(dt)
        name = onnx_mamba.gated_linear_attention(self, *names, decay, state, groups=groups)
        return Value(name, v.width)

    def head_scale(self, x: Value, weight: Weight) -> Value:
        return Value(onnx_mamba.head_scale(self, self._use(x), x.width, weight), x.width)

    # -- RWKV ------------------------------------------------------------------------------

    def token_shift(self, x: Value, state: StateSpec) -> Value:
        return Value(onnx_rwkv.token_shift(self.graph, self._use(x), state.name), x.width)

    def mix(self, x: Value, previous: Value, *mu: Weight) -> tuple[Value, ...]:
        g, name = self.graph, self._use(x)
        delta = g.node("Sub", [self._use(previous), name])[0]
        parts = [g.node("Mul", [delta, self.weights.vector(m)])[0] for m in mu]
        return tuple(Value(g.node("Add", [name, part])[0], x.width) for part in parts)

    def lerp(self, x: Value, y: Value, amount: Value) -> Value:
        g, name = self.graph, self._use(x)
        delta = g.node("Sub", [self._use(y), name])[0]
        part = g.node("Mul", [delta, self._use(amount)])[0]
        return Value(g.node("Add", [name, part])[0], x.width)

    def _lengths(self) -> onnx_rwkv.Sequence:
        if self._length is None:
            self._length = onnx_rwkv.Sequence(self.graph)
        return self._length

    def wkv4(self, k: Value, v: Value, decay: Weight, bonus: Weight, state: StateSpec) -> Value:
        none = np.zeros(k.width, np.float32)
        ages = self.weights.fixed(decay, ".ages", np.stack([none, decay.values]))
        extra = self.weights.fixed(bonus, ".pair", np.stack([bonus.values, none]))
        names = self._use(k), self._use(v), ages, extra, state.name
        return Value(onnx_rwkv.wkv4(self.graph, *names, k.width), k.width)

    def wkv6(
        self,
        r: Value,
        k: Value,
        v: Value,
        log_decay: Value | Weight,
        bonus: Weight,
        state: StateSpec,
    ) -> Value:
        g, heads, width = self.graph, state.shape[1], r.width
        rkv = self._use(r), self._use(k), self._use(v)
        if isinstance(log_decay, Weight):
            flat = self.weights.fixed(log_decay, ".flat", log_decay.values.reshape(width))
            gone = onnx_rwkv.constant_decay(g, flat, self._lengths().length, width)
        else:
            gone = self._use(log_decay)
        y = onnx_rwkv.wkv6(g, rkv, gone, state.name, heads, width)
        u = self.weights.fixed(bonus, ".flat", bonus.values.reshape(width))
        extra = onnx_rwkv.head_bonus(g, *rkv, u, heads, width)
        return Value(g.node("Add", [y, extra])[0], width)

    def wkv7(self, x: Wkv7[Value], w: Wkv7Weights, state: StateSpec) -> tuple[Value, Value]:
        g, width = self.graph, x.r.width
        heads, d = w.r_k.shape
        r, gate, k, v, rate = (self._use(y) for y in (x.r, x.gate, x.k, x.v, x.rate))
        scaled = g.node("Mul", [k, self.weights.vector(w.k_k)])[0]
        unit = onnx_rwkv.unit_keys(g, scaled, heads, d)
        rest = g.fixed(f"{w.k_a.name}.rest", 1 - w.k_a.values)
        share = g.node("Add", [g.node("Mul", [rate, self.weights.vector(w.k_a)])[0], rest])[0]
        k = g.node("Mul", [k, share])[0]
        names = onnx_rwkv.Wkv7Names(r, gate, k, v, unit, rate, state.name)
        y = onnx_rwkv.wkv7(g, names, self._lengths(), heads, d)
        r_k = self.weights.fixed(w.r_k, ".flat", w.r_k.values.reshape(width))
        bonus = onnx_rwkv.head_bonus(g, r, k, v, r_k, heads, width)
        return Value(y, width), Value(bonus, width)
