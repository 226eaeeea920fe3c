"""How causal attention over a key-value state becomes ONNX."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.ops.base import Attention
from edge_mmllm_export.ops.memory import RelativeBias
from edge_mmllm_export.ops.onnx_graph import GraphBuilder
from edge_mmllm_export.ops.onnx_memory import distance_bias
from edge_mmllm_export.ops.onnx_values import Value
from edge_mmllm_export.ops.onnx_weights import WeightStore
from edge_mmllm_export.weights import Weight

#: Head sizes that GroupQueryAttention takes, without and with rope inside it.
#: Source: `group_query_attention_helper.h` of onnxruntime 1.32.
_HEAD_SIZE_STEP, _ROPE_HEAD_SIZE_STEP = 8, 16


class _Builder(Protocol):
    """What attention needs of `OnnxOps`."""

    graph: GraphBuilder
    weights: WeightStore

    #: What `_sequence` made.
    _seq: tuple[str, str] | None
    #: Values that are made once a graph, by what they are.
    _shared: dict[str, str]

    def _use(self, x: Value) -> str: ...

    def _sequence(self) -> tuple[str, str]: ...

    def _distances(self, bias: RelativeBias) -> str: ...

    def _head_norm(self, name: str, width: int, weight: Weight, eps: float) -> str: ...


class OnnxAttention:
    """The part of `OnnxOps` that attends to the tokens before."""

    _seq: tuple[str, str] | None

    def _sequence(self: _Builder) -> tuple[str, str]:
        """`seqlens_k` int32 `(1,)` and `total_sequence_length` int32 `()`, made once a graph."""
        if self._seq is None:
            g, scope, self.graph.scope = self.graph, self.graph.scope, ""
            source = "input_ids" if "input_ids" in g.plain_inputs() else "inputs_embeds"
            length = g.node("Shape", [source], start=0, end=1)[0]
            total = g.node("Add", [length, "position"])[0]
            total = g.node("Cast", [total], to=6)[0]
            one = g.constant("one", np.asarray([1], np.int32))
            last = g.node("Sub", [total, one])[0]
            self._seq = last, g.node("Squeeze", [total])[0]
            self.graph.scope = scope
        return self._seq

    def attention(
        self: _Builder,
        q: Value,
        k: Value,
        v: Value,
        k_state: StateSpec,
        v_state: StateSpec,
        spec: Attention,
    ) -> Value:
        """GroupQueryAttention: rope, cache append and softmax in one kernel.

        Past and present share one buffer when the caller binds the same memory to both. Head
        norms come before it (its own norm inputs have no CPU kernel in onnxruntime 1.32), and so
        does the rope of a head size that its rope does not take.
        """
        g, d = self.graph, spec.head_dim
        if d % _HEAD_SIZE_STEP:
            raise UnsupportedArchitecture(
                f"onnxruntime's attention kernel does not take heads of size {d}",
                expected=f"a multiple of {_HEAD_SIZE_STEP}",
                found=str(d),
            )
        normed = spec.q_norm is not None and spec.k_norm is not None
        fused_rope = spec.rope is not None and d % _ROPE_HEAD_SIZE_STEP == 0
        packed = q.packed
        if (
            packed is not None
            and packed is k.packed
            and packed is v.packed
            and packed.parts is None
            and len(packed.widths) == 3
            and not normed
            and (fused_rope or spec.rope is None)
        ):
            qkv = [packed.name, "", ""]
        else:
            qkv = [self._use(q), self._use(k), self._use(v)]
        if spec.q_norm is not None and spec.k_norm is not None:
            for i, weight in enumerate((spec.q_norm, spec.k_norm)):
                qkv[i] = self._head_norm(qkv[i], (q, k)[i].width, weight, spec.norm_eps)
        if spec.rope is not None and not fused_rope:
            for i, heads in enumerate((spec.heads, spec.kv_heads)):
                rotated = [qkv[i], "position", *self.weights.rope(spec.rope, spec.scale)]
                qkv[i] = g.microsoft("RotaryEmbedding", rotated, num_heads=heads)[0]
        inputs = [*qkv, f"state.{k_state.name}", f"state.{v_state.name}", *self._sequence()]
        if spec.rope is not None and fused_rope:
            inputs += self.weights.rope(spec.rope, spec.scale)
        if spec.relative is not None:
            inputs += [""] * (10 - len(inputs)) + [self._distances(spec.relative)]
        name = g.fresh("attention")
        g.microsoft(
            "GroupQueryAttention",
            inputs,
            [name, f"next.{k_state.name}", f"next.{v_state.name}"],
            num_heads=spec.heads,
            kv_num_heads=spec.kv_heads,
            scale=float(spec.scale) if spec.rope is None else 1.0,
            do_rotary=int(fused_rope),
            local_window_size=spec.window if spec.window is not None else -1,
            softcap=float(spec.softcap) if spec.softcap is not None else None,
        )
        return Value(name, spec.heads * spec.head_dim)

    def _distances(self: _Builder, bias: RelativeBias) -> str:
        """A bias `(1, heads, seq, total)` of GroupQueryAttention, made once a graph."""
        if bias.table.name not in self._shared:
            g, scope, self.graph.scope = self.graph, self.graph.scope, ""
            source = "input_ids" if "input_ids" in g.plain_inputs() else "inputs_embeds"
            length = g.node("Shape", [source], start=0, end=1)[0]
            total = g.node("Add", [length, "position"])[0]
            self._shared[bias.table.name] = distance_bias(self, bias, length, total)
            self.graph.scope = scope
        return self._shared[bias.table.name]

    def _head_norm(self: _Builder, name: str, width: int, weight: Weight, eps: float) -> str:
        """RMS norm of each head of a value `(1, seq, width)`."""
        g, d = self.graph, weight.shape[0]
        heads = g.node("Reshape", [name, g.ints(0, 0, width // d, d)])[0]
        inputs = [heads, self.weights.vector(weight)]
        normed = g.node("SimplifiedLayerNormalization", inputs, epsilon=eps)[0]
        return g.node("Reshape", [normed, g.ints(0, 0, width)])[0]
