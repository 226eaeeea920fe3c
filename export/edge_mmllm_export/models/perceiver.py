"""The perceiver resampler: learned latents that read any number of features (Flamingo, Idefics).

Each block lets the latents attend to the features and to themselves at once, then an MLP.

Source: Flamingo (arXiv 2204.14198) section 3.1.1, and `perceiver.py` of Idefics in transformers
5.23, which adds optional layer norms of every head of q and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from edge_mmllm_export.checkpoints.base import Float32, Layout
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: torch's LayerNorm default; the config has no such key.
_NORM_EPS = 1e-5


@dataclass(frozen=True)
class PerceiverConfig:
    """Sizes and switches.

    Attributes:
        width: of features and latents.
        qk_norms: layer norms over each head of q and k.
    """

    width: int
    intermediate_size: int
    latents: int
    blocks: int
    heads: int
    head_dim: int
    qk_norms: bool

    @classmethod
    def from_json(cls, config: dict[str, Any], where: str, *, width: int) -> PerceiverConfig:
        """Read Idefics' `perceiver_config`; `width` is its tower's. Raises: CheckpointError."""
        f = Fields(config, where)
        return cls(
            width=width,
            intermediate_size=4 * width,
            latents=f.size("resampler_n_latents", 64),
            blocks=f.size("resampler_depth", 6, limit=MAX_LAYERS),
            heads=f.size("resampler_n_heads", 16),
            head_dim=f.size("resampler_head_dim", 96),
            qk_norms=f.flag("qk_layer_norms_perceiver", False),
        )


class Perceiver:
    """A projector: features `(rows, width)` -> `(latents, width)`."""

    name = "perceiver"

    def __init__(self, config: PerceiverConfig) -> None:
        self.config, self.hidden_size = config, config.width

    def tokens(self, count: int) -> int:
        """Rows that `count` features become: as many as there are latents."""
        return self.config.latents

    def parameters(self) -> list[Parameter]:
        c = self.config
        w, inner = c.width, c.heads * c.head_dim
        out = [Parameter("latents", (c.latents, w), "vector")]
        for i in range(c.blocks):
            p = f"blocks.{i}"
            out += [*_norm(f"{p}.norm_features", w), *_norm(f"{p}.norm_latents", w)]
            out += [Parameter(f"{p}.{n}", (inner, w)) for n in "qkv"]
            if c.qk_norms:
                out += [*_norm(f"{p}.norm_q", inner), *_norm(f"{p}.norm_k", inner)]
            out += [Parameter(f"{p}.o", (w, inner)), *_norm(f"{p}.norm_mlp", w)]
            out.append(Parameter(f"{p}.up", (c.intermediate_size, w)))
            out.append(Parameter(f"{p}.down", (w, c.intermediate_size)))
        return [*out, *_norm("norm", w)]

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's after `prefix`, e.g. `model.perceiver_resampler.`."""
        c, out = self.config, {}
        for p in self.parameters():
            stem, bias = p.name.removesuffix("_bias"), p.name.endswith("_bias")
            suffix = ".bias" if bias else ".weight"
            if stem == "latents":
                out[p.name] = Source(f"{prefix}latents")
            elif stem == "norm":
                out[p.name] = Source(f"{prefix}layer_norm{suffix}")
            else:
                _, i, part = stem.split(".")
                name = f"{prefix}blocks.{i}.{_NAMES[part]}{suffix}"
                if part in ("norm_q", "norm_k"):  # one norm, for every head
                    each = partial(_repeated, times=c.heads)
                    out[p.name] = Source(name, whole=each, stored=(c.head_dim,))
                else:
                    out[p.name] = Source(name)
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        return ()

    def project(self, op: Ops[T], w: Mapping[str, Weight], features: T) -> T:
        """`(rows, width)` -> `(latents, width)`."""
        c, latents = self.config, op.table(w["latents"])
        for i in range(c.blocks):
            p = f"blocks.{i}"
            h = self._attention(op, w, p, features, latents)
            latents, h = self._add_norm(op, w, f"{p}.norm_mlp", latents, h)
            h = op.activation(op.linear(h, w[f"{p}.up"])[0], "relu")
            latents = op.add(latents, op.linear(h, w[f"{p}.down"])[0])
        return op.norm(latents, w["norm"], eps=_NORM_EPS, bias=w["norm_bias"])

    def _attention(self, op: Ops[T], w: Mapping[str, Weight], p: str, features: T, latents: T) -> T:
        c = self.config
        context = self._norm(op, w, f"{p}.norm_features", features)
        own = self._norm(op, w, f"{p}.norm_latents", latents)
        (q,) = op.linear(own, w[f"{p}.q"])
        k, v = op.linear(op.concat_rows(context, own), w[f"{p}.k"], w[f"{p}.v"])
        if c.qk_norms:
            q = self._norm(op, w, f"{p}.norm_q", q, groups=c.heads)
            k = self._norm(op, w, f"{p}.norm_k", k, groups=c.heads)
        h = op.full_attention(q, k, v, heads=c.heads, scale=c.head_dim**-0.5)
        return op.linear(h, w[f"{p}.o"])[0]

    def _norm(self, op: Ops[T], w: Mapping[str, Weight], name: str, x: T, groups: int = 1) -> T:
        return op.norm(x, w[name], eps=_NORM_EPS, groups=groups, bias=w[f"{name}_bias"])

    def _add_norm(self, op: Ops[T], w: Mapping[str, Weight], name: str, x: T, h: T) -> tuple[T, T]:
        return op.add_norm(x, h, w[name], eps=_NORM_EPS, bias=w[f"{name}_bias"])


def _norm(name: str, width: int) -> list[Parameter]:
    return [Parameter(name, (width,), "vector"), Parameter(f"{name}_bias", (width,), "vector")]


def _repeated(values: Float32, times: int) -> Float32:
    return np.tile(values, times)


_NAMES = {
    "norm_features": "0.context_layer_norm",
    "norm_latents": "0.latents_layer_norm",
    "norm_q": "0.q_layer_norm",
    "norm_k": "0.k_layer_norm",
    "q": "0.q_proj",
    "k": "0.k_proj",
    "v": "0.v_proj",
    "o": "0.output_proj",
    "norm_mlp": "1.ln",
    "up": "1.fc",
    "down": "1.c_proj",
}
