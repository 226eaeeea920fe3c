"""The Q-Former: learned queries that read an image's features (BLIP-2, InstructBLIP).

A BERT whose first rows are queries: all rows attend to each other, and in every
`cross_attention_frequency`-th layer the queries attend to the features as well. InstructBLIP adds
the instruction's tokens as further rows, with a feed-forward of their own. The queries' last rows,
projected to the language model's width, are its image tokens.

Source: BLIP-2 (arXiv 2301.12597), InstructBLIP (2305.06500); `modeling_blip_2.py` and
`modeling_instructblip.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.families.composite import Port
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.vit import flat
from edge_mmllm_export.ops.base import Activation, Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu"}


@dataclass(frozen=True)
class QFormerConfig:
    """Sizes and switches.

    Attributes:
        feature_size: width of the encoder's features.
        output_size: width of the language model.
        queries: number of image tokens it makes.
        cross_every: cross attention in layers 0, n, 2n, ...
        vocab_size, positions: of its own text embeddings; 0 without text (BLIP-2).
    """

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    feature_size: int
    output_size: int
    queries: int
    cross_every: int
    norm_eps: float
    activation: Activation
    vocab_size: int = 0
    positions: int = 0

    @property
    def reads_text(self) -> bool:
        """Whether the instruction goes in as well."""
        return self.vocab_size > 0

    @classmethod
    def from_json(
        cls, config: dict[str, Any], where: str, *, queries: int, output_size: int, text: bool
    ) -> QFormerConfig:
        """Read a `qformer_config`.

        Args:
            queries: the family's `num_query_tokens`.
            output_size: width of the language model.
            text: InstructBLIP's, with embeddings of its own.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        f = Fields(config, where)
        hidden, heads = f.size("hidden_size", 768), f.size("num_attention_heads", 12)
        if hidden % heads:
            raise CheckpointError(
                "the config's head count does not divide its hidden size",
                where=where,
                found=f"{heads} heads, hidden size {hidden}",
            )
        activation = f.text("hidden_act", "gelu")
        kind = f.get("position_embedding_type", "absolute")
        if activation not in _ACTIVATIONS or kind != "absolute":
            raise UnsupportedArchitecture(
                "a Q-Former with no definition here",
                where=where,
                expected=f"hidden_act {' | '.join(_ACTIVATIONS)}, absolute positions",
                found=f"{activation}, {kind}",
            )
        if not text and f.flag("use_qformer_text_input", False):
            raise UnsupportedArchitecture("BLIP-2's Q-Former with text input", where=where)
        return cls(
            hidden_size=hidden,
            intermediate_size=f.size("intermediate_size", 3072),
            layers=f.size("num_hidden_layers", 12, limit=MAX_LAYERS),
            heads=heads,
            feature_size=f.size("encoder_hidden_size", 1408),
            output_size=output_size,
            queries=queries,
            cross_every=f.size("cross_attention_frequency", 2),
            norm_eps=f.number("layer_norm_eps", 1e-12),
            activation=_ACTIVATIONS[activation],
            vocab_size=f.size("vocab_size", 30522) if text else 0,
            positions=f.size("max_position_embeddings", 512) if text else 0,
        )


