"""The vision tower of CLIP, as LLaVA reads it: a hidden state, with or without the class token.

Source: CLIP (arXiv 2103.00020); `CLIPVisionModel` of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.vit import (
    Block,
    activation_of,
    check_heads,
    kept_layers,
    picture_sizes,
)
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")
Select = Literal["default", "full"]


@dataclass(frozen=True)
class ClipConfig:
    """Sizes of the tower, and what it hands on.

    Attributes:
        image_size, patch_size: pixels.
        layers: layers of the checkpoint.
        feature_layers: the hidden states handed on, side by side; 0 is what enters the first
            layer, -1 what leaves the last (before the final norm, as in LLaVA).
        select: `default` drops the class token, `full` keeps it as the first row.
    """

    image_size: int
    patch_size: int
    channels: int
    layers: int
    block: Block
    feature_layers: tuple[int, ...] = (-2,)
    select: Select = "default"


class Clip:
    """CLIP's ViT: a norm before the layers, the class token first."""

    name = "clip"

    def __init__(self, config: ClipConfig, where: str = "vision_config") -> None:
        c = self.config = config
        self.image_size, self.patch_size = c.image_size, c.patch_size
        self.patches = (c.image_size // c.patch_size) ** 2
        self.tokens = self.patches + (c.select == "full")
        self.width = c.block.hidden_size * len(c.feature_layers)
        self.input_shape = (c.channels, c.image_size, c.image_size)
        self._kept = [kept_layers(c.layers, n, where) for n in c.feature_layers]

    @classmethod
    def from_config(
        cls, f: Fields, *, feature_layers: tuple[int, ...] = (-2,), select: Select = "default"
    ) -> Clip:
        """Read a published `vision_config`. Raises: CheckpointError, UnsupportedArchitecture."""
        hidden, heads = f.size("hidden_size", 768), f.size("num_attention_heads", 12)
        check_heads(f, hidden, heads)
        picture, patch = picture_sizes(f, 224, 32)
        config = ClipConfig(
            image_size=picture,
            patch_size=patch,
            channels=f.size("num_channels", 3),
            layers=f.size("num_hidden_layers", 12, limit=MAX_LAYERS),
            block=Block(
                hidden,
                f.size("intermediate_size", 3072),
                heads,
                f.number("layer_norm_eps", 1e-5),
                activation_of(f, "hidden_act", "quick_gelu"),
            ),
            feature_layers=feature_layers,
            select=select,
        )
        return cls(config, f.where)

    def parameters(self) -> list[Parameter]:
        c, h = self.config, self.config.block.hidden_size
        out = [
            Parameter("patch", (h, c.channels * c.patch_size**2)),
            Parameter("class", (h,), "vector"),
            Parameter("position", (self.patches + 1, h), "vector"),
            Parameter("norm_pre", (h,), "vector"),
            Parameter("norm_pre_bias", (h,), "vector"),
        ]
        for i in range(max(self._kept)):
            out += c.block.parameters(f"layers.{i}.")
        return out

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `vision_tower.vision_model.`."""
        c = self.config
        square = (c.block.hidden_size, c.channels, c.patch_size, c.patch_size)
        out = {
            "patch": Source(f"{prefix}embeddings.patch_embedding.weight", stored=square),
            "class": Source(f"{prefix}embeddings.class_embedding"),
            "position": Source(f"{prefix}embeddings.position_embedding.weight"),
            "norm_pre": Source(f"{prefix}pre_layrnorm.weight"),
            "norm_pre_bias": Source(f"{prefix}pre_layrnorm.bias"),
        }
        for i in range(max(self._kept)):
            theirs = f"{prefix}encoder.layers.{i}."
            out |= c.block.sources(f"layers.{i}.", theirs, HUB_NAMES)
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Tensors of the tower that the hidden states asked for do not need."""
        unused = range(max(self._kept), self.config.layers)
        return (
            f"{prefix}embeddings.position_ids",
            f"{prefix}post_layernorm.*",
            *(f"{prefix}encoder.layers.{i}.*" for i in unused),
        )

    def encode(self, op: Ops[T], w: Mapping[str, Weight], pixels: T) -> T:
        """Pixels `(channels, height, width)` -> `(tokens, width)`."""
        c = self.config
        x = op.linear(op.patches(pixels, self.input_shape, c.patch_size), w["patch"])[0]
        x = op.add(op.concat_rows(op.table(w["class"]), x), op.table(w["position"]))
        x = op.norm(x, w["norm_pre"], eps=c.block.norm_eps, bias=w["norm_pre_bias"])
        states = [x]
        for i in range(max(self._kept)):
            states.append(c.block.forward(op, w, f"layers.{i}.", states[-1]))
        features = [states[n] for n in self._kept]
        if c.select == "default":
            features = [op.take_rows(x, 1) for x in features]
        return features[0] if len(features) == 1 else op.concat(*features)


#: Names within a layer, shared by the towers of transformers that follow CLIP's.
HUB_NAMES = {
    "norm_attn": "layer_norm1",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.o": "self_attn.out_proj",
    "norm_mlp": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
