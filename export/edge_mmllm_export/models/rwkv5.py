"""RWKV-5 ("Eagle"), versions 5.1 and 5.2, from BlinkDL's `.pth`.

5.1 has one decay and one bonus for each head, 5.2 one for each of its channels.

Source: arXiv 2404.05892, section 3; `RWKV-v5/src/model.py` of BlinkDL's RWKV-LM.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, Layout
from edge_mmllm_export.models import rwkv
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class Rwkv5Config:
    """Sizes; per_head says that decay and bonus have one value a head (5.1)."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    head_size: int
    dim_ffn: int
    per_head: bool
    group_norm_eps: float
    norm_eps: float = 1e-5

    @property
    def dim_att(self) -> int:
        return self.heads * self.head_size


class Rwkv5:
    """Recurrent language model with a matrix state for each head and a constant decay."""

    name = "rwkv5"
    context_length: int | None = None

    def __init__(self, config: Rwkv5Config) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Rwkv5:
        """Read the sizes from the tensors; a config.json may give `group_norm_eps`.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        t = rwkv.Tensors(checkpoint, ("blinkdl",))
        vocab, hidden = t.shape("emb.weight", 2)
        att = "blocks.0.att"
        if not t.has(f"{att}.gate.weight") or not t.has(f"{att}.time_faaaa"):
            raise UnsupportedArchitecture(
                "RWKV-5.0, an experiment before the published models, has no definition",
                where=str(checkpoint.source),
                expected="RWKV-5.1 or 5.2: blocks.0.att.gate.weight and time_faaaa",
            )
        (width,) = t.shape(f"{att}.ln_x.weight", 1)
        heads = t.shape_any(f"{att}.time_decay")[0]
        if width % heads:
            raise t.misfit(f"heads that divide {width}", f"{heads} heads")
        head_size = width // heads
        # Head size 64: 1e-5 after a division by 8 (see rwkv.GROUP_NORM_EPS). The published tiny
        # models of head size 8 were computed without that division.
        eps = 1e-5 * (head_size / 8) ** 2
        return cls(
            Rwkv5Config(
                vocab_size=vocab,
                hidden_size=hidden,
                layers=t.layers(),
                heads=heads,
                head_size=head_size,
                dim_ffn=t.shape("blocks.0.ffn.key.weight", 2)[0],
                per_head=t.elements(f"{att}.time_decay") == heads and head_size > 1,
                group_norm_eps=t.group_norm_eps(eps),
            )
        )

    def parameters(self) -> list[Parameter]:
        c, width = self.config, self.hidden_size
        first, last = rwkv.frame_parameters(c.vocab_size, width)
        out = first
        for i in range(c.layers):
            p = f"layers.{i}"
            out += [*rwkv.norm_parameters(f"{p}.ln1", width)]
            out += [Parameter(f"{p}.att.x_{m}", (width,), "vector") for m in "rkvg"]
            out += [Parameter(f"{p}.att.{m}", (c.heads, c.head_size), "vector") for m in "wu"]
            out += [Parameter(f"{p}.att.{m}", (c.dim_att, width)) for m in "rkvg"]
            out.append(Parameter(f"{p}.att.o", (width, c.dim_att)))
            out += [*rwkv.norm_parameters(f"{p}.att.ln_x", c.dim_att)]
            out += [*rwkv.norm_parameters(f"{p}.ln2", width)]
            out += rwkv.channel_mix_parameters(f"{p}.ffn", width, c.dim_ffn)
        return out + last

    def sources(self, layout: Layout) -> dict[str, Source]:
        """`blocks.N.att.*`. One value a head (5.1) is spread over the head."""
        c = self.config
        heads, size = c.heads, c.head_size
        count = size if c.per_head else 1
        stored = (heads,) if c.per_head else (heads, size)

        def spread(x: Float32) -> Float32:
            return np.repeat(x.reshape(heads, -1), count, axis=1)

        out = rwkv.frame_sources("blinkdl")
        for i in range(c.layers):
            p, b = f"layers.{i}", f"blocks.{i}"
            out |= rwkv.blinkdl_sources(p, b)
            out |= {f"{p}.att.x_{m}": rwkv.shift_share(f"{b}.att.time_mix_{m}") for m in "rkvg"}
            out |= {f"{p}.ffn.x_{m}": rwkv.shift_share(f"{b}.ffn.time_mix_{m}") for m in "kr"}
            out |= {
                f"{p}.att.w": Source(
                    f"{b}.att.time_decay", None, None, rwkv.minus_exp, spread, stored
                ),
                f"{p}.att.u": Source(f"{b}.att.time_faaaa", whole=spread, stored=stored),
            }
        return out

    def ignored(self) -> tuple[str, ...]:
        return ()

    def states(self) -> tuple[StateSpec, ...]:
        c = self.config
        return rwkv.states(c.layers, c.hidden_size, (1, c.heads, c.head_size, c.head_size))

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return rwkv.embed(op, w, ids)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        c, states = self.config, self.states()
        x = rwkv.enter(op, w, x, c.norm_eps)
        delta: T | None = None
        for i in range(c.layers):
            p, (att_shift, wkv, ffn_shift) = f"layers.{i}", states[3 * i : 3 * i + 3]
            x, h = rwkv.add_norm(op, w, f"{p}.ln1", x, delta, c.norm_eps)
            delta = self._time_mix(op, w, f"{p}.att", h, att_shift, wkv)
            x, h = rwkv.add_norm(op, w, f"{p}.ln2", x, delta, c.norm_eps)
            delta = rwkv.channel_mix(op, w, f"{p}.ffn", h, ffn_shift)
        return rwkv.leave(op, w, x, delta, c.norm_eps)

    def _time_mix(
        self,
        op: Ops[T],
        w: Mapping[str, Weight],
        p: str,
        h: T,
        shift: StateSpec,
        state: StateSpec,
    ) -> T:
        """h `(seq, hidden)` -> `(seq, hidden)`."""
        c = self.config
        mixes = op.mix(h, op.token_shift(h, shift), *(w[f"{p}.x_{m}"] for m in "rkvg"))
        (r,), (k,), (v,), (g,) = (
            op.linear(x, w[f"{p}.{m}"]) for m, x in zip("rkvg", mixes, strict=True)
        )
        y = op.wkv6(r, k, v, w[f"{p}.w"], w[f"{p}.u"], state)
        y = rwkv.norm(op, w, f"{p}.ln_x", y, c.group_norm_eps, groups=c.heads)
        return op.linear(op.glu(g, y, "silu"), w[f"{p}.o"])[0]
