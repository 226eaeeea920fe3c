"""What the RWKV versions share: sizes read from tensors, embedding and head, group-norm epsilon.

Layouts: `blinkdl` (a `.pth` of BlinkDL's: `emb`, `blocks.N.att`, `blocks.N.ffn`, `ln_out`,
`head`), `fla` (flash-linear-attention: `model.layers.N.attn`, `lm_head`) and `hf` (transformers'
`RwkvForCausalLM`: `rwkv.blocks.N.attention`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm.spec import StateSpec
from edge_mmllm_export.checkpoints.base import Checkpoint, Float32, TensorInfo
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

_BLOCKS = ("att", "ffn")

#: BlinkDL's and transformers' names of the matrices.
LONG = {"r": "receptance", "k": "key", "v": "value", "g": "gate", "o": "output"}

#: BlinkDL divides a head's output by 8 before a group norm with epsilon 1e-5, which is the same
#: as an epsilon of 64e-5. Source: RWKV-LM, `head_size_divisor`.
GROUP_NORM_EPS = 64e-5

#: How to find each layout: a tensor, the layers' prefix, our frame's names in theirs.
_LAYOUTS = {
    "blinkdl": ("emb.weight", "blocks", ("emb", "blocks.0.ln0", "ln_out", "head")),
    "fla": (
        "model.embeddings.weight",
        "model.layers",
        ("model.embeddings", "model.layers.0.pre_norm", "model.norm", "lm_head"),
    ),
    "hf": (
        "rwkv.embeddings.weight",
        "rwkv.blocks",
        ("rwkv.embeddings", "rwkv.blocks.0.pre_ln", "rwkv.ln_out", "head"),
    ),
}


class Tensors:
    """A checkpoint's tensor shapes, from which an RWKV's sizes are read.

    Raises:
        UnsupportedArchitecture: a layout without a weight map.
    """

    def __init__(self, checkpoint: Checkpoint, layouts: tuple[str, ...]) -> None:
        self._tensors, self._where = checkpoint.tensors, str(checkpoint.source)
        self.fields = Fields(
            {} if checkpoint.layout == "gguf" else checkpoint.config, f"{self._where}, config.json"
        )
        self.layout = next((n for n in layouts if _LAYOUTS[n][0] in self._tensors), "")
        if not self.layout:
            raise UnsupportedArchitecture(
                "an RWKV in a layout without a weight map here",
                where=self._where,
                expected="a tensor " + " | ".join(_LAYOUTS[name][0] for name in layouts),
                found=", ".join(list(self._tensors)[:4]),
            )
        self.prefix = _LAYOUTS[self.layout][1]
        self.frame = _LAYOUTS[self.layout][2]

    def has(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str, dims: int) -> tuple[int, ...]:
        """The shape of a tensor without leading axes of one. Raises: CheckpointError."""
        info = self._tensors.get(name)
        shape = () if info is None else info.shape
        while len(shape) > dims and shape[0] == 1:
            shape = shape[1:]
        if info is None or len(shape) != dims or 0 in shape:
            raise CheckpointError(
                f"the model's sizes cannot be read from {name!r}",
                where=self._where,
                expected=f"a tensor of {dims} axes",
                found="none of that name" if info is None else str(info.shape),
            )
        return shape

    def shape_any(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor without axes of one. Raises: CheckpointError."""
        info = self._tensors.get(name)
        shape = tuple(d for d in info.shape if d != 1) if info else ()
        return shape or self.shape(name, 1)

    def elements(self, name: str) -> int:
        """How many numbers a tensor has. Raises: CheckpointError."""
        return math.prod(self.shape_any(name))

    def layers(self) -> int:
        """One more than the highest layer number. Raises: CheckpointError."""
        pattern = re.compile(re.escape(self.prefix) + r"\.(\d{1,9})\.")
        found = [int(m[1]) for name in self._tensors if (m := pattern.match(name))]
        count = max(found, default=-1) + 1
        if not 1 <= count <= MAX_LAYERS:
            raise self.misfit(f"layers {self.prefix}.0 and up", f"{count} layers")
        return count

    def misfit(self, expected: str, found: str) -> CheckpointError:
        return CheckpointError(
            "the checkpoint's tensors do not fit together",
            where=self._where,
            expected=expected,
            found=found,
        )

    def group_norm_eps(self, default: float) -> float:
        """`group_norm_eps` of config.json, else what the model's code computes."""
        return self.fields.number("group_norm_eps", default)


def version(tensors: Mapping[str, TensorInfo]) -> str | None:
    """The `model_type` of a `.pth` in BlinkDL's layout, from what only one version has."""
    if "emb.weight" not in tensors:
        return None
    att = "blocks.0.att"
    marks = {
        "rwkv7": f"{att}.r_k",
        "rwkv6": f"{att}.time_maa_x",
        "rwkv5": f"{att}.ln_x.weight",
        "rwkv4": f"{att}.time_first",
    }
    return next((name for name, tensor in marks.items() if tensor in tensors), None)


def flat(name: str) -> Source:
    """A vector stored with axes of one before it."""
    return Source(name, whole=np.ravel)


def transposed(name: str, shape: tuple[int, int]) -> Source:
    """A `(N, K)` matrix stored as `(K, N)`."""
    return Source(name, whole=np.transpose, stored=(shape[1], shape[0]))


def branch(count: int, index: int) -> Callable[[Float32], Float32]:
    """Takes one of `count` equal parts along the first axis."""
    return lambda stacked: np.reshape(stacked, (count, -1, *stacked.shape[1:]))[index]