class QFormer:
    """A projector: features `(rows, feature_size)` -> `(queries, output_size)`."""

    name = "qformer"

    def __init__(self, config: QFormerConfig) -> None:
        self.config, self.hidden_size = config, config.output_size

    def tokens(self, count: int) -> int:
        """Rows that `count` features become: as many as there are queries."""
        return self.config.queries

    def ports(self) -> tuple[Port, ...]:
        """Inputs of its stage: features, and the instruction's ids where it reads text."""
        text = (Port("text_ids", "int64", ("seq",)),) if self.config.reads_text else ()
        return (Port("features", "float32", ("rows", self.config.feature_size)), *text)

    def parameters(self) -> list[Parameter]:
        c = self.config
        h = c.hidden_size
        out = [Parameter("queries", (c.queries, h), "vector"), *_norm("norm", h)]
        if c.reads_text:
            out.append(Parameter("words", (c.vocab_size, h), "embedding"))
            out.append(Parameter("positions", (c.positions, h), "embedding"))
        for i in range(c.layers):
            p = f"layers.{i}"
            out += self._attention_parameters(f"{p}.self", h)
            if i % c.cross_every == 0:
                out += self._attention_parameters(f"{p}.cross", c.feature_size)
            out += self._mlp_parameters(f"{p}.query")
            if c.reads_text:
                out += self._mlp_parameters(f"{p}.text")
        return [*out, *_linear("out", c.output_size, h)]

    def _attention_parameters(self, p: str, memory: int) -> list[Parameter]:
        h = self.config.hidden_size
        widths = {"q": h, "k": memory, "v": memory, "o": h}
        parts = [_linear(f"{p}.{n}", h, width) for n, width in widths.items()]
        return [*(q for part in parts for q in part), *_norm(f"{p}.norm", h)]

    def _mlp_parameters(self, p: str) -> list[Parameter]:
        h, f = self.config.hidden_size, self.config.intermediate_size
        return [*_linear(f"{p}.up", f, h), *_linear(f"{p}.down", h, f), *_norm(f"{p}.norm", h)]

    def sources(self, layout: Layout, prefix: str = "") -> dict[str, Source]:
        """Our names to the hub's, as BLIP-2 and InstructBLIP save them under `prefix`."""
        norm = "qformer.embeddings.layernorm" if self.config.reads_text else "qformer.layernorm"
        out = {}
        for p in self.parameters():
            stem, bias = p.name.removesuffix("_bias"), p.name.endswith("_bias")
            if stem == "queries":
                out[p.name] = flat(f"{prefix}query_tokens", (1, *p.shape))
                continue
            if stem.startswith("layers."):
                _, i, rest = stem.split(".", 2)
                their = f"qformer.encoder.layer.{i}.{_LAYER_NAMES[rest]}"
            else:
                their = {**_NAMES, "norm": norm}[stem]
            out[p.name] = Source(prefix + their + (".bias" if bias else ".weight"))
        return out

    def ignored(self, prefix: str = "") -> tuple[str, ...]:
        """Patterns of checkpoint tensors under `prefix` that carry no weights."""
        return (f"{prefix}qformer.embeddings.position_ids",)

    def project(
        self, op: Ops[T], w: Mapping[str, Weight], features: T, text_ids: T | None = None
    ) -> T:
        """Image tokens of one image.

        Args:
            features: `(rows, feature_size)`.
            text_ids: the instruction, int `(seq,)` of the Q-Former's own tokenizer, where
                `config.reads_text`.

        Returns:
            `(queries, output_size)`.
        """
        c = self.config
        x = op.table(w["queries"])
        if text_ids is not None:
            text = op.rows(w["words"], text_ids)
            x = op.concat_rows(x, op.add(text, op.positions(text, w["positions"])))
        x = op.norm(x, w["norm"], eps=c.norm_eps, bias=w["norm_bias"])
        for i in range(c.layers):
            p, last = f"layers.{i}", i == c.layers - 1
            x = self._attention(op, w, f"{p}.self", x, x)
            queries = x if text_ids is None else op.take_rows(x, 0, c.queries)
            words = None if text_ids is None or last else op.take_rows(x, c.queries)
            if i % c.cross_every == 0:
                queries = self._attention(op, w, f"{p}.cross", queries, features)
            x = self._mlp(op, w, f"{p}.query", queries)
            if words is not None:
                x = op.concat_rows(x, self._mlp(op, w, f"{p}.text", words))
        return op.linear(x, w["out"], bias=(w["out_bias"],))[0]

    def _attention(self, op: Ops[T], w: Mapping[str, Weight], p: str, x: T, memory: T) -> T:
        c = self.config
        if memory is x:
            weights, bias = [w[f"{p}.{n}"] for n in "qkv"], [w[f"{p}.{n}_bias"] for n in "qkv"]
            q, k, v = op.linear(x, *weights, bias=tuple(bias))
        else:
            (q,) = op.linear(x, w[f"{p}.q"], bias=(w[f"{p}.q_bias"],))
            bias = [w[f"{p}.k_bias"], w[f"{p}.v_bias"]]
            k, v = op.linear(memory, w[f"{p}.k"], w[f"{p}.v"], bias=tuple(bias))
        scale = (c.hidden_size // c.heads) ** -0.5
        h = op.full_attention(q, k, v, heads=c.heads, scale=scale)
        (h,) = op.linear(h, w[f"{p}.o"], bias=(w[f"{p}.o_bias"],))
        return self._add_norm(op, w, f"{p}.norm", x, h)

    def _mlp(self, op: Ops[T], w: Mapping[str, Weight], p: str, x: T) -> T:
        (h,) = op.linear(x, w[f"{p}.up"], bias=(w[f"{p}.up_bias"],))
        h = op.activation(h, self.config.activation)
        (h,) = op.linear(h, w[f"{p}.down"], bias=(w[f"{p}.down_bias"],))
        return self._add_norm(op, w, f"{p}.norm", x, h)

    def _add_norm(self, op: Ops[T], w: Mapping[str, Weight], name: str, x: T, h: T) -> T:
        eps = self.config.norm_eps
        return op.add_norm(x, h, w[name], eps=eps, bias=w[f"{name}_bias"])[1]


def _norm(name: str, width: int) -> list[Parameter]:
    return [Parameter(name, (width,), "vector"), Parameter(f"{name}_bias", (width,), "vector")]


def _linear(name: str, n: int, k: int) -> list[Parameter]:
    return [Parameter(name, (n, k)), Parameter(f"{name}_bias", (n,), "vector")]


_NAMES = {
    "words": "qformer.embeddings.word_embeddings",
    "positions": "qformer.embeddings.position_embeddings",
    "out": "language_projection",
}
_ATTENTION = {"q": "attention.query", "k": "attention.key", "v": "attention.value"}
_ATTENTION |= {"o": "output.dense", "norm": "output.LayerNorm"}
_LAYER_NAMES = {
    **{f"self.{our}": f"attention.{their}" for our, their in _ATTENTION.items()},
    **{f"cross.{our}": f"crossattention.{their}" for our, their in _ATTENTION.items()},
    "query.up": "intermediate_query.dense",
    "query.down": "output_query.dense",
    "query.norm": "output_query.LayerNorm",
    "text.up": "intermediate.dense",
    "text.down": "output.dense",
    "text.norm": "output.LayerNorm",
}
