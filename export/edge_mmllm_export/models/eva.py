"""The vision tower of BLIP-2 and InstructBLIP: EVA-CLIP's ViT-g.

One projection for q, k and v (k's bias is zero in published checkpoints, and read all the same),
a class token, a norm after the layers.

Source: EVA-CLIP (arXiv 2303.15389); `Blip2VisionModel` of transformers 5.23, which
`InstructBlipVisionModel` equals.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.models.config import MAX_LAYERS, Fields
from edge_mmllm_export.models.vit import Block, activation_of, check_heads, flat, picture_sizes
from edge_mmllm_export.ops.base import Ops
from edge_mmllm_export.weights import Parameter, Source, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class EvaConfig:
    """Sizes of the tower, in pixels and channels."""

    image_size: int
    patch_size: int
    layers: int
    block: Block


class Eva:
    """BLIP-2's ViT; all rows of its last hidden state are handed on, the class token's first."""

    name = "eva"

    def __init__(self, config: EvaConfig) -> None:
        c = self.config = config
        self.image_size, self.patch_size = c.image_size, c.patch_size
        self.tokens = (c.image_size // c.patch_size) ** 2 + 1
        self.width = c.block.hidden_size

    @classmethod
    def from_config(cls, f: Fields) -> Eva:
        """Read a published `vision_config`. Raises: CheckpointError, UnsupportedArchitecture."""
        hidden, heads = f.size("hidden_size", 1408), f.size("num_attention_heads", 16)
        check_heads(f, hidden, heads)
        block = Block(
            hidden,
            f.size("intermediate_size", 6144),
            heads,
            f.number("layer_norm_eps", 1e-6),
            activation_of(f, "hidden_act", "gelu"),
            biases="qkv" if f.flag("qkv_bias", True) else "",
        )
        layers = f.size("num_hidden_layers", 39, limit=MAX_LAYERS)
        return cls(EvaConfig(*picture_sizes(f, 224, 14), layers, block))

    def parameters(self) -> list[Parameter]:
        c, h = self.config, self.config.block.hidden_size
        out = [
            Parameter("patch", (h, 3 * c.patch_size**2)),
            Parameter("patch_bias", (h,), "vector"),
            Parameter("class", (h,), "vector"),
            Parameter("position", (self.tokens, h), "vector"),
        ]
        for i in range(c.layers):
            out += c.block.parameters(f"layers.{i}.")
        return out + [Parameter(n, (h,), "vector") for n in ("norm", "norm_bias")]

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `vision_model.`."""
        c, h, embeddings = self.config, self.config.block.hidden_size, f"{prefix}embeddings."
        out = {
            "patch": Source(
                f"{embeddings}patch_embedding.weight", stored=(h, 3, c.patch_size, c.patch_size)
            ),
            "patch_bias": Source(f"{embeddings}patch_embedding.bias"),
            "class": flat(f"{embeddings}class_embedding", (1, 1, h)),
            "position": flat(f"{embeddings}position_embedding", (1, self.tokens, h)),
            "norm": Source(f"{prefix}post_layernorm.weight"),
            "norm_bias": Source(f"{prefix}post_layernorm.bias"),
        }
        for i in range(c.layers):
            out |= c.block.sources(f"layers.{i}.", f"{prefix}encoder.layers.{i}.", _HUB_NAMES)
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Every tensor of the tower is used."""
        return ()

    def encode(self, op: Ops[T], w: Mapping[str, Weight], pixels: T) -> T:
        """Pixels `(3, height, width)` -> `(tokens, width)`."""
        c = self.config
        squares = op.patches(pixels, (3, c.image_size, c.image_size), c.patch_size)
        x = op.linear(squares, w["patch"], bias=(w["patch_bias"],))[0]
        x = op.add(op.concat_rows(op.table(w["class"]), x), op.table(w["position"]))
        for i in range(c.layers):
            x = c.block.forward(op, w, f"layers.{i}.", x)
        return op.norm(x, w["norm"], eps=c.block.norm_eps, bias=w["norm_bias"])


_HUB_NAMES = {
    "norm_attn": "layer_norm1",
    "attn.qkv": "self_attn.qkv",
    "attn.o": "self_attn.projection",
    "norm_mlp": "layer_norm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