def minus_exp(x: Float32) -> Float32:
    """A stored decay -> its logarithm a token."""
    return np.asarray(-np.exp(x), np.float32)


def shift_share(name: str) -> Source:
    """RWKV-4's and 5's `time_mix`, the share of the token itself -> that of the one before."""
    return Source(name, whole=lambda x: np.asarray(1 - np.ravel(x), np.float32))


def states(layers: int, hidden: int, wkv: tuple[int, ...]) -> tuple[StateSpec, ...]:
    """For each layer the last input of its time mixing, the wkv state of shape `wkv`, and the
    last input of its channel mixing."""
    out = list[StateSpec]()
    for i in range(layers):
        att, ffn = (
            StateSpec(f"layers.{i}.{m}.shift", (1, 1, hidden), "float32", "shift") for m in _BLOCKS
        )
        out += [att, StateSpec(f"layers.{i}.att.wkv", wkv, "float32", "recurrent"), ffn]
    return tuple(out)


def channel_mix_parameters(p: str, width: int, dim_ffn: int) -> list[Parameter]:
    """What `channel_mix` reads."""
    return [
        *(Parameter(f"{p}.x_{m}", (width,), "vector") for m in "kr"),
        Parameter(f"{p}.k", (dim_ffn, width)),
        Parameter(f"{p}.r", (width, width)),
        Parameter(f"{p}.v", (width, dim_ffn)),
    ]


def channel_mix(op: Ops[T], w: Mapping[str, Weight], p: str, h: T, state: StateSpec) -> T:
    """`sigmoid(R xr) * V relu(K xk)^2`, of RWKV-4 to 6. h `(seq, hidden)`."""
    xk, xr = op.mix(h, op.token_shift(h, state), w[f"{p}.x_k"], w[f"{p}.x_r"])
    (k,), (r,) = op.linear(xk, w[f"{p}.k"]), op.linear(xr, w[f"{p}.r"])
    (v,) = op.linear(op.activation(k, "relu2"), w[f"{p}.v"])
    return op.mul(op.activation(r, "sigmoid"), v)


def norm_parameters(name: str, width: int) -> list[Parameter]:
    return [Parameter(f"{name}.{part}", (width,), "vector") for part in ("weight", "bias")]


def norm_sources(ours: str, theirs: str) -> dict[str, Source]:
    return {f"{ours}.{part}": Source(f"{theirs}.{part}") for part in ("weight", "bias")}


def matrix_sources(ours: str, theirs: str, matrices: str) -> dict[str, Source]:
    """Matrices of one block, by their letters in `LONG`."""
    return {f"{ours}.{m}": Source(f"{theirs}.{LONG[m]}.weight") for m in matrices}


def blinkdl_sources(ours: str, theirs: str) -> dict[str, Source]:
    """The matrices and norms of a layer of RWKV-5 and 6, as BlinkDL names them."""
    return {
        **matrix_sources(f"{ours}.att", f"{theirs}.att", "rkvgo"),
        **matrix_sources(f"{ours}.ffn", f"{theirs}.ffn", "krv"),
        **norm_sources(f"{ours}.ln1", f"{theirs}.ln1"),
        **norm_sources(f"{ours}.ln2", f"{theirs}.ln2"),
        **norm_sources(f"{ours}.att.ln_x", f"{theirs}.att.ln_x"),
    }


def frame_parameters(vocab_size: int, hidden: int) -> tuple[list[Parameter], list[Parameter]]:
    """What comes before the layers, and after."""
    first = [Parameter("embed", (vocab_size, hidden), "embedding"), *norm_parameters("ln0", hidden)]
    last = [*norm_parameters("ln_out", hidden), Parameter("head", (vocab_size, hidden), "head")]
    return first, last


def frame_sources(layout: str) -> dict[str, Source]:
    embed, ln0, ln_out, head = _LAYOUTS[layout][2]
    return {
        "embed": Source(f"{embed}.weight"),
        "head": Source(f"{head}.weight"),
        **norm_sources("ln0", ln0),
        **norm_sources("ln_out", ln_out),
    }


def norm(op: Ops[T], w: Mapping[str, Weight], name: str, x: T, eps: float, groups: int = 1) -> T:
    """Layer norm of x `(seq, width)`, or of each of `groups` parts of its width."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return op.norm(x, weight, eps=eps, groups=groups, bias=bias)


def add_norm(
    op: Ops[T], w: Mapping[str, Weight], name: str, x: T, delta: T | None, eps: float
) -> tuple[T, T]:
    """Residual stream x `(seq, hidden)` with the last block's output added, and its layer norm."""
    weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
    return op.add_norm(x, delta, weight, eps=eps, bias=bias)


def embed(op: Ops[T], w: Mapping[str, Weight], ids: T) -> T:
    """Token ids -> `(seq, hidden)`; `ln0` belongs to the first layer, so `decode` applies it."""
    return op.rows(w["embed"], ids)


def enter(op: Ops[T], w: Mapping[str, Weight], x: T, eps: float) -> T:
    """The norm before the first layer."""
    return norm(op, w, "ln0", x, eps)


def leave(
    op: Ops[T], w: Mapping[str, Weight], x: T, delta: T | None, eps: float, head: str = "head"
) -> T:
    """Residual stream `(seq, hidden)` and the last layer's output -> logits of the rows asked."""
    x = op.logit_rows(x)
    delta = op.logit_rows(delta) if delta is not None else None
    _, x = add_norm(op, w, "ln_out", x, delta, eps)
    return op.linear(x, w[head])[0]
