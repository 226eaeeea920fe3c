"""T5, T5 v1.1 and Flan-T5: an encoder reads the prompt once, a decoder answers.

Attention is not scaled; its scores get a learned bias by distance, which all layers of a stack
share. v1.1 and Flan have a gated MLP and a head of their own; v1.0 ties the head to the embedding
and scales its input. The decoder finds the prompt in cross_kv states, which `remember` fills.

Source: T5 (arXiv 1910.10683), Flan (2210.11416) and `modeling_t5.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import CAPACITY, MEMORY, StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, Layout
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.head import logits
from edge_mmllm_export.ops.base import Activation, Attention, Ops
from edge_mmllm_export.ops.memory import RelativeBias
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: Distances know no limit, so the decoder's room is a choice: what the longest answers take.
DEFAULT_CONTEXT = 2048
#: Rows compared to tell a copy of the embedding from a head of its own.
_COMPARED_ROWS = 64
_ACTIVATIONS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
    "gated-relu": ("relu", True),
}


@dataclass(frozen=True)
class T5Config:
    """Sizes and switches.

    Attributes:
        scaled: the head reads its input times `hidden_size ** -0.5` (v1.0).
        gated: an MLP of two projections, one through the activation.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    encoder_layers: int
    layers: int
    heads: int
    head_dim: int
    buckets: int
    max_distance: int
    norm_eps: float
    context_length: int
    activation: Activation
    gated: bool
    tied: bool
    scaled: bool
    decoder_start_id: int


