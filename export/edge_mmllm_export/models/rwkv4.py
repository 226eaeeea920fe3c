"""RWKV-4, from BlinkDL's `.pth` and transformers' `RwkvForCausalLM`.

Computed in float32, so the halving of activations every `rescale_every` layers, which keeps
float16 from overflowing, is left out: it changes no result.

Source: arXiv 2305.13048 and `modeling_rwkv.py` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.models import rwkv
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: The blocks' names in each layout.
_BLOCKS = {"blinkdl": ("att", "ffn"), "hf": ("attention", "feed_forward")}


@dataclass(frozen=True)
class Rwkv4Config:
    """Sizes; dim_att is the width of keys and values."""

    vocab_size: int
    hidden_size: int
    layers: int
    dim_att: int
    dim_ffn: int
    tied: bool
    layout: str
    norm_eps: float = 1e-5


class Rwkv4:
    """Recurrent language model with a vector state."""

    name = "rwkv4"
    context_length: int | None = None

    def __init__(self, config: Rwkv4Config) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Rwkv4:
        """Read the sizes from the tensors; config.json, where there is one, gives epsilon.

        `context` and the hub's context_length are for training kernels: there is no limit.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        t = rwkv.Tensors(checkpoint, ("blinkdl", "hf"))
        att, ffn = _BLOCKS[t.layout]
        vocab, hidden = t.shape(f"{t.frame[0]}.weight", 2)
        tied = t.layout == "hf" and t.fields.flag("tie_word_embeddings", False)
        return cls(
            Rwkv4Config(
                vocab_size=vocab,
                hidden_size=hidden,
                layers=t.layers(),
                dim_att=t.shape(f"{t.prefix}.0.{att}.key.weight", 2)[0],
                dim_ffn=t.shape(f"{t.prefix}.0.{ffn}.key.weight", 2)[0],
                tied=tied,
                layout=t.layout,
                norm_eps=t.fields.number("layer_norm_epsilon", 1e-5),
            )
        )

    def parameters(self) -> list[Parameter]:
        c, width = self.config, self.hidden_size
        first, last = rwkv.frame_parameters(c.vocab_size, width)
        out = first
        for i in range(c.layers):
            p = f"layers.{i}"
            out += [*rwkv.norm_parameters(f"{p}.ln1", width)]
            out += [Parameter(f"{p}.att.x_{m}", (width,), "vector") for m in "rkv"]
            out += [Parameter(f"{p}.att.{m}", (c.dim_att,), "vector") for m in "wu"]
            out += [Parameter(f"{p}.att.{m}", (c.dim_att, width)) for m in "rkv"]
            out.append(Parameter(f"{p}.att.o", (width, c.dim_att)))
            out += [*rwkv.norm_parameters(f"{p}.ln2", width)]
            out += rwkv.channel_mix_parameters(f"{p}.ffn", width, c.dim_ffn)
        return out + (last[:-1] if c.tied else last)

    def sources(self, layout: Layout) -> dict[str, Source]:
        """`blocks.N.att.*`, or `rwkv.blocks.N.attention.*` with the mixes' names in full."""
        c = self.config
        hf = c.layout == "hf"
        out = rwkv.frame_sources(c.layout)
        for i in range(c.layers):
            p, b = f"layers.{i}", f"rwkv.blocks.{i}" if hf else f"blocks.{i}"
            att, ffn = (f"{b}.{block}" for block in _BLOCKS[c.layout])
            mix = rwkv.LONG if hf else {m: m for m in "rkv"}
            out |= rwkv.matrix_sources(f"{p}.att", att, "rkvo")
            out |= rwkv.matrix_sources(f"{p}.ffn", ffn, "krv")
            out |= {f"{p}.att.x_{m}": rwkv.shift_share(f"{att}.time_mix_{mix[m]}") for m in "rkv"}
            out |= {f"{p}.ffn.x_{m}": rwkv.shift_share(f"{ffn}.time_mix_{mix[m]}") for m in "kr"}
            out |= {
                f"{p}.att.w": Source(f"{att}.time_decay", apply=rwkv.minus_exp),
                f"{p}.att.u": Source(f"{att}.time_first"),
                **rwkv.norm_sources(f"{p}.ln1", f"{b}.ln1"),
                **rwkv.norm_sources(f"{p}.ln2", f"{b}.ln2"),
            }
        return out

    def ignored(self) -> tuple[str, ...]:
        return ("head.weight",) if self.config.tied else ()

    def states(self) -> tuple[StateSpec, ...]:
        c = self.config
        return rwkv.states(c.layers, c.hidden_size, (1, 3, c.dim_att))

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return rwkv.embed(op, w, ids)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        c, states = self.config, self.states()
        x = rwkv.enter(op, w, x, c.norm_eps)
        delta: T | None = None
        for i in range(c.layers):
            p, (att_shift, wkv, ffn_shift) = f"layers.{i}", states[3 * i : 3 * i + 3]
            x, h = rwkv.add_norm(op, w, f"{p}.ln1", x, delta, c.norm_eps)
            mixes = op.mix(h, op.token_shift(h, att_shift), *(w[f"{p}.att.x_{m}"] for m in "rkv"))
            (r,), (k,), (v,) = (
                op.linear(m, w[f"{p}.att.{n}"]) for n, m in zip("rkv", mixes, strict=True)
            )
            y = op.wkv4(k, v, w[f"{p}.att.w"], w[f"{p}.att.u"], wkv)
            (delta,) = op.linear(op.mul(op.activation(r, "sigmoid"), y), w[f"{p}.att.o"])
            x, h = rwkv.add_norm(op, w, f"{p}.ln2", x, delta, c.norm_eps)
            delta = rwkv.channel_mix(op, w, f"{p}.ffn", h, ffn_shift)
        return rwkv.leave(op, w, x, delta, c.norm_eps, head="embed" if c.tied else "head")
