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
from numpy.typing import NDArray

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class Mamba2Config:
    """Sizes in the paper's terms: d_inner = heads * head_dim, d_state = N, groups = G."""

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
        """Read the hub config. `context` is for transformers; a Mamba has no limit.

        Raises: CheckpointError.
        """
        if checkpoint.layout != "hub":
            raise UnsupportedArchitecture(
                f"mamba2 from a {checkpoint.layout} checkpoint has no weight map here",
                where=str(checkpoint.source),
                expected="the hub layout (config.json and safetensors)",
            )
        where = f"{checkpoint.source}, config.json"
        f = Fields(checkpoint.config, where)
        hidden = f.size("hidden_size")
        heads, head_dim = f.size("num_heads"), f.size("head_dim")
        if heads * head_dim != int(f.number("expand", 2) * hidden):
            raise CheckpointError(
                "the config's sizes do not fit together",
                where=where,
                expected=f"num_heads * head_dim = expand * hidden_size = {2 * hidden}",
                found=f"{heads} * {head_dim}",
            )
        f.one_of("hidden_act", ("silu", "swish"), "silu")
        if not f.flag("rms_norm", True):
            raise UnsupportedArchitecture("mamba2 without its gated norm", where=where)
        groups = f.size("n_groups", 8)
        if heads % groups:
            raise CheckpointError(
                "the config's n_groups does not divide num_heads",
                where=where,
                found=f"{heads} heads, {groups} groups",
            )
        return cls(
            Mamba2Config(
                vocab_size=f.size("vocab_size"),
                hidden_size=hidden,
                layers=f.size("num_hidden_layers", limit=MAX_LAYERS),
                heads=heads,
                head_dim=head_dim,
                d_state=f.size("state_size"),
                groups=groups,
                conv_kernel=f.size("conv_kernel", 4, least=2, limit=64),
                norm_eps=f.number("layer_norm_epsilon", 1e-5),
                tied=f.flag("tie_word_embeddings", False),
                conv_bias=f.flag("use_conv_bias", True),
                bias=f.flag("use_bias", False),
                time_step_limit=_time_step_limit(f),
            )
        )

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
        out = {
            "embed": Source("backbone.embeddings.weight"),
            "norm": Source("backbone.norm_f.weight"),
            "head": Source("lm_head.weight"),
        }
        for i in range(c.layers):
            ours, theirs = f"layers.{i}", f"backbone.layers.{i}"
            mixer = f"{theirs}.mixer"
            out |= {
                f"{ours}.norm": Source(f"{theirs}.norm.weight"),
                f"{ours}.conv": Source(f"{mixer}.conv1d.weight"),
                f"{ours}.conv_bias": Source(f"{mixer}.conv1d.bias"),
                f"{ours}.dt_bias": Source(f"{mixer}.dt_bias"),
                f"{ours}.A": Source(f"{mixer}.A_log", apply=_minus_exp),
                f"{ours}.D": Source(f"{mixer}.D"),
                f"{ours}.norm_gated": Source(f"{mixer}.norm.weight"),
                f"{ours}.out": Source(f"{mixer}.out_proj.weight"),
                f"{ours}.out_bias": Source(f"{mixer}.out_proj.bias"),
            }
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
        x = op.logit_rows(x)
        delta = op.logit_rows(delta) if delta is not None else None
        _, x = op.add_norm(x, delta, w["norm"], eps=c.norm_eps)
        return op.linear(x, w["embed"] if c.tied else w["head"])[0]

    def _mixer(self, op: Ops[T], w: Mapping[str, Weight], i: int, h: T) -> T:
        """h `(seq, hidden)` -> `(seq, hidden)`."""
        c, p = self.config, f"layers.{i}"
        names = ("z", "xBC", "dt")
        bias = tuple(w[f"{p}.in.{n}_bias"] for n in names) if c.bias else ()
        z, xbc, dt = op.linear(h, *(w[f"{p}.in.{n}"] for n in names), bias=bias)
        conv_state, ssm_state = self.states()[2 * i : 2 * i + 2]
        conv_bias = w[f"{p}.conv_bias"] if c.conv_bias else None
        xbc = op.causal_conv(xbc, w[f"{p}.conv"], conv_bias, conv_state, silu=True)
        width = c.groups * c.d_state
        x, b, c_ = op.split(xbc, (c.d_inner, width, width))
        dt = op.time_step(dt, w[f"{p}.dt_bias"], c.time_step_limit)
        y = op.gated_linear_attention(c_, b, x, dt, w[f"{p}.A"], ssm_state, groups=c.groups)
        y = op.add(y, op.head_scale(x, w[f"{p}.D"]))
        y = op.glu(z, y, "silu")
        y = op.norm(y, w[f"{p}.norm_gated"], eps=c.norm_eps, groups=c.groups)
        return op.linear(y, w[f"{p}.out"], bias=(w[f"{p}.out_bias"],) if c.bias else ())[0]


def _time_step_limit(f: Fields) -> tuple[float, float]:
    """`[low, high]`; infinity is a bare `Infinity`, or `{"__float__": "Infinity"}` since
    transformers 5 writes strict JSON. Raises: CheckpointError."""
    values = f.get("time_step_limit", [0.0, float("inf")])
    if isinstance(values, list) and len(values) == 2:
        plain = [v.get("__float__") if isinstance(v, dict) else v for v in values]
        try:
            low, high = (float(str(v)) for v in plain)
        except (TypeError, ValueError):
            low = high = float("nan")
        if low <= high:
            return low, high
    raise CheckpointError(
        "the config's 'time_step_limit' cannot be used",
        where=f.where,
        expected="two numbers, the smaller first",
        found=str(values)[:80],
    )


def _minus_exp(a_log: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(-np.exp(a_log), np.float32)
