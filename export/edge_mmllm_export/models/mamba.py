"""Mamba-1.

Source: Mamba (arXiv 2312.00752), algorithm 2 with section 3.4's block, and `modeling_mamba.py` of
transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Layout
from edge_mmllm_export.models import state_spaces
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.head import logits
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class MambaConfig:
    """Sizes in the paper's terms: d_inner = D, d_state = N, dt_rank = R.

    Attributes:
        embedding: the checkpoint's name of the embedding.
    """

    vocab_size: int
    hidden_size: int
    layers: int
    d_inner: int
    d_state: int
    dt_rank: int
    conv_kernel: int
    norm_eps: float
    tied: bool
    conv_bias: bool = True
    bias: bool = False
    embedding: str = state_spaces.HUB_EMBEDDING


class Mamba:
    """Selective state-space language model; its state never grows."""

    name = "mamba"
    context_length: int | None = None

    def __init__(self, config: MambaConfig) -> None:
        c = self.config = config
        self.vocab_size, self.hidden_size, self.layers = c.vocab_size, c.hidden_size, c.layers

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint, context: int | None = None) -> Mamba:
        """Read the hub's config or state-spaces' own. `context` is for transformers; a Mamba has
        no limit.

        Raises: CheckpointError.
        """
        where = config_file(checkpoint, cls.name)
        if state_spaces.architecture(checkpoint.config) is not None:
            return cls(_original(*state_spaces.fields(checkpoint.config, where)))
        return cls(hub_config(Fields(checkpoint.config, where)))

    def parameters(self) -> list[Parameter]:
        c = self.config
        out = [Parameter("embed", (c.vocab_size, c.hidden_size), "embedding")]
        for i in range(c.layers):
            p = f"layers.{i}"
            out += [
                Parameter(f"{p}.norm", (c.hidden_size,), "vector"),
                Parameter(f"{p}.in.x", (c.d_inner, c.hidden_size)),
                Parameter(f"{p}.in.z", (c.d_inner, c.hidden_size)),
                Parameter(f"{p}.conv", (c.d_inner, c.conv_kernel), "vector"),
                Parameter(f"{p}.x.dt", (c.dt_rank, c.d_inner)),
                Parameter(f"{p}.x.B", (c.d_state, c.d_inner)),
                Parameter(f"{p}.x.C", (c.d_state, c.d_inner)),
                Parameter(f"{p}.dt", (c.d_inner, c.dt_rank)),
                Parameter(f"{p}.dt_bias", (c.d_inner,), "vector"),
                Parameter(f"{p}.A", (c.d_inner, c.d_state), "table"),
                Parameter(f"{p}.D", (c.d_inner,), "vector"),
                Parameter(f"{p}.out", (c.hidden_size, c.d_inner)),
            ]
            if c.conv_bias:
                out.append(Parameter(f"{p}.conv_bias", (c.d_inner,), "vector"))
            if c.bias:
                out.append(Parameter(f"{p}.in.x_bias", (c.d_inner,), "vector"))
                out.append(Parameter(f"{p}.in.z_bias", (c.d_inner,), "vector"))
                out.append(Parameter(f"{p}.out_bias", (c.hidden_size,), "vector"))
        out.append(Parameter("norm", (c.hidden_size,), "vector"))
        if not c.tied:
            out.append(Parameter("head", (c.vocab_size, c.hidden_size), "head"))
        return out

    def sources(self, layout: Layout) -> dict[str, Source]:
        """`backbone.layers.N.mixer.*`; in_proj holds x and z one below the other, x_proj dt, B
        and C."""
        c = self.config
        ends = np.cumsum([0, c.dt_rank, c.d_state, c.d_state]).tolist()
        parts = dict(zip(("dt", "B", "C"), pairwise(ends), strict=True))
        out = state_spaces.frame_sources(c.embedding)
        for i in range(c.layers):
            ours, mixer = f"layers.{i}", f"backbone.layers.{i}.mixer"
            out |= state_spaces.layer_sources(i)
            out[f"{ours}.dt"] = Source(f"{mixer}.dt_proj.weight")
            out[f"{ours}.dt_bias"] = Source(f"{mixer}.dt_proj.bias")
            for n, start in (("x", 0), ("z", c.d_inner)):
                rows = (start, start + c.d_inner)
                out[f"{ours}.in.{n}"] = Source(f"{mixer}.in_proj.weight", rows=rows)
                out[f"{ours}.in.{n}_bias"] = Source(f"{mixer}.in_proj.bias", rows=rows)
            for n, rows in parts.items():
                out[f"{ours}.x.{n}"] = Source(f"{mixer}.x_proj.weight", rows=rows)
        wanted = {p.name for p in self.parameters()}
        return {name: source for name, source in out.items() if name in wanted}

    def ignored(self) -> tuple[str, ...]:
        return ("lm_head.weight",) if self.config.tied else ()

    def states(self) -> tuple[StateSpec, ...]:
        c = self.config
        out = []
        for i in range(c.layers):
            conv = (1, c.conv_kernel - 1, c.d_inner)
            out.append(StateSpec(f"layers.{i}.conv", conv, "float32", "conv"))
            ssm = (1, c.d_state, c.d_inner)
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
        bias = (w[f"{p}.in.x_bias"], w[f"{p}.in.z_bias"]) if c.bias else ()
        x, z = op.linear(h, w[f"{p}.in.x"], w[f"{p}.in.z"], bias=bias)
        conv_state, ssm_state = self.states()[2 * i : 2 * i + 2]
        conv_bias = w[f"{p}.conv_bias"] if c.conv_bias else None
        x = op.causal_conv(x, w[f"{p}.conv"], conv_bias, conv_state, silu=True)
        low, b, c_ = self._selection(
            op, *op.linear(x, *(w[f"{p}.x.{n}"] for n in ("dt", "B", "C")))
        )
        dt = op.linear(low, w[f"{p}.dt"], bias=(w[f"{p}.dt_bias"],))[0]
        dt = op.time_step(dt, None, (0.0, float("inf")))
        y = op.selective_scan(x, dt, b, c_, w[f"{p}.A"], w[f"{p}.D"], ssm_state)
        y = op.glu(z, y, "silu")
        return op.linear(y, w[f"{p}.out"], bias=(w[f"{p}.out_bias"],) if c.bias else ())[0]

    def _selection(self, op: Ops[T], dt: T, b: T, c: T) -> tuple[T, T, T]:
        """What x_proj gives, `(seq, dt_rank)` and twice `(seq, d_state)`, as the scan takes it."""
        return dt, b, c


def config_file(checkpoint: Checkpoint, name: str) -> str:
    """Where the config lies, for messages. Raises: UnsupportedArchitecture."""
    if checkpoint.layout != "hub":
        raise UnsupportedArchitecture(
            f"{name} from a {checkpoint.layout} checkpoint has no weight map here",
            where=str(checkpoint.source),
            expected="the hub layout (config.json and safetensors)",
        )
    return f"{checkpoint.source}, config.json"


def hub_config(f: Fields) -> MambaConfig:
    """The config that transformers writes. Raises: CheckpointError."""
    f.one_of("hidden_act", ("silu", "swish"), "silu")
    hidden = f.size("hidden_size")
    return MambaConfig(
        vocab_size=f.size("vocab_size"),
        hidden_size=hidden,
        layers=f.size("num_hidden_layers", limit=MAX_LAYERS),
        d_inner=f.size("intermediate_size", int(f.number("expand", 2) * hidden)),
        d_state=f.size("state_size", 16),
        dt_rank=_dt_rank(f, "time_step_rank", hidden),
        conv_kernel=f.size("conv_kernel", 4, least=2, limit=64),
        norm_eps=f.number("layer_norm_epsilon", 1e-5),
        tied=f.flag("tie_word_embeddings", True),
        conv_bias=f.flag("use_conv_bias", True),
        bias=f.flag("use_bias", False),
    )


def _original(model: Fields, mixer: Fields) -> MambaConfig:
    hidden = model.size("d_model")
    return MambaConfig(
        vocab_size=state_spaces.vocab_size(model),
        hidden_size=hidden,
        layers=model.size("n_layer", limit=MAX_LAYERS),
        d_inner=int(mixer.number("expand", 2) * hidden),
        d_state=mixer.size("d_state", 16),
        dt_rank=_dt_rank(mixer, "dt_rank", hidden),
        conv_kernel=mixer.size("d_conv", 4, least=2, limit=64),
        norm_eps=state_spaces.NORM_EPS,
        tied=model.flag("tie_embeddings", True),
        conv_bias=mixer.flag("conv_bias", True),
        bias=mixer.flag("bias", False),
        embedding=state_spaces.ORIGINAL_EMBEDDING,
    )


def _dt_rank(f: Fields, key: str, hidden: int) -> int:
    """A number, or `auto`: a sixteenth of the width, rounded up. Raises: CheckpointError."""
    return -(-hidden // 16) if f.get(key, "auto") == "auto" else f.size(key)
