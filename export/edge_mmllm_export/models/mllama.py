"""Llama-3.2-Vision's backbone: a llama some of whose layers attend to pictures instead of text.

A cross attention layer reads keys and values that the pictures left in the cross_kv states, and
adds them, and an MLP, scaled by gates. As in the reference, a token that sees no picture attends
to every row there is (also to those of unused tiles), and gets nothing from the MLP; without any
picture these layers do nothing.

Source: Llama 3 (arXiv 2407.21783), section 7.2; `MllamaTextModel` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import CheckpointError
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.checkpoints.view import CheckpointView, Renames
from edge_mmllm_export.models import gated_cross
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.gated_cross import SPAN
from edge_mmllm_export.models.head import logits
from edge_mmllm_export.models.llama import Llama
from edge_mmllm_export.ops.base import Ops, Rope
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: Ids after the vocabulary that are embedded and never predicted. Source: `MllamaTextModel`.
EXTRA_IDS = 8
#: Source: `MllamaTextConfig`.
_DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}


class Mllama:
    """A llama's layers, and between them those that look at pictures.

    Args:
        text: the llama of the layers that attend to text.
        looking: numbers of the layers that do not, among all layers.
    """

    name = "mllama"
    extra_ids = EXTRA_IDS

    def __init__(self, text: Llama, looking: tuple[int, ...]) -> None:
        self.text, self.looking = text, looking
        self.vocab_size, self.hidden_size = text.vocab_size, text.hidden_size
        self.layers, self.context_length = text.layers + len(looking), text.context_length
        self.memory_width = text.hidden_size

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Mllama:
        """Read a published `text_config`. Raises: CheckpointError."""
        f = Fields(checkpoint.config, f"{checkpoint.source}, text_config")
        layers = f.size("num_hidden_layers", 40, limit=MAX_LAYERS)
        looking = f.numbers("cross_attention_layers", range(3, layers, 5), least=0, most=layers - 1)
        if len(set(looking)) == layers:
            raise CheckpointError(
                "the config's 'cross_attention_layers' cannot be used",
                where=f.where,
                expected=f"some, not all, of the numbers from 0 to {layers - 1}",
                found=str(looking)[:80],
            )
        looking = tuple(sorted(set(looking)))
        config = _DEFAULTS | checkpoint.config
        config |= {"model_type": "llama", "num_hidden_layers": layers - len(looking)}
        view = CheckpointView(checkpoint, config, Renames((("", ""),)))
        return cls(Llama.from_checkpoint(view, context), looking)

    def parameters(self) -> list[Parameter]:
        t = self.text.config
        h, f = t.hidden_size, t.intermediate_size
        inner, kv = t.heads * t.head_dim, t.kv_heads * t.head_dim
        table = (t.vocab_size + EXTRA_IDS, h)
        out = [replace(p, shape=table) if p.name == "embed" else p for p in self.text.parameters()]
        for i in range(len(self.looking)):
            p = f"cross.{i}"
            out += [
                Parameter(f"{p}.norm_attn", (h,), "vector"),
                Parameter(f"{p}.attn.q", (inner, h)),
                Parameter(f"{p}.attn.k", (kv, h)),
                Parameter(f"{p}.attn.v", (kv, h)),
                Parameter(f"{p}.attn.o", (h, inner)),
                Parameter(f"{p}.attn.norm_q", (inner,), "vector"),
                Parameter(f"{p}.attn.norm_k", (kv,), "vector"),
                Parameter(f"{p}.gate_attn", (1,), "vector"),
                Parameter(f"{p}.norm_mlp", (h,), "vector"),
                Parameter(f"{p}.mlp.gate", (f, h)),
                Parameter(f"{p}.mlp.up", (f, h)),
                Parameter(f"{p}.mlp.down", (h, f)),
                Parameter(f"{p}.gate_mlp", (1,), "vector"),
            ]
        return out

    def sources(self, layout: Layout) -> dict[str, Source]:
        """Our names to the hub's, whose layers are numbered all together."""
        t, out = self.text.config, {}
        reading = [i for i in range(self.layers) if i not in self.looking]
        for name, source in self.text.sources(layout).items():
            if name.startswith("layers."):
                _, i, _ = name.split(".", 2)
                rest = source.name.removeprefix(f"model.layers.{i}.")
                source = replace(source, name=f"model.layers.{reading[int(i)]}.{rest}")
            out[name] = source
        for p in self.parameters():
            if not p.name.startswith("cross."):
                continue
            _, i, part = p.name.split(".", 2)
            their = f"model.layers.{self.looking[int(i)]}.{_NAMES[part]}"
            if part.startswith("gate_"):
                out[p.name] = Source(their, apply=np.tanh)
            elif part in ("attn.norm_q", "attn.norm_k"):
                heads = t.heads if part.endswith("q") else t.kv_heads
                out[p.name] = gated_cross.head_norm_source(their, heads, t.head_dim)
            else:
                out[p.name] = Source(their)
        return out

    def ignored(self) -> tuple[str, ...]:
        return self.text.ignored()

    def states(self) -> tuple[StateSpec, ...]:
        t = self.text.config
        memory = gated_cross.memory_states(len(self.looking), t.kv_heads, t.head_dim)
        return (*self.text.states(), *memory)

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return self.text.embed(op, w, ids)

    def remember_features(self, op: Ops[T], w: Mapping[str, Weight], features: T, span: T) -> None:
        """Rows of one picture `(rows, hidden)`, seen by the tokens of `span` int64 `(2,)`."""
        t = self.text.config
        op.remember_span(features, span, SPAN)
        for i in range(len(self.looking)):
            p = f"cross.{i}.attn"
            k, v = op.linear(features, w[f"{p}.k"], w[f"{p}.v"])
            k_state, v_state = self._memory(i)
            k = op.norm(k, w[f"{p}.norm_k"], eps=t.norm_eps, groups=t.kv_heads)
            op.remember(k, k_state)
            op.remember(v, v_state)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        t = self.text.config
        delta: T | None = None  # what the last block adds to the residual stream x
        rope, looked = Rope(t.inv_freq, t.context_length), 0
        for i in range(self.layers):
            if i in self.looking:
                x, delta = self._look(op, w, looked, x, delta)
                looked += 1
            else:
                x, delta = self.text.layer(op, w, i - looked, x, delta, rope)
        return logits(op, w, x, delta, eps=t.norm_eps, tied=t.tied)

    def _look(
        self, op: Ops[T], w: Mapping[str, Weight], i: int, x: T, delta: T | None
    ) -> tuple[T, T]:
        """One such layer: x `(seq, hidden)` and the last block's output, both carried."""
        t, p = self.text.config, f"cross.{i}"
        x, h = op.add_norm(x, delta, w[f"{p}.norm_attn"], eps=t.norm_eps)
        (q,) = op.linear(h, w[f"{p}.attn.q"])
        q = op.norm(q, w[f"{p}.attn.norm_q"], eps=t.norm_eps, groups=t.heads)
        k, v = self._memory(i)
        scale = t.head_dim**-0.5
        h = op.cross_attention(q, k, v, heads=t.heads, scale=scale, span=SPAN, blind="all")
        (h,) = op.linear(h, w[f"{p}.attn.o"])
        h = op.mul(h, op.table(w[f"{p}.gate_attn"]))
        x, h = op.add_norm(x, h, w[f"{p}.norm_mlp"], eps=t.norm_eps)
        gate, up = op.linear(h, w[f"{p}.mlp.gate"], w[f"{p}.mlp.up"])
        (h,) = op.linear(op.glu(gate, up, t.activation), w[f"{p}.mlp.down"])
        h = op.mul(h, op.sees(h, SPAN))
        return x, op.mul(h, op.table(w[f"{p}.gate_mlp"]))

    def _memory(self, i: int) -> tuple[StateSpec, StateSpec]:
        first = 2 * self.text.layers + 1 + 2 * i
        k, v = self.states()[first : first + 2]
        return k, v


_NAMES = {
    **gated_cross.NAMES,
    "attn.norm_q": "cross_attn.q_norm.weight",
    "attn.norm_k": "cross_attn.k_norm.weight",
    "gate_attn": "cross_attn_attn_gate",
    "gate_mlp": "cross_attn_mlp_gate",
}
