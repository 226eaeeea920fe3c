"""DINOv2's ViT: a class token, a scale on each branch, in the largest model a gated MLP.

Position embeddings are stretched at export where the pictures have another size than those it was
trained on, bicubically, as transformers does at run time.

Source: DINOv2 (arXiv 2304.07193); `Dinov2Model` of transformers 5.23, in the hub's names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from edge_mmllm.errors import CheckpointError
from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.models.clip import Select
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.vit import Block, activation_of, check_heads, flat
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class Dinov2Config:
    """Sizes of the tower, and what it hands on.

    Attributes:
        trained_size: pixels of the pictures whose position embeddings are stored.
        image_size: pixels of those it will see.
        select: `full` keeps the class token as the first row, `default` drops it.
    """

    trained_size: int
    image_size: int
    patch_size: int
    channels: int
    layers: int
    block: Block
    select: Select = "full"


class Dinov2:
    """The last hidden state after the final norm."""

    name = "dinov2"

    def __init__(self, config: Dinov2Config, where: str = "config") -> None:
        c = self.config = config
        self.image_size, self.patch_size = c.image_size, c.patch_size
        if c.image_size < c.patch_size:
            raise CheckpointError(
                "the picture is smaller than a patch",
                where=where,
                expected=f"at least {c.patch_size} pixels",
                found=str(c.image_size),
            )
        self.patches = (c.image_size // c.patch_size) ** 2
        self.tokens = self.patches + (c.select == "full")
        self.width = c.block.hidden_size

    @classmethod
    def from_config(
        cls, f: Fields, *, image_size: int | None = None, select: Select = "full"
    ) -> Dinov2:
        """Read a published config.

        Args:
            image_size: pixels of the pictures it will see; None for those of the config.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        hidden, heads = f.size("hidden_size", 768), f.size("num_attention_heads", 12)
        check_heads(f, hidden, heads)
        wide, gated = int(hidden * f.number("mlp_ratio", 4)), f.flag("use_swiglu_ffn", False)
        trained = f.size("image_size", 224)
        config = Dinov2Config(
            trained_size=trained,
            image_size=image_size or trained,
            patch_size=f.size("patch_size", 14),
            channels=f.size("num_channels", 3),
            layers=f.size("num_hidden_layers", 12, limit=MAX_LAYERS),
            block=Block(
                hidden,
                # Two thirds of it, in steps of 8, since there are three matrices instead of two.
                (int(wide * 2 / 3) + 7) // 8 * 8 if gated else wide,
                heads,
                f.number("layer_norm_eps", 1e-6),
                "silu" if gated else activation_of(f, "hidden_act", "gelu"),
                biases="qkv" if f.flag("qkv_bias", True) else "",
                gated=gated,
                scaled=True,
            ),
            select=select,
        )
        return cls(config, f.where)

    def parameters(self) -> list[Parameter]:
        c, h = self.config, self.config.block.hidden_size
        out = [
            Parameter("patch", (h, c.channels * c.patch_size**2)),
            Parameter("patch_bias", (h,), "vector"),
            Parameter("class", (h,), "vector"),
            Parameter("position", (self.patches + 1, h), "vector"),
        ]
        for i in range(c.layers):
            out += c.block.parameters(f"layers.{i}.")
        return out + [Parameter(n, (h,), "vector") for n in ("norm", "norm_bias")]

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `vision_tower.`."""
        c, b, embeddings = self.config, self.config.block, f"{prefix}embeddings."
        side = c.image_size // c.patch_size
        trained = (c.trained_size // c.patch_size) ** 2 + 1
        out = {
            "patch": Source(
                f"{embeddings}patch_embeddings.projection.weight",
                stored=(b.hidden_size, c.channels, c.patch_size, c.patch_size),
            ),
            "patch_bias": Source(f"{embeddings}patch_embeddings.projection.bias"),
            "class": flat(f"{embeddings}cls_token", (1, 1, b.hidden_size)),
            "position": Source(
                f"{embeddings}position_embeddings",
                whole=lambda theirs: stretched(theirs[0], side),
                stored=(1, trained, b.hidden_size),
            ),
            "norm": Source(f"{prefix}layernorm.weight"),
            "norm_bias": Source(f"{prefix}layernorm.bias"),
        }
        for i in range(c.layers):
            p, theirs = f"layers.{i}.", f"{prefix}encoder.layer.{i}."
            out |= b.sources(p, theirs, _GATED_NAMES if b.gated else _HUB_NAMES)
            if b.gated:  # gate and up are one matrix, gate first
                f = b.intermediate_size
                for n, rows in (("gate", (0, f)), ("up", (f, 2 * f))):
                    name = f"{theirs}mlp.weights_in"
                    out[f"{p}mlp.{n}"] = Source(f"{name}.weight", rows=rows)
                    out[f"{p}mlp.{n}_bias"] = Source(f"{name}.bias", rows=rows)
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """The mask token serves training alone."""
        return (f"{prefix}embeddings.mask_token",)

    def encode(self, op: Ops[T], w: Mapping[str, Weight], pixels: T) -> T:
        """Pixels `(channels, height, width)` -> `(tokens, width)`."""
        c = self.config
        squares = op.patches(pixels, (c.channels, c.image_size, c.image_size), c.patch_size)
        x = op.linear(squares, w["patch"], bias=(w["patch_bias"],))[0]
        x = op.add(op.concat_rows(op.table(w["class"]), x), op.table(w["position"]))
        for i in range(c.layers):
            x = c.block.forward(op, w, f"layers.{i}.", x)
        x = op.norm(x, w["norm"], eps=c.block.norm_eps, bias=w["norm_bias"])
        return op.take_rows(x, 1) if c.select == "default" else x


_HUB_NAMES = {
    "norm_attn": "norm1",
    "attn.q": "attention.attention.query",
    "attn.k": "attention.attention.key",
    "attn.v": "attention.attention.value",
    "attn.o": "attention.output.dense",
    "norm_mlp": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
    "scale_attn": "layer_scale1.lambda1",
    "scale_mlp": "layer_scale2.lambda1",
}
_GATED_NAMES = {
    **_HUB_NAMES,
    "mlp.gate": "mlp.weights_in",
    "mlp.up": "mlp.weights_in",
    "mlp.down": "mlp.weights_out",
}


def stretched(table: NDArray[np.float32], side: int) -> NDArray[np.float32]:
    """Position embeddings `(1 + n * n, width)`, the class token's first, for `side^2` patches."""
    n = int((len(table) - 1) ** 0.5)
    if n == side:
        return table
    weights = cubic_weights(n, side)
    square = table[1:].reshape(n, n, -1)
    rows = np.tensordot(weights, square, axes=(1, 0))
    both = np.tensordot(weights, rows, axes=(1, 1)).swapaxes(0, 1)
    return np.concatenate([table[:1], both.reshape(side * side, -1)]).astype(np.float32)


def cubic_weights(size: int, wanted: int) -> NDArray[np.float64]:
    """Row i holds how much each of `size` samples gives to sample i of `wanted`.

    Cubic convolution with a = -0.75, pixel centres at halves, edges repeated, no antialiasing.
    Source: Keys, 1981, eq. 4, with the a of `torch.nn.functional.interpolate`.
    """
    a, out = -0.75, np.zeros((wanted, size))
    centre = (np.arange(wanted) + 0.5) * size / wanted - 0.5
    first = np.floor(centre).astype(np.int64)
    for tap in range(-1, 3):
        distance = np.abs(centre - first - tap)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((distance - 5) * distance + 8) * distance * a - 4 * a
        weight = np.where(distance <= 1, near, far)
        np.add.at(out, (np.arange(wanted), np.clip(first + tap, 0, size - 1)), weight)
    return out
