"""Qwen2-VL's vision tower and the merger that projects its rows to the language model.

Pictures keep their shape: the grid of patches is an input. Patches come flattened, each with the
pixels of `temporal` frames, in squares of `merge` by `merge` so that the merger may join
neighbouring rows; positions are rotary in rows and columns. Frames of a video do not see each
other.

Source: Qwen2-VL (arXiv 2409.12191); `Qwen2VisionTransformerPretrainedModel` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import CheckpointError
from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.families.composite import Port
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.vit import Block, activation_of, check_heads
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")

_EPS = 1e-6


@dataclass(frozen=True)
class Qwen2VlVisionConfig:
    """Sizes of the tower.

    Attributes:
        temporal: frames in a patch.
        merge: the merger joins squares of `merge` by `merge` rows.
        output_size: width of the language model.
        theta: base of the rotary frequencies.
    """

    patch_size: int
    temporal: int
    channels: int
    merge: int
    layers: int
    output_size: int
    theta: float
    block: Block

    @classmethod
    def from_config(cls, f: Fields) -> Qwen2VlVisionConfig:
        """Read a published `vision_config`. Raises: CheckpointError, UnsupportedArchitecture."""
        width, heads = f.size("embed_dim", 1280), f.size("num_heads", 16)
        check_heads(f, width, heads)
        if width // heads % 4:
            raise CheckpointError(
                "the encoder's heads do not split into rows and columns",
                where=f.where,
                expected="a head size that is a multiple of 4",
                found=str(width // heads),
            )
        rope = Fields(f.table("rope_parameters"), f"{f.where}, rope_parameters")
        return cls(
            patch_size=f.size("patch_size", 14),
            temporal=f.size("temporal_patch_size", 2),
            channels=f.size("in_channels", f.size("in_chans", 3)),
            merge=f.size("spatial_merge_size", 2),
            layers=f.size("depth", 32, limit=MAX_LAYERS),
            output_size=f.size("hidden_size", 3584),
            theta=rope.number("rope_theta", 10000.0),
            block=Block(
                width,
                int(width * f.number("mlp_ratio", 4)),
                heads,
                _EPS,
                activation_of(f, "hidden_act", "quick_gelu"),
            ),
        )


class Qwen2VlVision:
    """The tower without its merger: `(frames * rows * columns, width)` of any grid."""

    name = "qwen2_vl_vision"
    tokens = 0

    def __init__(self, config: Qwen2VlVisionConfig) -> None:
        c = self.config = config
        self.width, self.patch_size = c.block.hidden_size, c.patch_size
        self.patch_width = c.channels * c.temporal * c.patch_size**2

    def ports(self) -> tuple[Port, ...]:
        """`pixels` flattened patches; `grid` frames, rows and columns of patches."""
        return (
            Port("pixels", "float32", ("patches", self.patch_width)),
            Port("grid", "int64", (3,)),
        )

    def parameters(self) -> list[Parameter]:
        c = self.config
        out = [Parameter("patch", (self.width, self.patch_width))]
        for i in range(c.layers):
            out += c.block.parameters(f"layers.{i}.")
        return out

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `visual.`."""
        c = self.config
        cube = (self.width, c.channels, c.temporal, c.patch_size, c.patch_size)
        out = {"patch": Source(f"{prefix}patch_embed.proj.weight", stored=cube)}
        for i in range(c.layers):
            out |= c.block.sources(f"layers.{i}.", f"{prefix}blocks.{i}.", _HUB_NAMES)
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Rotary frequencies are computed."""
        return (f"{prefix}rotary_pos_emb.inv_freq",)

    def encode(self, op: Ops[T], w: Mapping[str, Weight], pixels: T, grid: T) -> T:
        """Patches `(patches, patch_width)` and grid int64 `(3,)` -> `(patches, width)`."""
        c = self.config
        half = c.block.hidden_size // c.block.heads // 2
        inv_freq = 1 / c.theta ** (np.arange(0, half, 2, dtype=np.float32) / np.float32(half))
        angles = op.grid_angles(grid, inv_freq.astype(np.float32), c.merge)
        x = op.linear(op.input_rows(pixels, self.patch_width), w["patch"])[0]
        for i in range(c.layers):
            x = c.block.forward(op, w, f"layers.{i}.", x, angles=angles, frames=grid)
        return x


class PatchMerger:
    """Joins squares of rows and projects them to the language model's width, by an MLP."""

    name = "patch_merger"

    def __init__(self, config: Qwen2VlVisionConfig) -> None:
        self.config = config
        self.hidden_size = config.output_size
        self._wide = config.block.hidden_size * config.merge**2

    def tokens(self, count: int) -> int:
        """Rows that `count` features become."""
        return count // self.config.merge**2

    def parameters(self) -> list[Parameter]:
        wide, narrow = self._wide, self.config.block.hidden_size
        return [
            Parameter("norm", (narrow,), "vector"),
            Parameter("norm_bias", (narrow,), "vector"),
            Parameter("up", (wide, wide)),
            Parameter("up_bias", (wide,), "vector"),
            Parameter("down", (self.hidden_size, wide)),
            Parameter("down_bias", (self.hidden_size,), "vector"),
        ]

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `visual.`."""
        names = {"norm": "ln_q", "up": "mlp.0", "down": "mlp.2"}
        return {
            f"{ours}{suffix}": Source(f"{prefix}merger.{theirs}.{kind}")
            for ours, theirs in names.items()
            for suffix, kind in (("", "weight"), ("_bias", "bias"))
        }

    def project(self, op: Ops[T], w: Mapping[str, Weight], features: T) -> T:
        """`(patches, width)` -> `(patches / merge^2, hidden)`."""
        x = op.norm(features, w["norm"], eps=_EPS, bias=w["norm_bias"])
        x = op.linear(op.fold_rows(x, self.config.merge**2), w["up"], bias=(w["up_bias"],))[0]
        return op.linear(op.activation(x, "gelu"), w["down"], bias=(w["down_bias"],))[0]


_HUB_NAMES = {
    "norm_attn": "norm1",
    "attn.qkv": "attn.qkv",
    "attn.o": "attn.proj",
    "norm_mlp": "norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
