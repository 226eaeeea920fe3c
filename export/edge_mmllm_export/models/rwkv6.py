"""RWKV-6 ("Finch"), from BlinkDL's `.pth` and the flash-linear-attention hub layout.

Source: arXiv 2404.05892, section 4; `RWKV-v5/src/model.py` (x060) of BlinkDL's RWKV-LM and, for
the hub layout, `fla/layers/rwkv6.py` of flash-linear-attention at 00937f2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, Layout
from edge_mmllm_export.models import rwkv
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: The data-dependent mixes in the order in which each layout stacks their adapters.
_ORDER = {"blinkdl": "wkvrg", "fla": "rwkvg"}


@dataclass(frozen=True)
class Rwkv6Config:
    """Sizes; mix_rank is that of each mix's adapter, decay_rank that of the decay's."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    head_size: int
    dim_ffn: int
    mix_rank: int
    decay_rank: int
    norm_eps: float
    group_norm_eps: float
    layout: str


class Rwkv6:
    """Recurrent language model whose decay and mixing depend on the data."""

    name = "rwkv6"
    context_length: int | None = None

    def __init__(self, config: Rwkv6Config) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers
        self._mixes = _ORDER[c.layout]

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Rwkv6:
        """Read the sizes from the tensors; config.json, where there is one, gives epsilons.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        t = rwkv.Tensors(checkpoint, ("blinkdl", "fla"))
        fla = t.layout == "fla"
        vocab, hidden = t.shape(f"{t.frame[0]}.weight", 2)
        att = f"{t.prefix}.0.{'attn' if fla else 'att'}"
        heads, head_size = t.shape(f"{att}.{'bonus' if fla else 'time_faaaa'}", 2)
        if heads * head_size != hidden:
            raise t.misfit(f"heads * head size = {hidden}", f"{heads} * {head_size}")
        if fla:
            t.fields.one_of("hidden_act", ("sqrelu",), "sqrelu")
            mix = t.shape(f"{att}.x_proj.2.weight", 2)[1]
            decay = t.shape(f"{att}.w_proj.linear.lora.0.weight", 2)[0]
            ffn_key = f"{t.prefix}.0.ffn.key.linear.weight"
        else:
            mix = t.shape(f"{att}.time_maa_w1", 2)[1]
            decay = t.shape(f"{att}.time_decay_w1", 2)[1]
            ffn_key = f"{t.prefix}.0.ffn.key.weight"
        if mix % len(_ORDER[t.layout]):
            raise t.misfit("five mixes of one rank", f"{mix} columns in all")
        eps = t.fields.number("norm_eps", 1e-5)
        return cls(
            Rwkv6Config(
                vocab_size=vocab,
                hidden_size=hidden,
                layers=t.layers(),
                heads=heads,
                head_size=head_size,
                dim_ffn=t.shape(ffn_key, 2)[0],
                mix_rank=mix // 5,
                decay_rank=decay,
                norm_eps=eps,
                group_norm_eps=t.group_norm_eps(eps if fla else rwkv.GROUP_NORM_EPS),
                layout=t.layout,
            )
        )

    def parameters(self) -> list[Parameter]:
        c, width = self.config, self.hidden_size
        first, last = rwkv.frame_parameters(c.vocab_size, width)
        out = first
        for i in range(c.layers):
            p = f"layers.{i}"
            out += [*rwkv.norm_parameters(f"{p}.ln1", width)]
            out.append(Parameter(f"{p}.att.x_x", (width,), "vector"))
            out.append(Parameter(f"{p}.att.mix.down", (5 * c.mix_rank, width)))
            for m in self._mixes:
                out.append(Parameter(f"{p}.att.mix.{m}.up", (width, c.mix_rank)))
                out.append(Parameter(f"{p}.att.mix.{m}.bias", (width,), "vector"))
            out.append(Parameter(f"{p}.att.w.down", (c.decay_rank, width)))
            out.append(Parameter(f"{p}.att.w.up", (width, c.decay_rank)))
            out.append(Parameter(f"{p}.att.w.bias", (width,), "vector"))
            out.append(Parameter(f"{p}.att.u", (c.heads, c.head_size), "vector"))
            out += [Parameter(f"{p}.att.{m}", (width, width)) for m in "rkvgo"]
            out += [*rwkv.norm_parameters(f"{p}.att.ln_x", width)]
            out += [*rwkv.norm_parameters(f"{p}.ln2", width)]
            out += rwkv.channel_mix_parameters(f"{p}.ffn", width, c.dim_ffn)
        return out + last

    def sources(self, layout: Layout) -> dict[str, Source]:
        c = self.config
        out = rwkv.frame_sources(c.layout)
        for i in range(c.layers):
            out |= self._fla(i) if c.layout == "fla" else self._blinkdl(i)
        return out

    def _blinkdl(self, i: int) -> dict[str, Source]:
        """`blocks.N.att.*`: adapters are stored `(in, out)`, the mixes' stacked `(5, in, out)`."""
        c, p, b = self.config, f"layers.{i}", f"blocks.{i}"
        width, rank = c.hidden_size, c.mix_rank
        out = rwkv.blinkdl_sources(p, b)
        out |= {f"{p}.ffn.x_{m}": rwkv.flat(f"{b}.ffn.time_maa_{m}") for m in "kr"}
        down = (5 * rank, width)
        out |= {
            f"{p}.att.x_x": rwkv.flat(f"{b}.att.time_maa_x"),
            f"{p}.att.mix.down": rwkv.transposed(f"{b}.att.time_maa_w1", down),
            f"{p}.att.w.down": rwkv.transposed(f"{b}.att.time_decay_w1", (c.decay_rank, width)),
            f"{p}.att.w.up": rwkv.transposed(f"{b}.att.time_decay_w2", (width, c.decay_rank)),
            f"{p}.att.w.bias": rwkv.flat(f"{b}.att.time_decay"),
            f"{p}.att.u": Source(f"{b}.att.time_faaaa"),
        }
        for j, m in enumerate(self._mixes):

            def up(stacked: Float32, j: int = j) -> Float32:
                return np.transpose(stacked[j])

            name = f"{b}.att.time_maa_w2"
            out[f"{p}.att.mix.{m}.up"] = Source(name, whole=up, stored=(5, rank, width))
            out[f"{p}.att.mix.{m}.bias"] = rwkv.flat(f"{b}.att.time_maa_{m}")
        return out

    def _fla(self, i: int) -> dict[str, Source]:
        """`model.layers.N.attn.*`: one matrix `(C, 5 * rank)` for the mixes, one block each."""
        c, p, b = self.config, f"layers.{i}", f"model.layers.{i}"
        width, rank = c.hidden_size, c.mix_rank
        out = {f"{p}.att.{m}": Source(f"{b}.attn.{m}_proj.linear.weight") for m in "rkvg"}
        out |= {
            f"{p}.att.o": Source(f"{b}.attn.o_proj.weight"),
            f"{p}.att.x_x": rwkv.flat(f"{b}.attn.x_proj.0.mu"),
            f"{p}.att.mix.down": Source(f"{b}.attn.x_proj.0.linear.weight"),
            f"{p}.att.w.down": Source(f"{b}.attn.w_proj.linear.lora.0.weight"),
            f"{p}.att.w.up": Source(f"{b}.attn.w_proj.linear.lora.2.weight"),
            f"{p}.att.w.bias": Source(f"{b}.attn.w_proj.linear.lora.2.bias"),
            f"{p}.att.u": Source(f"{b}.attn.bonus"),
            f"{p}.ffn.x_k": rwkv.flat(f"{b}.ffn.key.mu"),
            f"{p}.ffn.x_r": rwkv.flat(f"{b}.ffn.receptance.mu"),
            f"{p}.ffn.k": Source(f"{b}.ffn.key.linear.weight"),
            f"{p}.ffn.r": Source(f"{b}.ffn.receptance.linear.weight"),
            f"{p}.ffn.v": Source(f"{b}.ffn.value.weight"),
            **rwkv.norm_sources(f"{p}.ln1", f"{b}.attn_norm"),
            **rwkv.norm_sources(f"{p}.ln2", f"{b}.ffn_norm"),
            **rwkv.norm_sources(f"{p}.att.ln_x", f"{b}.attn.g_norm"),
        }
        for j, m in enumerate(self._mixes):

            def up(blocks: Float32, j: int = j) -> Float32:
                return blocks[:, j * rank : (j + 1) * rank]

            name = f"{b}.attn.x_proj.2.weight"
            out[f"{p}.att.mix.{m}.up"] = Source(name, whole=up, stored=(width, 5 * rank))
            whole, name = rwkv.branch(5, j), f"{b}.attn.x_bias"
            out[f"{p}.att.mix.{m}.bias"] = Source(name, whole=whole, stored=(5, width))
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
        previous = op.token_shift(h, shift)
        (mixed,) = op.mix(h, previous, w[f"{p}.x_x"])
        (low,) = op.linear(mixed, w[f"{p}.mix.down"])
        lows = op.split(op.activation(low, "tanh"), (c.mix_rank,) * 5)

        def mix(low: T, m: str) -> T:
            bias = (w[f"{p}.mix.{m}.bias"],)
            return op.lerp(h, previous, op.linear(low, w[f"{p}.mix.{m}.up"], bias=bias)[0])

        x = {m: mix(low, m) for m, low in zip(self._mixes, lows, strict=True)}
        (r,), (k,), (v,), (g,) = (op.linear(x[m], w[f"{p}.{m}"]) for m in "rkvg")
        low = op.activation(op.linear(x["w"], w[f"{p}.w.down"])[0], "tanh")
        (decay,) = op.linear(low, w[f"{p}.w.up"], bias=(w[f"{p}.w.bias"],))
        y = op.wkv6(r, k, v, op.activation(decay, "minus_exp"), w[f"{p}.u"], state)
        y = rwkv.norm(op, w, f"{p}.ln_x", y, c.group_norm_eps, groups=c.heads)
        return op.linear(op.glu(g, y, "silu"), w[f"{p}.o"])[0]
