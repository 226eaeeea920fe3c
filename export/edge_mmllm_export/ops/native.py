"""Lowers a definition to a program for the native kernels: one ONNX node that is a whole forward.

The kernels are a custom-op library for onnxruntime (`edge_mmllm_runtime/native`), which a device
may build with its own compiler. The program reads the same weights, in the same places of the data
file, and carries the same states as the graph that stock onnxruntime runs, so a bundle serves
both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

import numpy as np

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.base import Activation, Attention, Rope, Wkv7, Wkv7Weights
from edge_mmllm_export.ops.native_program import (
    Activations,
    Buffer,
    Class,
    Op,
    Operand,
    StateUse,
    View,
    Word,
    encode,
    real,
)
from edge_mmllm_export.ops.onnx_graph import GraphBuilder
from edge_mmllm_export.ops.onnx_weights import WeightStore
from edge_mmllm_export.ops.relax_missing import MissingOps
from edge_mmllm_export.weights import Weight

DOMAIN, OP_TYPE = "edge_mmllm", "Program"

_ACTIVATIONS = get_args(Activation)
_FLOAT32, _FLOAT16, _INT4, _INT8 = range(4)
_MAX_HEAD = 256


class NativeOps(MissingOps[View]):
    """Records one program. Values are views of buffers, `(seq, width)`.

    Args:
        graph: declares the weights, in the data file of the graph for stock onnxruntime.
        weights: gives them their places; those already written are not written again.
        states: the model's, in the order of the contract.
    """

    def __init__(
        self, graph: GraphBuilder, weights: WeightStore, states: Sequence[StateSpec]
    ) -> None:
        self.graph, self.weights = graph, weights
        self._states = {s.name: i for i, s in enumerate(states)}
        self._fixed_inputs = len(graph.inputs())
        self._names: dict[str, int] = {}
        self._ops: list[Op] = []
        self._matrices: list[tuple[int, ...]] = []
        self._known_matrices: dict[str, int] = {}
        self._buffers = self._quantized = 0
        self._activations: dict[tuple[View, int], Activations] = {}

    # -- recording -------------------------------------------------------------------------

    def _new(self, width: int, kind: int = 0) -> View:
        self._buffers += 1
        return View(Buffer(self._buffers, width, kind), 0, width)

    def _add(
        self,
        opcode: int,
        cls: Class,
        out: View,
        *words: Word,
        also: tuple[Operand, ...] = (),
    ) -> View:
        """Records an op that writes `out` (its first argument) and whatever is in `also`."""
        kind = out.buffer.kind
        self._ops.append(Op(opcode, cls, kind, (out, *words), (out, *also)))
        return out

    def _tensor(self, name: str | None) -> int:
        """The place of a weight among the node's inputs."""
        if name is None:
            return -1
        return self._names.setdefault(name, self._fixed_inputs + len(self._names))

    def _vector(self, w: Weight | None) -> int:
        return -1 if w is None else self._tensor(self.weights.vector(w))

    def _state(self, state: StateSpec) -> StateUse:
        return StateUse(self._states[state.name])

    def finish(self, logits: View, *, source: str, hidden: int, vocab: int) -> None:
        """Adds the node to the graph; its outputs are `logits` and the next states."""
        inputs = self.graph.inputs()
        header = [
            int(source == "embeds"),
            hidden,
            int("position" in inputs),
            len(self._states),
            vocab,
        ]
        words = encode(self._ops, logits, header, self._matrices)
        self.graph.node(
            OP_TYPE,
            [*inputs, *self._names],
            ["logits", *(f"next.{name}" for name in self._states)],
            domain=DOMAIN,
            program=words,
        )

    # -- rows and matrices -----------------------------------------------------------------

    def rows(self, table: Weight, index: View) -> View:
        return self._add(1, "rows", self._new(table.shape[1]), *self._table(table))

    def positions(self, x: View, table: Weight, *, offset: int = 0) -> View:
        if "position" not in self.graph.inputs():
            raise UnsupportedArchitecture("the native kernels count positions from a state")
        kind, rows, block, *places = self._table(table)
        out = self._new(table.shape[1])
        return self._add(16, "rows", out, kind, rows, block, offset, *places)

    def _table(self, table: Weight) -> list[int]:
        """Kind, rows, block and tensors of a table whose rows are picked."""
        scheme = table.scheme
        if scheme.quantized:
            names = self.weights.blocks([table], as_rows=True)
            places = [self._tensor(name) for name in names] + [-1] * (3 - len(names))
            kind, block = (_INT4 if scheme.bits == 4 else _INT8), scheme.block_size
        else:
            places = [self._tensor(self.weights.floats(table)), -1, -1]
            kind, block = (_FLOAT16 if scheme.bits == 16 else _FLOAT32), 0
        return [kind, table.shape[0], block, *places]

    def ids(self) -> View:
        """The token ids that the caller gives; only `rows` takes them."""
        return View(Buffer(0, 1, 0), 0, 1)

    def given(self, width: int) -> View:
        """The embeddings that the caller gives."""
        return self._add(2, "rows", self._new(width))

    def logit_rows(self, x: View) -> View:
        return self._add(3, "rows", self._new(x.width, 1), x)

    def linear(self, x: View, *w: Weight, bias: tuple[Weight | None, ...] = ()) -> tuple[View, ...]:
        quantized = w[0].scheme.quantized and w[0].scheme.zero != "float"
        if len(w) > 1 and quantized and all(v.scheme == w[0].scheme for v in w):
            out = self._product(x, w, bias)
            parts, offset = [], 0
            for v in w:
                parts.append(View(out.buffer, offset, v.shape[0]))
                offset += v.shape[0]
            return tuple(parts)
        return tuple(self._product(x, (v,), bias[i : i + 1]) for i, v in enumerate(w))

    def _product(self, x: View, w: Sequence[Weight], bias: Sequence[Weight | None]) -> View:
        scheme, kind = w[0].scheme, x.buffer.kind
        activations: Word = -1
        if scheme.quantized:
            activations = self._quantize(x, scheme.block_size)
        joined = self.weights.joined(bias, w) if any(bias) else None
        out = self._new(sum(v.shape[0] for v in w), kind)
        words = (x, activations, self._matrix(w), self._tensor(joined))
        return self._add(20, "linear", out, *words)

    def _quantize(self, x: View, block: int) -> Activations:
        key = x, block
        if key not in self._activations:
            self._quantized += 1
            made = Activations(self._quantized, x.width, block, x.buffer.kind)
            self._activations[key] = made
            self._ops.append(Op(13, "rows", x.buffer.kind, (x, made), (made,)))
        return self._activations[key]

    def _matrix(self, w: Sequence[Weight]) -> int:
        scheme, name = w[0].scheme, "+".join(v.name for v in w)
        if name not in self._known_matrices:
            n, k = sum(v.shape[0] for v in w), w[0].shape[1]
            if scheme.quantized:
                names = self.weights.blocks(w)
                places = [self._tensor(v) for v in names] + [-1] * (3 - len(names))
                kind = _INT4 if scheme.bits == 4 else _INT8
                zero = {"none": 0, "int": 1, "float": 2}[scheme.zero]
                row = (kind, n, k, scheme.block_size, *places, zero)
            else:
                kind = _FLOAT16 if scheme.bits == 16 else _FLOAT32
                row = (kind, n, k, 0, self._tensor(self.weights.floats(w[0])), -1, -1, 0)
            self._known_matrices[name] = len(self._matrices)
            self._matrices.append(row)
        return self._known_matrices[name]

    # -- row by row ------------------------------------------------------------------------

    def norm(
        self,
        x: View,
        weight: Weight,
        *,
        eps: float,
        groups: int = 1,
        bias: Weight | None = None,
    ) -> View:
        words = (x, groups, self._vector(weight), self._vector(bias), real(eps))
        return self._add(4, "rows", self._new(x.width, x.buffer.kind), *words)

    def unit_rms(self, x: View, *, eps: float) -> View:
        out = self._new(x.width, x.buffer.kind)
        return self._add(4, "rows", out, x, 1, -1, -1, real(eps))

    def add_norm(
        self,
        x: View,
        delta: View | None,
        weight: Weight,
        *,
        eps: float,
        bias: Weight | None = None,
    ) -> tuple[View, View]:
        total = x if delta is None else self.add(x, delta)
        return total, self.norm(total, weight, eps=eps, bias=bias)

    def add(self, a: View, b: View) -> View:
        return self._add(5, "rows", self._new(a.width, a.buffer.kind), a, b)

    def mul(self, a: View, b: View) -> View:
        return self._add(6, "rows", self._new(a.width, a.buffer.kind), a, b)

    def split(self, x: View, sizes: tuple[int, ...]) -> tuple[View, ...]:
        ends = np.cumsum(sizes).tolist()
        starts = zip(ends, sizes, strict=True)
        return tuple(View(x.buffer, x.offset + end - size, size) for end, size in starts)

    def activation(self, x: View, kind: Activation) -> View:
        out = self._new(x.width, x.buffer.kind)
        return self._add(7, "rows", out, x, _ACTIVATIONS.index(kind))

    def glu(self, gate: View, up: View, kind: Activation) -> View:
        out = self._new(gate.width, gate.buffer.kind)
        return self._add(8, "rows", out, gate, up, _ACTIVATIONS.index(kind))

    def mix(self, x: View, previous: View, *mu: Weight) -> tuple[View, ...]:
        return tuple(
            self._add(9, "rows", self._new(x.width), x, previous, self._vector(m)) for m in mu
        )

    def lerp(self, x: View, y: View, amount: View) -> View:
        return self._add(10, "rows", self._new(x.width), x, y, amount)

    def head_scale(self, x: View, weight: Weight) -> View:
        words = (x, weight.shape[0], self._vector(weight))
        return self._add(11, "rows", self._new(x.width), *words)

    def time_step(self, dt: View, bias: Weight | None, limit: tuple[float, float]) -> View:
        words = (dt, self._vector(bias), real(limit[0]), real(limit[1]))
        return self._add(12, "rows", self._new(dt.width), *words)

    # -- along the sequence ----------------------------------------------------------------

    def attention(
        self,
        q: View,
        k: View,
        v: View,
        k_state: StateSpec,
        v_state: StateSpec,
        spec: Attention,
    ) -> View:
        if spec.head_dim > _MAX_HEAD or spec.relative is not None:
            raise UnsupportedArchitecture("the native kernels have no such attention")
        rope = self._rope(spec.rope, spec.scale)
        q_norm, k_norm = self._vector(spec.q_norm), self._vector(spec.k_norm)
        eps = real(spec.norm_eps)
        states = self._state(k_state), self._state(v_state)
        queries = self._new(q.width)
        self._add(14, "rows", queries, q, spec.heads, spec.head_dim, q_norm, eps, *rope)
        words = (k, v, spec.kv_heads, spec.head_dim, k_norm, eps, *rope, *states)
        self._ops.append(Op(15, "rows", 0, words, states))
        return self._add(
            37,
            "mix",
            self._new(q.width),
            queries,
            spec.heads,
            spec.kv_heads,
            spec.head_dim,
            *states,
            real(spec.scale if spec.rope is None else 1.0),
            real(spec.softcap or 0.0),
            spec.window or 0,
        )

    def _rope(self, rope: Rope | None, scale: float) -> tuple[int, int]:
        """The tables, with the scale in them: see `WeightStore.rope`."""
        if rope is None:
            return -1, -1
        cos, sin = self.weights.rope(rope, scale)
        return self._tensor(cos), self._tensor(sin)

    def causal_conv(
        self, x: View, weight: Weight, bias: Weight | None, state: StateSpec, *, silu: bool
    ) -> View:
        own = self._state(state)
        taps = self.weights.fixed(weight, ".taps", np.ascontiguousarray(weight.values.T))
        words = (x, weight.shape[1], self._tensor(taps), self._vector(bias), int(silu), own)
        return self._add(31, "mix", self._new(x.width), *words, also=(own,))

    def selective_scan(
        self,
        x: View,
        dt: View,
        b: View,
        c: View,
        decay: Weight,
        skip: Weight,
        state: StateSpec,
    ) -> View:
        own = self._state(state)
        rates = self.weights.fixed(decay, ".transposed", np.ascontiguousarray(decay.values.T))
        words = (x, dt, b, c, self._tensor(rates), self._vector(skip), own)
        return self._add(32, "mix", self._new(x.width), *words, also=(own,))

    def gated_linear_attention(
        self,
        q: View,
        k: View,
        v: View,
        dt: View,
        decay: Weight,
        state: StateSpec,
        *,
        groups: int,
    ) -> View:
        own = self._state(state)
        words = (q, k, v, dt, self._vector(decay), groups, own)
        return self._add(33, "mix", self._new(v.width), *words, also=(own,))

    def token_shift(self, x: View, state: StateSpec) -> View:
        own = self._state(state)
        return self._add(30, "mix", self._new(x.width), x, own, also=(own,))

    def wkv4(self, k: View, v: View, decay: Weight, bonus: Weight, state: StateSpec) -> View:
        own = self._state(state)
        words = (k, v, self._vector(decay), self._vector(bonus), own)
        return self._add(34, "mix", self._new(k.width), *words, also=(own,))

    def wkv6(
        self,
        r: View,
        k: View,
        v: View,
        log_decay: View | Weight,
        bonus: Weight,
        state: StateSpec,
    ) -> View:
        own = self._state(state)
        gone: tuple[Word, ...] = (
            (1, self._vector(log_decay)) if isinstance(log_decay, Weight) else (0, log_decay)
        )
        words = (r, k, v, state.shape[1], *gone, self._vector(bonus), own)
        return self._add(35, "mix", self._new(r.width), *words, also=(own,))

    def wkv7(self, x: Wkv7[View], w: Wkv7Weights, state: StateSpec) -> tuple[View, View]:
        own, bonus = self._state(state), self._new(x.r.width)
        vectors = [self._vector(v) for v in (w.k_k, w.k_a, w.r_k)]
        values = (bonus, x.r, x.gate, x.k, x.v, x.rate)
        words: tuple[Word, ...] = (*values, state.shape[1], *vectors, own)
        y = self._add(36, "mix", self._new(x.r.width), *words, also=(bonus, own))
        return y, bonus
