"""Idefics' backbone: a llama whose layers alternate with gated cross attention to pictures.

Before every `interval`-th layer a block attends to what the pictures left in the cross_kv states
and adds it, and an MLP, scaled by gates that training opened from zero. A token sees the pictures
whose span it lies in; one that sees none gets nothing from the attention.

Source: Flamingo (arXiv 2204.14198) section 3.1.2, OBELICS (2306.16527), and
`modeling_idefics.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import CheckpointError
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.checkpoints.view import CheckpointView, Renames
from edge_mmllm_export.models import gated_cross
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.models.gated_cross import SPAN
from edge_mmllm_export.models.head import logits
from edge_mmllm_export.models.llama import Llama
from edge_mmllm_export.ops.base import Ops, Rope
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class IdeficsConfig:
    """What the cross attention blocks add to the llama.

    Attributes:
        memory_width: of the pictures' rows.
        interval: layers from one block to the next.
        qk_norms: RMS norms over each head of q and k.
        gate_size: 1, or the hidden size.
        extra_vocab: ids after the llama's own, in tables of their own.
    """

    memory_width: int
    interval: int
    qk_norms: bool
    gate_size: int
    extra_vocab: int


class Idefics:
    """A llama that looks at pictures."""

    name = "idefics"

    def __init__(self, text: Llama, config: IdeficsConfig) -> None:
        self.text, self.config = text, config
        self.vocab_size, self.hidden_size = text.vocab_size, text.hidden_size
        self.layers, self.context_length = text.layers, text.context_length
        self.memory_width = config.memory_width
        self.blocks = text.layers // config.interval

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Idefics:
        """Read config.json. Raises: CheckpointError."""
        f = Fields(checkpoint.config, f"{checkpoint.source}, config.json")
        extra = f.size("additional_vocab_size", 0, least=0)
        defaults = {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        }
        config = defaults | checkpoint.config | {"model_type": "llama"}
        config["vocab_size"] = f.size("vocab_size", 32000) + extra
        view = CheckpointView(checkpoint, config, Renames((("", ""),)))
        text = Llama.from_checkpoint(view, context)
        vision = Fields(f.table("vision_config"), f"{f.where}, vision_config")
        interval = f.size("cross_layer_interval", 1)
        if text.layers % interval or (text.config.tied and extra):
            raise CheckpointError(
                "the config's sizes do not fit together",
                where=f.where,
                expected="cross_layer_interval divides num_hidden_layers, and a head of its own "
                "where additional_vocab_size is not 0",
                found=f"{interval} and {text.layers}, tie_word_embeddings {text.config.tied}",
            )
        vector = f.one_of("alpha_type", ("vector", "float"), "float") == "vector"
        return cls(
            text,
            IdeficsConfig(
                memory_width=vision.size("embed_dim", 768),
                interval=interval,
                qk_norms=f.flag("qk_layer_norms", False),
                gate_size=text.hidden_size if vector else 1,
                extra_vocab=extra,
            ),
        )

    def parameters(self) -> list[Parameter]:
        c, t = self.config, self.text.config
        h, inner, f = t.hidden_size, t.heads * t.head_dim, t.intermediate_size
        out = self.text.parameters()
        for i in range(self.blocks):
            p = f"cross.{i}"
            out += [
                Parameter(f"{p}.norm_attn", (h,), "vector"),
                Parameter(f"{p}.attn.q", (inner, h)),
                Parameter(f"{p}.attn.k", (inner, c.memory_width)),
                Parameter(f"{p}.attn.v", (inner, c.memory_width)),
                Parameter(f"{p}.attn.o", (h, inner)),
                Parameter(f"{p}.gate_attn", (c.gate_size,), "vector"),
                Parameter(f"{p}.norm_mlp", (h,), "vector"),
                Parameter(f"{p}.mlp.gate", (f, h)),
                Parameter(f"{p}.mlp.up", (f, h)),
                Parameter(f"{p}.mlp.down", (h, f)),
                Parameter(f"{p}.gate_mlp", (c.gate_size,), "vector"),
            ]
            if c.qk_norms:
                out += [Parameter(f"{p}.attn.norm_{n}", (inner,), "vector") for n in "qk"]
        return out

    def sources(self, layout: Layout) -> dict[str, Source]:
        """Our names to the hub's."""
        out = self.text.sources(layout)
        if self.config.extra_vocab:
            embed, head = "model.embed_tokens", "lm_head"
            extra = f"{embed}.additional_embedding.weight", f"{head}.additional_fc.weight"
            out["embed"] = Source(f"{embed}.weight", more=extra[:1])
            out["head"] = Source(f"{head}.weight", more=extra[1:])
        heads, d = self.text.config.heads, self.text.config.head_dim
        for p in self.parameters():
            if not p.name.startswith("cross."):
                continue
            _, i, part = p.name.split(".", 2)
            their = f"model.gated_cross_attn_layers.{i}.{_NAMES[part]}"
            if part.startswith("gate_"):
                out[p.name] = Source(their, whole=np.tanh)  # stored with leading axes of one
            elif part in ("attn.norm_q", "attn.norm_k"):
                out[p.name] = gated_cross.head_norm_source(their, heads, d)
            else:
                out[p.name] = Source(their)
        return out

    def ignored(self) -> tuple[str, ...]:
        return self.text.ignored()

    def states(self) -> tuple[StateSpec, ...]:
        t = self.text.config
        memory = gated_cross.memory_states(self.blocks, t.heads, t.head_dim)
        return (*self.text.states(), *memory)

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return self.text.embed(op, w, ids)

    def remember_features(self, op: Ops[T], w: Mapping[str, Weight], features: T, span: T) -> None:
        """Rows of one picture `(rows, memory_width)`, seen by the tokens of `span` int64 `(2,)`."""
        op.remember_span(features, span, SPAN)
        for i in range(self.blocks):
            p = f"cross.{i}.attn"
            k, v = op.linear(features, w[f"{p}.k"], w[f"{p}.v"])
            k_state, v_state = self._memory(i)
            op.remember(self._head_norm(op, w, f"{p}.norm_k", k), k_state)
            op.remember(v, v_state)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        t = self.text.config
        delta: T | None = None  # what the last block adds to the residual stream x
        rope = Rope(t.inv_freq, t.context_length)
        for i in range(t.layers):
            if i % self.config.interval == 0:
                x, delta = self._look(op, w, i // self.config.interval, x, delta)
            x, delta = self.text.layer(op, w, i, x, delta, rope)
        return logits(op, w, x, delta, eps=t.norm_eps, tied=t.tied)

    def _look(
        self, op: Ops[T], w: Mapping[str, Weight], i: int, x: T, delta: T | None
    ) -> tuple[T, T]:
        """One gated block: x `(seq, hidden)` and the last block's output, both carried."""
        t, p = self.text.config, f"cross.{i}"
        x, h = op.add_norm(x, delta, w[f"{p}.norm_attn"], eps=t.norm_eps)
        (q,) = op.linear(h, w[f"{p}.attn.q"])
        q = self._head_norm(op, w, f"{p}.attn.norm_q", q)
        scale = t.head_dim**-0.5
        h = op.cross_attention(q, *self._memory(i), heads=t.heads, scale=scale, span=SPAN)
        (h,) = op.linear(h, w[f"{p}.attn.o"])
        h = op.mul(h, op.table(w[f"{p}.gate_attn"]))
        x, h = op.add_norm(x, h, w[f"{p}.norm_mlp"], eps=t.norm_eps)
        gate, up = op.linear(h, w[f"{p}.mlp.gate"], w[f"{p}.mlp.up"])
        (h,) = op.linear(op.glu(gate, up, t.activation), w[f"{p}.mlp.down"])
        return x, op.mul(h, op.table(w[f"{p}.gate_mlp"]))

    def _memory(self, i: int) -> tuple[StateSpec, StateSpec]:
        first = 2 * self.layers + 1 + 2 * i
        k, v = self.states()[first : first + 2]
        return k, v

    def _head_norm(self, op: Ops[T], w: Mapping[str, Weight], name: str, x: T) -> T:
        if not self.config.qk_norms:
            return x
        return op.norm(x, w[name], eps=self.text.config.norm_eps, groups=self.text.config.heads)


_NAMES = {
    **gated_cross.NAMES,
    "attn.norm_q": "cross_attn.q_layer_norm.weight",
    "attn.norm_k": "cross_attn.k_layer_norm.weight",
    "gate_attn": "alpha_cross_attn",
    "gate_mlp": "alpha_dense",
}
