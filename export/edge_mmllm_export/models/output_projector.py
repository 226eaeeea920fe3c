"""The output projector: from the backbone's signal tokens to a generator's conditioning.

A tiny transformer: the hidden states of the signal tokens, narrowed, are what its encoder reads;
learned queries, one for each row of the conditioning (77 for Stable Diffusion's text encoder),
are what its decoder answers. The other kind, an MLP, is `mlp.Mlp`.

Source: MM-LLMs (arXiv 2401.13601) section 2.4; GILL (2305.17216) section 3.2, whose mapper is a
`torch.nn.Transformer` with norms first; NExT-GPT (2309.05519) uses the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm_export.checkpoints.base import Float32, Layout
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: torch's LayerNorm default, which GILL keeps.
_NORM_EPS = 1e-5


@dataclass(frozen=True)
class TinyTransformerConfig:
    """Sizes; the defaults are GILL's.

    Attributes:
        signal_width: of the backbone's hidden states.
        output_width: of the generator's conditioning.
        queries: rows of the conditioning.
    """

    signal_width: int
    output_width: int = 768
    queries: int = 77
    hidden_size: int = 512
    intermediate_size: int = 2048
    heads: int = 4
    encoder_layers: int = 4
    decoder_layers: int = 4


class TinyTransformer:
    """See the module."""

    name = "tiny_transformer"

    def __init__(self, config: TinyTransformerConfig) -> None:
        self.config = config
        self.width, self.hidden_size = config.signal_width, config.output_width

    def tokens(self, count: int) -> int:
        """Rows of the conditioning, whatever the number of signal tokens."""
        return self.config.queries

    def _layers(self) -> list[tuple[str, str, tuple[str, ...]]]:
        """Our prefix of each layer, torch's, and the attentions in it."""
        c = self.config
        out = [
            (f"encoder.{i}.", f"tfm.encoder.layers.{i}.", ("self",))
            for i in range(c.encoder_layers)
        ]
        return out + [
            (f"decoder.{i}.", f"tfm.decoder.layers.{i}.", ("self", "cross"))
            for i in range(c.decoder_layers)
        ]

    def parameters(self) -> list[Parameter]:
        c, h, f = self.config, self.config.hidden_size, self.config.intermediate_size
        out = [
            Parameter("in", (h, c.signal_width)),
            Parameter("in_bias", (h,), "vector"),
            Parameter("queries", (c.queries, h), "vector"),
        ]
        for ours, _, attentions in self._layers():
            for kind in attentions:
                out += _norm(f"{ours}norm_{kind}", h)
                for n in "qkvo":
                    out.append(Parameter(f"{ours}{kind}.{n}", (h, h)))
                    out.append(Parameter(f"{ours}{kind}.{n}_bias", (h,), "vector"))
            out += _norm(f"{ours}norm_mlp", h)
            out += [
                Parameter(f"{ours}up", (f, h)),
                Parameter(f"{ours}up_bias", (f,), "vector"),
                Parameter(f"{ours}down", (h, f)),
                Parameter(f"{ours}down_bias", (h,), "vector"),
            ]
        out += _norm("encoder.norm", h) + _norm("decoder.norm", h)
        out.append(Parameter("out", (c.output_width, h)))
        out.append(Parameter("out_bias", (c.output_width,), "vector"))
        return out

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """GILL's names (`fc`, `tfm`, `query_embs`, `model`) after the family's prefix; q, k and v
        are one matrix there."""
        h, out = self.config.hidden_size, dict[str, Source]()

        def pair(ours: str, theirs: str, rows: tuple[int, int] | None = None) -> None:
            # torch names the fused projection `in_proj_weight`, all others `NAME.weight`.
            dot = "" if theirs.endswith("_") else "."
            out[ours] = Source(f"{prefix}{theirs}{dot}weight", rows=rows)
            out[f"{ours}_bias"] = Source(f"{prefix}{theirs}{dot}bias", rows=rows)

        pair("in", "fc")
        out["queries"] = Source(f"{prefix}query_embs", whole=_rows)  # stored with a batch axis
        for ours, theirs, attentions in self._layers():
            for i, kind in enumerate(attentions):
                name = theirs + ("self_attn." if kind == "self" else "multihead_attn.")
                pair(f"{ours}norm_{kind}", f"{theirs}norm{i + 1}")
                for at, n in enumerate("qkv"):
                    pair(f"{ours}{kind}.{n}", f"{name}in_proj_", (at * h, (at + 1) * h))
                pair(f"{ours}{kind}.o", f"{name}out_proj")
            pair(f"{ours}norm_mlp", f"{theirs}norm{len(attentions) + 1}")
            pair(f"{ours}up", f"{theirs}linear1")
            pair(f"{ours}down", f"{theirs}linear2")
        pair("encoder.norm", "tfm.encoder.norm")
        pair("decoder.norm", "tfm.decoder.norm")
        pair("out", "model")
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        return ()

    def project(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        """Signal tokens' hidden states `(signals, signal_width)` -> `(queries, output_width)`.

        GILL adds the signal tokens' embeddings to their hidden states first: that is the
        caller's, since both are the backbone's.
        """
        memory = _linear(op, w, "in", x)
        y = op.table(w["queries"])
        for ours, _, attentions in self._layers():
            if attentions == ("self",):
                memory = self._layer(op, w, ours, memory, None)
        memory = _normed(op, w, "encoder.norm", memory)
        for ours, _, attentions in self._layers():
            if attentions != ("self",):
                y = self._layer(op, w, ours, y, memory)
        return _linear(op, w, "out", _normed(op, w, "decoder.norm", y))

    def _layer(self, op: Ops[T], w: Mapping[str, Weight], p: str, x: T, memory: T | None) -> T:
        """A pre-norm layer; with `memory` it attends to that after itself."""
        x = self._attend(op, w, f"{p}self", _normed(op, w, f"{p}norm_self", x), None, x)
        if memory is not None:
            x = self._attend(op, w, f"{p}cross", _normed(op, w, f"{p}norm_cross", x), memory, x)
        h = _linear(op, w, f"{p}up", _normed(op, w, f"{p}norm_mlp", x))
        return op.add(x, _linear(op, w, f"{p}down", op.activation(h, "relu")))

    def _attend(
        self, op: Ops[T], w: Mapping[str, Weight], p: str, h: T, memory: T | None, x: T
    ) -> T:
        """`x` and what its normed rows `h` find in `memory` (None: in themselves)."""
        seen = h if memory is None else memory
        heads = self.config.heads
        y = op.full_attention(
            _linear(op, w, f"{p}.q", h),
            _linear(op, w, f"{p}.k", seen),
            _linear(op, w, f"{p}.v", seen),
            heads=heads,
            scale=(self.config.hidden_size // heads) ** -0.5,
        )
        return op.add(x, _linear(op, w, f"{p}.o", y))


def _rows(x: Float32) -> Float32:
    return x.reshape(x.shape[-2:])


def _norm(name: str, width: int) -> list[Parameter]:
    return [Parameter(name, (width,), "vector"), Parameter(f"{name}_bias", (width,), "vector")]


def _normed(op: Ops[T], w: Mapping[str, Weight], name: str, x: T) -> T:
    return op.norm(x, w[name], eps=_NORM_EPS, bias=w[f"{name}_bias"])


def _linear(op: Ops[T], w: Mapping[str, Weight], name: str, x: T) -> T:
    return op.linear(x, w[name], bias=(w[f"{name}_bias"],))[0]
