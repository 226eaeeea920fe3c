"""The pre-norm transformer layer that vision and audio encoders share.

`x + attention(norm(x))`, then `x + mlp(norm(x))`, over all rows at once. What differs between the
families is data: names, biases, a scale on each branch, a gate in the MLP.
Source: ViT (arXiv 2010.11929) eq. 2 and 3; CaiT (2103.17239) for the scale on each branch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm.errors import CheckpointError, UnsupportedArchitecture
from edge_mmllm_export.models.config import Fields
from edge_mmllm_export.ops.base import Activation, Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

#: Pixels of a picture's side; published encoders stay below 1024.
MAX_PICTURE = 1 << 13

_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
}


@dataclass(frozen=True)
class Block:
    """One layer.

    Attributes:
        biases: which of q, k and v have a bias.
        gated: `silu(gate(x)) * up(x)` in the MLP, instead of one activated projection.
        scaled: a weight for each channel of what each branch adds.
    """

    hidden_size: int
    intermediate_size: int
    heads: int
    norm_eps: float
    activation: Activation
    biases: str = "qkv"
    gated: bool = False
    scaled: bool = False

    def parameters(self, prefix: str) -> list[Parameter]:
        """The layer's weights, each name after `prefix`."""
        h, f = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "norm_attn": (h,),
            "norm_attn_bias": (h,),
            "attn.q": (h, h),
            "attn.k": (h, h),
            "attn.v": (h, h),
            **{f"attn.{n}_bias": (h,) for n in self.biases},
            "attn.o": (h, h),
            "attn.o_bias": (h,),
            "norm_mlp": (h,),
            "norm_mlp_bias": (h,),
        }
        if self.gated:
            shapes |= {"mlp.gate": (f, h), "mlp.gate_bias": (f,)}
        shapes |= {
            "mlp.up": (f, h),
            "mlp.up_bias": (f,),
            "mlp.down": (h, f),
            "mlp.down_bias": (h,),
        }
        if self.scaled:
            shapes |= {"scale_attn": (h,), "scale_mlp": (h,)}
        return [
            Parameter(prefix + name, shape, "matrix" if len(shape) == 2 else "vector")
            for name, shape in shapes.items()
        ]

    def sources(self, prefix: str, theirs: str, names: Mapping[str, str]) -> dict[str, Source]:
        """Names by stem, e.g. `attn.q` -> `self_attn.q_proj`, after `theirs`.

        Where `attn.qkv` is named, q, k and v are its rows, one after another.
        """
        out, h = {}, self.hidden_size
        for p in self.parameters(""):
            stem = p.name.removesuffix("_bias")
            suffix = ".bias" if p.name.endswith("_bias") else ".weight"
            if stem.startswith("scale_"):
                suffix = ""
            rows = None
            if stem in ("attn.q", "attn.k", "attn.v") and "attn.qkv" in names:
                at = "qkv".index(stem[-1])
                stem, rows = "attn.qkv", (at * h, (at + 1) * h)
            out[prefix + p.name] = Source(theirs + names[stem] + suffix, rows=rows)
        return out

    def forward(
        self,
        op: Ops[T],
        w: Mapping[str, Weight],
        prefix: str,
        x: T,
        *,
        angles: T | None = None,
        frames: T | None = None,
    ) -> T:
        """x `(seq, hidden)` -> the same.

        Args:
            angles: rotary angles `(seq, head_dim / 2)` of q and k.
            frames: see `full_attention`.
        """

        def of(name: str) -> Weight:
            return w[prefix + name]

        h = op.norm(x, of("norm_attn"), eps=self.norm_eps, bias=of("norm_attn_bias"))
        bias = tuple(of(f"attn.{n}_bias") if n in self.biases else None for n in "qkv")
        q, k, v = op.linear(h, of("attn.q"), of("attn.k"), of("attn.v"), bias=bias)
        if angles is not None:
            q, k = op.rotary(q, angles, self.heads), op.rotary(k, angles, self.heads)
        scale = (self.hidden_size // self.heads) ** -0.5
        h = op.full_attention(q, k, v, heads=self.heads, scale=scale, frames=frames)
        h = op.linear(h, of("attn.o"), bias=(of("attn.o_bias"),))[0]
        if self.scaled:
            h = op.mul(h, op.table(of("scale_attn")))
        x = op.add(x, h)
        h = op.norm(x, of("norm_mlp"), eps=self.norm_eps, bias=of("norm_mlp_bias"))
        if self.gated:
            wide, biases = (of("mlp.gate"), of("mlp.up")), (of("mlp.gate_bias"), of("mlp.up_bias"))
            gate, up = op.linear(h, *wide, bias=biases)
            h = op.glu(gate, up, self.activation)
        else:
            h = op.linear(h, of("mlp.up"), bias=(of("mlp.up_bias"),))[0]
            h = op.activation(h, self.activation)
        h = op.linear(h, of("mlp.down"), bias=(of("mlp.down_bias"),))[0]
        if self.scaled:
            h = op.mul(h, op.table(of("scale_mlp")))
        return op.add(x, h)


def activation_of(f: Fields, key: str, default: str) -> Activation:
    """The activation that a config names. Raises: UnsupportedArchitecture."""
    name = f.text(key, default)
    if name not in _ACTIVATIONS:
        raise UnsupportedArchitecture(
            f"activation {name!r} has no definition here",
            where=f"{f.where}, {key}",
            expected=" | ".join(_ACTIVATIONS),
        )
    return _ACTIVATIONS[name]


def picture_sizes(f: Fields, picture: int, patch: int) -> tuple[int, int]:
    """Pixels of a picture's side and of a patch's, with their defaults. Raises: CheckpointError."""
    found = f.size("image_size", picture, limit=MAX_PICTURE), f.size("patch_size", patch)
    if found[1] > found[0]:
        raise CheckpointError(
            "the encoder's patches are larger than its picture",
            where=f.where,
            expected=f"patch_size up to image_size {found[0]}",
            found=str(found[1]),
        )
    return found


def check_heads(f: Fields, hidden_size: int, heads: int) -> None:
    """Raises: CheckpointError where the heads do not divide the width."""
    if hidden_size % heads:
        raise CheckpointError(
            "the encoder's heads do not divide its width",
            where=f.where,
            expected=f"a divisor of {hidden_size}",
            found=f"{heads} heads",
        )


def kept_layers(layers: int, feature_layer: int, where: str) -> int:
    """How many layers run for the hidden state `feature_layer`, counted as transformers does: 0
    is what enters the first layer, -1 what leaves the last. Raises: CheckpointError."""
    kept = feature_layer if feature_layer >= 0 else layers + 1 + feature_layer
    if not 0 <= kept <= layers:
        raise CheckpointError(
            "the encoder has no such hidden state",
            where=where,
            expected=f"a feature layer from {-layers - 1} to {layers}",
            found=str(feature_layer),
        )
    return kept


def flat(name: str, stored: tuple[int, ...]) -> Source:
    """A small table that the checkpoint keeps with leading axes of one, e.g. a class token."""
    return Source(name, whole=lambda theirs: theirs, stored=stored)
