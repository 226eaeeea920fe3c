"""Mamba-2, plain and multi-group.

Source: Mamba-2 (arXiv 2405.21060) and `modeling_mamba2.py` of transformers 5.23 (which, unlike
4.57, normalizes each of `n_groups` groups on its own in the gated norm).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import CheckpointError
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.models import state_spaces
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.head import logits
from edge_mmllm_export.models.mamba import config_file
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes in the paper's terms: d_inner = heads * head_dim, d_state = N, groups = G.

    Attributes:
        embedding: the checkpoint's name of the embedding.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    head_dim: int
    d_state: int
    groups: int
    conv_kernel: int
    norm_eps: float
    tied: bool
    conv_bias: bool = True
    bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    embedding: str = state_spaces.HUB_EMBEDDING

    @property
    def d_inner(self) -> int:
        return self.heads * self.head_dim

    @property
    def d_conv(self) -> int:
        """Channels that pass the convolution: x, B and C."""
        return self.d_inner + 2 * self.groups * self.d_state


class Mamba2:
    """State-space language model; its state never grows."""

    name = "mamba2"
    context_length: int | None = None

    def __init__(self, config: Mamba2Config) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Mamba2:
        """Read the hub's config or state-spaces' own. `context` is for transformers; a Mamba has
        no limit.

        Raises: CheckpointError.
        """
        where = config_file(checkpoint, cls.name)
        if state_spaces.architecture(checkpoint.config) is not None:
            config = _original(*state_spaces.fields(checkpoint.config, where))
        else:
            config = _hub(Fields(checkpoint.config, where))
        if config.heads % config.groups:
            raise CheckpointError(
                "the config's number of groups does not divide that of heads",
                where=where,
                found=f"{config.heads} heads, {config.groups} groups",
            )
        return cls(config)

    def parameters(self) -> list[Parameter]:
        c = self.config
        out = [Parameter("embed", (c.vocab_size, c.hidden_size), "embedding")]
        for i in range(c.layers):
            p = f"layers.{i}"
            out += [
                Parameter(f"{p}.norm", (c.hidden_size,), "vector"),
                Parameter(f"{p}.in.z", (c.d_inner, c.hidden_size)),
                Parameter(f"{p}.in.xBC", (c.d_conv, c.hidden_size)),
                Parameter(f"{p}.in.dt", (c.heads, c.hidden_size)),
                Parameter(f"{p}.conv", (c.d_conv, c.conv_kernel), "vector"),
                Parameter(f"{p}.dt_bias", (c.heads,), "vector"),
                Parameter(f"{p}.A", (c.heads,), "vector"),
                Parameter(f"{p}.D", (c.heads,), "vector"),
                Parameter(f"{p}.norm_gated", (c.d_inner,), "vector"),
                Parameter(f"{p}.out", (c.hidden_size, c.d_inner)),
            ]
            if c.conv_bias:
                out.append(Parameter(f"{p}.conv_bias", (c.d_conv,), "vector"))
            if c.bias:
                for n, width in (("z", c.d_inner), ("xBC", c.d_conv), ("dt", c.heads)):
                    out.append(Parameter(f"{p}.in.{n}_bias", (width,), "vector"))
                out.append(Parameter(f"{p}.out_bias", (c.hidden_size,), "vector"))
        out.append(Parameter("norm", (c.hidden_size,), "vector"))
        if not c.tied:
            out.append(Parameter("head", (c.vocab_size, c.hidden_size), "head"))
        return out

    def sources(self, layout: Layout) -> dict[str, Source]:
        """`backbone.layers.N.mixer.*`; in_proj holds z, xBC and dt one below the other."""
        c = self.config
        ends = np.cumsum([0, c.d_inner, c.d_conv, c.heads]).tolist()
        parts = dict(zip(("z", "xBC", "dt"), pairwise(ends), strict=True))
        out = state_spaces.frame_sources(c.embedding)
        for i in range(c.layers):
            ours, mixer = f"layers.{i}", f"backbone.layers.{i}.mixer"
            out |= state_spaces.layer_sources(i)
            out[f"{ours}.dt_bias"] = Source(f"{mixer}.dt_bias")
            out[f"{ours}.norm_gated"] = Source(f"{mixer}.norm.weight")
            for n, rows in parts.items():
                out[f"{ours}.in.{n}"] = Source(f"{mixer}.in_proj.weight", rows=rows)
                out[f"{ours}.in.{n}_bias"] = Source(f"{mixer}.in_proj.bias", rows=rows)
        wanted = {p.name for p in self.parameters()}
        return {name: source for name, source in out.items() if name in wanted}

    def ignored(self) -> tuple[str, ...]:
        return ("lm_head.weight",) if self.config.tied else ()

    def states(self) -> tuple[StateSpec, ...]:
        c = self.config
        out = []
        for i in range(c.layers):
            conv = (1, c.conv_kernel - 1, c.d_conv)
            ssm = (1, c.heads, c.d_state, c.head_dim)
            out.append(StateSpec(f"layers.{i}.conv", conv, "float32", "conv"))
            out.append(StateSpec(f"layers.{i}.ssm", ssm, "float32", "recurrent"))
        return tuple(out)

    def embed(self, op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
        return op.rows(w["embed"], ids)

    def decode(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        c = self.config
        delta: T | None = None
        for i in range(c.layers):
            x, h = op.add_norm(x, delta, w[f"layers.{i}.norm"], eps=c.norm_eps)
            delta = self._mixer(op, w, i, h)
        return logits(op, w, x, delta, eps=c.norm_eps, tied=c.tied)

    def _mixer(self, op: Ops[T], w: Mapping[str, Weight], i: int, h: T) -> T:
        """h `(seq, hidden)` -> `(seq, hidden)`."""
        c, p = self.config, f"layers.{i}"
        names = ("z", "xBC", "dt")
        # The time step's bias goes into the projection, unless that has one of its own.
        dt_bias = w[f"{p}.dt_bias"]
        bias = tuple(w[f"{p}.in.{n}_bias"] for n in names) if c.bias else (None, None, dt_bias)
        z, xbc, dt = op.linear(h, *(w[f"{p}.in.{n}"] for n in names), bias=bias)
        conv_state, ssm_state = self.states()[2 * i : 2 * i + 2]
        conv_bias = w[f"{p}.conv_bias"] if c.conv_bias else None
        xbc = op.causal_conv(xbc, w[f"{p}.conv"], conv_bias, conv_state, silu=True)
        width = c.groups * c.d_state
        x, b, c_ = op.split(xbc, (c.d_inner, width, width))
        dt = op.time_step(dt, dt_bias if c.bias else None, c.time_step_limit)
        y = op.gated_linear_attention(c_, b, x, dt, w[f"{p}.A"], ssm_state, groups=c.groups)
        y = op.add(y, op.head_scale(x, w[f"{p}.D"]))
        y = op.glu(z, y, "silu")
        y = op.norm(y, w[f"{p}.norm_gated"], eps=c.norm_eps, groups=c.groups)
        return op.linear(y, w[f"{p}.out"], bias=(w[f"{p}.out_bias"],) if c.bias else ())[0]


def _hub(f: Fields) -> Mamba2Config:
    """The config that transformers writes. Raises: CheckpointError."""
    hidden = f.size("hidden_size")
    heads, head_dim = f.size("num_heads"), f.size("head_dim")
    _check_width(f, "num_heads * head_dim", heads * head_dim, int(f.number("expand", 2) * hidden))
    f.one_of("hidden_act", ("silu", "swish"), "silu")
    state_spaces.refuse(f.where, rms_norm=(f.flag("rms_norm", True), True))
    return Mamba2Config(
        vocab_size=f.size("vocab_size"),
        hidden_size=hidden,
        layers=f.size("num_hidden_layers", limit=MAX_LAYERS),
        heads=heads,
        head_dim=head_dim,
        d_state=f.size("state_size"),
        groups=f.size("n_groups", 8),
        conv_kernel=f.size("conv_kernel", 4, least=2, limit=64),
        norm_eps=f.number("layer_norm_epsilon", 1e-5),
        tied=f.flag("tie_word_embeddings", False),
        conv_bias=f.flag("use_conv_bias", True),
        bias=f.flag("use_bias", False),
        time_step_limit=_limit(f, "time_step_limit"),
    )


def _original(model: Fields, mixer: Fields) -> Mamba2Config:
    """state-spaces' config; what it leaves out is the default of `Mamba2.__init__` there.

    Raises: CheckpointError.
    """
    hidden, head_dim = model.size("d_model"), mixer.size("headdim", 64)
    d_inner = int(mixer.number("expand", 2) * hidden)
    state_spaces.refuse(
        mixer.where,
        d_ssm=(mixer.get("d_ssm", d_inner), d_inner),
        D_has_hdim=(mixer.get("D_has_hdim", False), False),
        rmsnorm=(mixer.get("rmsnorm", True), True),
        norm_before_gate=(mixer.get("norm_before_gate", False), False),
    )
    heads = d_inner // head_dim
    _check_width(mixer, "heads * headdim", heads * head_dim, d_inner)
    return Mamba2Config(
        vocab_size=state_spaces.vocab_size(model),
        hidden_size=hidden,
        layers=model.size("n_layer", limit=MAX_LAYERS),
        heads=heads,
        head_dim=head_dim,
        d_state=mixer.size("d_state", 128),
        groups=mixer.size("ngroups", 1),
        conv_kernel=mixer.size("d_conv", 4, least=2, limit=64),
        norm_eps=state_spaces.NORM_EPS,
        tied=model.flag("tie_embeddings", True),
        conv_bias=mixer.flag("conv_bias", True),
        bias=mixer.flag("bias", False),
        time_step_limit=_limit(mixer, "dt_limit"),
        embedding=state_spaces.ORIGINAL_EMBEDDING,
    )


def _check_width(f: Fields, name: str, found: int, d_inner: int) -> None:
    if found != d_inner:
        raise CheckpointError(
            "the config's sizes do not fit together",
            where=f.where,
            expected=f"{name} = expand * width = {d_inner}",
            found=str(found),
        )


def _limit(f: Fields, key: str) -> tuple[float, float]:
    """`[low, high]`; infinity is a bare `Infinity`, or `{"__float__": "Infinity"}` since
    transformers 5 writes strict JSON. Raises: CheckpointError."""
    values = f.get(key, [0.0, float("inf")])
    if isinstance(values, list) and len(values) == 2:
        plain = [v.get("__float__") if isinstance(v, dict) else v for v in values]
        try:
            low, high = (float(str(v)) for v in plain)
        except (TypeError, ValueError):
            low = high = float("nan")
        if low <= high:
            return low, high
    raise CheckpointError(
        f"the config's {key!r} cannot be used",
        where=f.where,
        expected="two numbers, the smaller first",
        found=str(values)[:80],
    )
