"""RWKV-7 ("Goose"), from BlinkDL's `.pth` and the flash-linear-attention hub layout.

Source: arXiv 2503.14456, the numpy reference in BlinkDL's RWKV-LM (`RWKV-v7/rwkv_v7_numpy.py`)
and, for the hub layout, `fla/layers/rwkv7.py` of flash-linear-attention at 0315a70.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.models import rwkv
from edge_mmllm_export.ops.base import Ops, Wkv7, Wkv7Weights
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: The mixed inputs, in the order in which the hub's older fused `x_x` stacks them.
_MIXES = ("r", "w", "k", "v", "a", "g")


@dataclass(frozen=True)
class Rwkv7Config:
    """Sizes; ranks are those of the low-rank adapters w (decay), a (rate), v and g (gate)."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    head_size: int
    dim_ffn: int
    ranks: Mapping[str, int]
    norm_eps: float
    group_norm_eps: float
    layout: str
    fused_mixes: bool


class Rwkv7:
    """Recurrent language model with a matrix state for each head; it never grows."""

    name = "rwkv7"
    context_length: int | None = None

    def __init__(self, config: Rwkv7Config) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Rwkv7:
        """Read the sizes from the tensors; config.json, where there is one, gives epsilons.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        t = rwkv.Tensors(checkpoint, ("blinkdl", "fla"))
        fla = t.layout == "fla"
        vocab, hidden = t.shape(f"{t.frame[0]}.weight", 2)
        layers = t.layers()
        att = f"{t.prefix}.0.{'attn' if fla else 'att'}"
        heads, head_size = t.shape(f"{att}.r_k", 2)
        if heads * head_size != hidden:
            raise t.misfit(f"heads * head size = {hidden}", f"{heads} * {head_size}")
        if not t.has(f"{t.frame[1]}.weight"):
            raise UnsupportedArchitecture(
                "an RWKV-7 without the norm before its first layer",
                where=str(checkpoint.source),
                expected=f"{t.frame[1]}.weight",
            )
        second = f"{t.prefix}.1.{'attn' if fla else 'att'}"
        ranks = {}
        for x in "wavg":
            where = second if x == "v" else att
            if fla and (x != "v" or layers > 1):
                ranks[x] = t.shape(f"{where}.{x}_lora.lora.0.weight", 2)[0]
            elif x != "v" or layers > 1:
                ranks[x] = t.shape(f"{where}.{x}1", 2)[1]
        eps = t.fields.number("norm_eps", 1e-5)
        default = head_size * eps if fla else rwkv.GROUP_NORM_EPS
        if fla:
            t.fields.one_of("hidden_act", ("sqrelu",), "sqrelu")
        return cls(
            Rwkv7Config(
                vocab_size=vocab,
                hidden_size=hidden,
                layers=layers,
                heads=heads,
                head_size=head_size,
                dim_ffn=t.shape(f"{t.prefix}.0.ffn.key.weight", 2)[0],
                ranks=ranks,
                norm_eps=eps,
                group_norm_eps=t.group_norm_eps(default),
                layout=t.layout,
                fused_mixes=t.has(f"{att}.x_x"),
            )
        )

    def parameters(self) -> list[Parameter]:
        c, width = self.config, self.hidden_size
        first, last = rwkv.frame_parameters(c.vocab_size, width)
        out = first
        for i in range(c.layers):
            p = f"layers.{i}"
            out += [*rwkv.norm_parameters(f"{p}.ln1", width)]
            out += [Parameter(f"{p}.att.x_{m}", (width,), "vector") for m in _MIXES]
            for m in self._adapters(i):
                out.append(Parameter(f"{p}.att.{m}.down", (c.ranks[m], width)))
                out.append(Parameter(f"{p}.att.{m}.up", (width, c.ranks[m])))
                if m != "g":
                    out.append(Parameter(f"{p}.att.{m}.bias", (width,), "vector"))
            out += [Parameter(f"{p}.att.{m}", (width, width)) for m in ("r", "k", "v", "o")]
            out += [Parameter(f"{p}.att.k_{m}", (width,), "vector") for m in ("k", "a")]
            out.append(Parameter(f"{p}.att.r_k", (c.heads, c.head_size), "vector"))
            out += [*rwkv.norm_parameters(f"{p}.att.ln_x", width)]
            out += [*rwkv.norm_parameters(f"{p}.ln2", width)]
            out.append(Parameter(f"{p}.ffn.x_k", (width,), "vector"))
            out.append(Parameter(f"{p}.ffn.k", (c.dim_ffn, width)))
            out.append(Parameter(f"{p}.ffn.v", (width, c.dim_ffn)))
        return out + last

    def _adapters(self, i: int) -> str:
        """The first layer makes the values that the others mix in, so it has no v."""
        return "wavg" if i else "wag"

    def sources(self, layout: Layout) -> dict[str, Source]:
        c = self.config
        out = rwkv.frame_sources(c.layout)
        for i in range(c.layers):
            out |= self._fla(i) if c.layout == "fla" else self._blinkdl(i)
        return out

    def _blinkdl(self, i: int) -> dict[str, Source]:
        """`blocks.N.att.*`: adapters are stored `(in, out)`, vectors `(1, 1, C)`."""
        c, p, b = self.config, f"layers.{i}", f"blocks.{i}"
        out = {
            **rwkv.matrix_sources(f"{p}.att", f"{b}.att", "rkvo"),
            **rwkv.matrix_sources(f"{p}.ffn", f"{b}.ffn", "kv"),
            f"{p}.att.r_k": Source(f"{b}.att.r_k"),
            f"{p}.ffn.x_k": rwkv.flat(f"{b}.ffn.x_k"),
        }
        for n in ("ln1", "ln2", "att.ln_x"):
            out |= rwkv.norm_sources(f"{p}.{n}", f"{b}.{n}")
        for n in (*(f"x_{m}" for m in _MIXES), "k_k", "k_a"):
            out[f"{p}.att.{n}"] = rwkv.flat(f"{b}.att.{n}")
        for m in self._adapters(i):
            rank, width = c.ranks[m], c.hidden_size
            out[f"{p}.att.{m}.down"] = rwkv.transposed(f"{b}.att.{m}1", (rank, width))
            out[f"{p}.att.{m}.up"] = rwkv.transposed(f"{b}.att.{m}2", (width, rank))
            if m != "g":
                out[f"{p}.att.{m}.bias"] = rwkv.flat(f"{b}.att.{m}0")
        return out

    def _fla(self, i: int) -> dict[str, Source]:
        """`model.layers.N.attn.*`: adapters are `nn.Linear`s inside an `nn.Sequential`."""
        c, p, b = self.config, f"layers.{i}", f"model.layers.{i}"
        out = {f"{p}.att.{m}": Source(f"{b}.attn.{m}_proj.weight") for m in "rkvo"}
        out |= {
            f"{p}.att.k_k": rwkv.flat(f"{b}.attn.k_k"),
            f"{p}.att.k_a": rwkv.flat(f"{b}.attn.k_a"),
            f"{p}.att.r_k": Source(f"{b}.attn.r_k"),
            f"{p}.ffn.x_k": rwkv.flat(f"{b}.ffn.x_k"),
            f"{p}.ffn.k": Source(f"{b}.ffn.key.weight"),
            f"{p}.ffn.v": Source(f"{b}.ffn.value.weight"),
            **rwkv.norm_sources(f"{p}.ln1", f"{b}.attn_norm"),
            **rwkv.norm_sources(f"{p}.ln2", f"{b}.ffn_norm"),
            **rwkv.norm_sources(f"{p}.att.ln_x", f"{b}.attn.g_norm"),
        }
        for j, m in enumerate(_MIXES):
            if c.fused_mixes:
                stored = (len(_MIXES), c.hidden_size)
                whole = rwkv.branch(len(_MIXES), j)
                out[f"{p}.att.x_{m}"] = Source(f"{b}.attn.x_x", whole=whole, stored=stored)
            else:
                out[f"{p}.att.x_{m}"] = rwkv.flat(f"{b}.attn.x_{m}")
        for m in self._adapters(i):
            lora = f"{b}.attn.{m}_lora.lora"
            out[f"{p}.att.{m}.down"] = Source(f"{lora}.0.weight")
            out[f"{p}.att.{m}.up"] = Source(f"{lora}.2.weight")
            if m != "g":
                out[f"{p}.att.{m}.bias"] = Source(f"{lora}.2.bias")
        return out

    def ignored(self) -> tuple[str, ...]:
        """BlinkDL's first layer carries adapters of v that nothing reads, or not."""
        return tuple(f"blocks.0.att.v{n}" for n in "012")

    def states(self) -> tuple[StateSpec, ...]:
        c = self.config
        return rwkv.states(c.layers, c.hidden_size, (1, c.heads, c.head_size, c.head_size))

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return rwkv.embed(op, w, ids)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        c = self.config
        x = rwkv.enter(op, w, x, c.norm_eps)
        states = self.states()
        delta: T | None = None
        first: T | None = None  # the first layer's values
        for i in range(c.layers):
            p, (att_shift, wkv, ffn_shift) = f"layers.{i}", states[3 * i : 3 * i + 3]
            x, h = rwkv.add_norm(op, w, f"{p}.ln1", x, delta, c.norm_eps)
            delta, values = self._time_mix(op, w, i, h, first, att_shift, wkv)
            first = values if first is None else first
            x, h = rwkv.add_norm(op, w, f"{p}.ln2", x, delta, c.norm_eps)
            (mixed,) = op.mix(h, op.token_shift(h, ffn_shift), w[f"{p}.ffn.x_k"])
            (k,) = op.linear(mixed, w[f"{p}.ffn.k"])
            (delta,) = op.linear(op.activation(k, "relu2"), w[f"{p}.ffn.v"])
        return rwkv.leave(op, w, x, delta, c.norm_eps)

    def _time_mix(
        self,
        op: Ops[T],
        w: Mapping[str, Weight],
        i: int,
        h: T,
        first: T | None,
        shift: StateSpec,
        state: StateSpec,
    ) -> tuple[T, T]:
        """h `(seq, hidden)` and the first layer's values -> `(seq, hidden)` and these values."""
        c, p = self.config, f"layers.{i}.att"
        previous = op.token_shift(h, shift)
        mixes = op.mix(h, previous, *(w[f"{p}.x_{m}"] for m in _MIXES))
        xr, xw, xk, xv, xa, xg = mixes

        def adapter(x: T, m: str) -> T:
            (low,) = op.linear(x, w[f"{p}.{m}.down"])
            if m in "wg":
                low = op.activation(low, "tanh" if m == "w" else "sigmoid")
            bias = () if m == "g" else (w[f"{p}.{m}.bias"],)
            return op.linear(low, w[f"{p}.{m}.up"], bias=bias)[0]

        (r,), (k,), (v,) = (
            op.linear(x, w[f"{p}.{m}"]) for m, x in (("r", xr), ("k", xk), ("v", xv))
        )
        if first is not None:
            v = op.lerp(v, first, op.activation(adapter(xv, "v"), "sigmoid"))
        gate, rate = (op.activation(adapter(x, m), "sigmoid") for m, x in (("w", xw), ("a", xa)))
        vectors = Wkv7Weights(w[f"{p}.k_k"], w[f"{p}.k_a"], w[f"{p}.r_k"])
        y, bonus = op.wkv7(Wkv7(r, gate, k, v, rate), vectors, state)
        y = rwkv.norm(op, w, f"{p}.ln_x", y, c.group_norm_eps, groups=c.heads)
        y = op.mul(op.add(y, bonus), adapter(xg, "g"))
        return op.linear(y, w[f"{p}.o"])[0], v