class T5:
    """Encoder-decoder with relative positions."""

    name = "t5"

    def __init__(self, config: T5Config) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers
        self.context_length: int | None = c.context_length
        self.decoder_start_id = c.decoder_start_id

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> T5:
        """Read config.json. Raises: CheckpointError, UnsupportedArchitecture."""
        where = f"{checkpoint.source}, config.json"
        if checkpoint.layout != "hub":
            raise UnsupportedArchitecture(
                "T5 is read from the hub layout only",
                where=where,
                found=checkpoint.layout,
                fix="export from the original release",
            )
        f = Fields(checkpoint.config, where)
        kind = f.text("feed_forward_proj", "relu")
        if kind not in _ACTIVATIONS:
            raise UnsupportedArchitecture(
                f"a feed-forward {kind!r} has no definition here",
                where=where,
                expected=" | ".join(_ACTIVATIONS),
            )
        activation, gated = _ACTIVATIONS[kind]
        layers = f.size("num_layers", 6, limit=MAX_LAYERS)
        # Absent means true, and v1.0; since transformers 5 the scale has a key of its own.
        says_tied = f.flag("tie_word_embeddings", True)
        return cls(
            T5Config(
                vocab_size=f.size("vocab_size"),
                hidden_size=f.size("d_model", 512),
                intermediate_size=f.size("d_ff", 2048),
                encoder_layers=layers,
                layers=f.size("num_decoder_layers", layers, limit=MAX_LAYERS),
                heads=f.size("num_heads", 8),
                head_dim=f.size("d_kv", 64),
                buckets=f.size("relative_attention_num_buckets", 32, least=4),
                max_distance=f.size("relative_attention_max_distance", 128, limit=1 << 16),
                norm_eps=f.number("layer_norm_epsilon", 1e-6),
                context_length=context or DEFAULT_CONTEXT,
                activation=activation,
                gated=gated,
                tied=_tied(checkpoint, says_tied),
                scaled=f.flag("scale_decoder_outputs", says_tied),
                decoder_start_id=f.size("decoder_start_token_id", 0, least=0),
            )
        )

    def parameters(self) -> list[Parameter]:
        c = self.config
        h, table = c.hidden_size, (c.buckets, c.heads)
        out = [
            Parameter("embed", (c.vocab_size, h), "embedding"),
            Parameter("encoder.bias", table, "vector"),
        ]
        for i in range(c.encoder_layers):
            p = f"encoder.layers.{i}"
            out += [*self._attention_parameters(p, "attn"), *self._mlp_parameters(p)]
        out += [Parameter("encoder.norm", (h,), "vector"), Parameter("bias", table, "vector")]
        for i in range(c.layers):
            p = f"layers.{i}"
            for name in ("attn", "cross"):
                out += self._attention_parameters(p, name)
            out += self._mlp_parameters(p)
        out.append(Parameter("norm", (h,), "vector"))
        if not c.tied:
            out.append(Parameter("head", (c.vocab_size, h), "head"))
        return out

    def _attention_parameters(self, p: str, name: str) -> list[Parameter]:
        h, inner = self.config.hidden_size, self.config.heads * self.config.head_dim
        return [
            Parameter(f"{p}.norm_{name}", (h,), "vector"),
            *(Parameter(f"{p}.{name}.{n}", (inner, h)) for n in "qkv"),
            Parameter(f"{p}.{name}.o", (h, inner)),
        ]

    def _mlp_parameters(self, p: str) -> list[Parameter]:
        h, f = self.config.hidden_size, self.config.intermediate_size
        gate = [Parameter(f"{p}.mlp.gate", (f, h))] if self.config.gated else []
        up, down = Parameter(f"{p}.mlp.up", (f, h)), Parameter(f"{p}.mlp.down", (h, f))
        return [Parameter(f"{p}.norm_mlp", (h,), "vector"), *gate, up, down]

    def sources(self, layout: Layout) -> dict[str, Source]:
        """Our names to the hub's."""
        c, out = self.config, {}
        mlp = {"gate": "wi_0", "up": "wi_1" if c.gated else "wi", "down": "wo"}
        frame = {"embed": "shared", "head": "lm_head"}
        for p in self.parameters():
            name = p.name.removeprefix("encoder.")
            stack = "decoder" if name == p.name else "encoder"
            if name in frame:
                out[p.name] = Source(f"{frame[name]}.weight")
                continue
            if name == "norm":
                scaled = c.scaled and stack == "decoder"  # the head's scale, in the norm before it
                apply = partial(_scaled, factor=c.hidden_size**-0.5) if scaled else None
                out[p.name] = Source(f"{stack}.final_layer_norm.weight", apply=apply)
                continue
            if name == "bias":
                first = f"{stack}.block.0.layer.0.SelfAttention"
                out[p.name] = Source(f"{first}.relative_attention_bias.weight")
                continue
            _, i, rest = name.split(".", 2)
            part = rest.removeprefix("norm_").split(".")[0]
            sub = {"attn": 0, "cross": 1, "mlp": 1 if stack == "encoder" else 2}[part]
            their = "layer_norm"
            if not rest.startswith("norm_"):
                module, leaf = _MODULES[part], rest.split(".")[1]
                their = f"{module}.{mlp.get(leaf, leaf)}"
            out[p.name] = Source(f"{stack}.block.{i}.layer.{sub}.{their}.weight")
        return out

    def ignored(self) -> tuple[str, ...]:
        """Copies of the embedding, and a table that v1.0 checkpoints carry without using it."""
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        head = ("lm_head.weight",) if self.config.tied else ()
        return ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", unused, *head)

    def states(self) -> tuple[StateSpec, ...]:
        c = self.config
        own, memory = (1, c.heads, CAPACITY, c.head_dim), (1, c.heads, MEMORY, c.head_dim)
        out = []
        for i in range(c.layers):
            out += [StateSpec(f"layers.{i}.attn.{n}", own, "float32", "kv") for n in "kv"]
            out += [StateSpec(f"layers.{i}.cross.{n}", memory, "float32", "cross_kv") for n in "kv"]
        return tuple(out)

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return op.rows(w["embed"], ids)

    def remember(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> None:
        """The encoder over `(seq, hidden)`, then keys and values of every decoder layer."""
        c, delta = self.config, None
        bias = op.relative_bias(x, RelativeBias(w["encoder.bias"], c.max_distance, True))
        for i in range(c.encoder_layers):
            p = f"encoder.layers.{i}"
            x, h = op.add_norm(x, delta, w[f"{p}.norm_attn"], eps=c.norm_eps)
            q, k, v = op.linear(h, *(w[f"{p}.attn.{n}"] for n in "qkv"))
            h = op.full_attention(q, k, v, heads=c.heads, scale=1.0, bias=bias)
            (h,) = op.linear(h, w[f"{p}.attn.o"])
            x, h = op.add_norm(x, h, w[f"{p}.norm_mlp"], eps=c.norm_eps)
            delta = self._mlp(op, w, p, h)
        _, x = op.add_norm(x, delta, w["encoder.norm"], eps=c.norm_eps)
        states = self.states()
        for i in range(c.layers):
            k, v = op.linear(x, w[f"layers.{i}.cross.k"], w[f"layers.{i}.cross.v"])
            op.remember(k, states[4 * i + 2])
            op.remember(v, states[4 * i + 3])

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        c = self.config
        delta: T | None = None  # what the last block adds to the residual stream x
        bias = RelativeBias(w["bias"], c.max_distance, both_ways=False)
        for i in range(c.layers):
            x, delta = self._layer(op, w, i, x, delta, bias)
        return logits(op, w, x, delta, eps=c.norm_eps, tied=c.tied)

    def _layer(
        self,
        op: Ops[T],
        w: Mapping[str, Weight],
        i: int,
        x: T,
        delta: T | None,
        bias: RelativeBias,
    ) -> tuple[T, T]:
        """One decoder layer: x `(seq, hidden)` and the last block's output, both carried."""
        c, p = self.config, f"layers.{i}"
        k_state, v_state, k_memory, v_memory = self.states()[4 * i : 4 * i + 4]
        x, h = op.add_norm(x, delta, w[f"{p}.norm_attn"], eps=c.norm_eps)
        q, k, v = op.linear(h, *(w[f"{p}.attn.{n}"] for n in "qkv"))
        spec = Attention(c.heads, c.heads, c.head_dim, scale=1.0, rope=None, relative=bias)
        h = op.attention(q, k, v, k_state, v_state, spec)
        (h,) = op.linear(h, w[f"{p}.attn.o"])
        x, h = op.add_norm(x, h, w[f"{p}.norm_cross"], eps=c.norm_eps)
        (q,) = op.linear(h, w[f"{p}.cross.q"])
        h = op.cross_attention(q, k_memory, v_memory, heads=c.heads, scale=1.0)
        (h,) = op.linear(h, w[f"{p}.cross.o"])
        x, h = op.add_norm(x, h, w[f"{p}.norm_mlp"], eps=c.norm_eps)
        return x, self._mlp(op, w, p, h)

    def _mlp(self, op: Ops[T], w: Mapping[str, Weight], p: str, h: T) -> T:
        c = self.config
        if c.gated:
            gate, up = op.linear(h, w[f"{p}.mlp.gate"], w[f"{p}.mlp.up"])
            h = op.glu(gate, up, c.activation)
        else:
            h = op.activation(op.linear(h, w[f"{p}.mlp.up"])[0], c.activation)
        return op.linear(h, w[f"{p}.mlp.down"])[0]


_MODULES = {"attn": "SelfAttention", "cross": "EncDecAttention", "mlp": "DenseReluDense"}


def _scaled(values: Float32, factor: float) -> Float32:
    return values * np.float32(factor)


def _tied(checkpoint: Checkpoint, says_tied: bool) -> bool:
    """Whether the head is the embedding. transformers 5 writes `tie_word_embeddings: true` for
    every T5, so that only the tensors tell; a config that says false is believed."""
    head, embed = (checkpoint.tensors.get(n) for n in ("lm_head.weight", "shared.weight"))
    if head is None or embed is None:
        return says_tied
    if not says_tied or head.shape != embed.shape:
        return False
    rows = min(_COMPARED_ROWS, head.shape[0])
    return bool(
        np.array_equal(
            checkpoint.read("lm_head.weight", 0, rows), checkpoint.read("shared.weight", 0, rows)
        )
    )
