"""SigLIP's vision tower: no class token, a norm after the layers, optionally a pooling head.

Idefics3 and SmolVLM use it with positions looked up in buckets of the image's height and width. In
a full tile each row and column of patches has a bucket of its own: plain positions. Partly filled
tiles need a patch mask at run time and have no definition here, nor have the sizes at which
rounding decides the bucket.

Source: SigLIP (arXiv 2303.15343); `SiglipVisionModel` and `Idefics3VisionTransformer` of
transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from edge_mmllm.errors import UnsupportedArchitecture
from edge_mmllm_export.checkpoints.base import Layout
from edge_mmllm_export.models.clip import HUB_NAMES, Select
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


@dataclass(frozen=True)
class SiglipConfig:
    """Sizes of the tower, and what it hands on.

    Attributes:
        layers: layers of the checkpoint.
        head: whether the checkpoint has the pooling head.
        feature_layers: hidden states handed on side by side, as in `ClipConfig`; empty for the
            last one after the final norm.
        select: `full` hands on all rows; `default` drops the first, which is a patch here.
        pooled: hand on the head's one row instead.
        buckets: Idefics3's variant.
    """

    image_size: int
    patch_size: int
    channels: int
    layers: int
    block: Block
    head: bool = False
    feature_layers: tuple[int, ...] = ()
    select: Select = "full"
    pooled: bool = False
    buckets: bool = False


class Siglip:
    """The towers of SigLIP, Idefics3 and SmolVLM."""

    def __init__(self, config: SiglipConfig, where: str = "vision_config") -> None:
        c = self.config = config
        self.name = "idefics3_vision" if c.buckets else "siglip"
        self.image_size, self.patch_size = c.image_size, c.patch_size
        self.side = c.image_size // c.patch_size
        self.tokens = 1 if c.pooled else self.side**2 - (c.select == "default")
        self.width = c.block.hidden_size * max(1, len(c.feature_layers))
        self.input_shape = (c.channels, c.image_size, c.image_size)
        self._kept = [kept_layers(c.layers, n, where) for n in c.feature_layers or (-1,)]

    @classmethod
    def from_config(
        cls,
        f: Fields,
        *,
        feature_layers: tuple[int, ...] = (),
        select: Select = "full",
        pooled: bool = False,
    ) -> Siglip:
        """Read a published `vision_config`. Raises: CheckpointError, UnsupportedArchitecture."""
        hidden, heads = f.size("hidden_size", 768), f.size("num_attention_heads", 12)
        check_heads(f, hidden, heads)
        picture, patch = picture_sizes(f, 224, 16)
        config = SiglipConfig(
            image_size=picture,
            patch_size=patch,
            channels=f.size("num_channels", 3),
            layers=f.size("num_hidden_layers", 12, limit=MAX_LAYERS),
            block=Block(
                hidden,
                f.size("intermediate_size", 3072),
                heads,
                f.number("layer_norm_eps", 1e-6),
                activation_of(f, "hidden_act", "gelu_pytorch_tanh"),
            ),
            head=f.flag("vision_use_head", True),
            feature_layers=feature_layers,
            select=select,
            pooled=pooled,
        )
        return cls(config, f.where)

    @classmethod
    def from_idefics3(cls, f: Fields) -> Siglip:
        """Read the `vision_config` of Idefics3 or SmolVLM, whose defaults differ.

        Raises: CheckpointError, UnsupportedArchitecture.
        """
        defaults = {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 32}
        filled = Fields({**defaults, **f.config}, f.where)
        config = cls.from_config(filled).config
        side = config.image_size // config.patch_size
        if not own_buckets(side):
            raise UnsupportedArchitecture(
                "the positions of this encoder hang on the rounding of the machine it runs on",
                where=f"{f.where}, image_size and patch_size",
                expected="a number of patches a side like the published 26, 27 and 32",
                found=str(side),
            )
        return cls(replace(config, head=False, buckets=True), f.where)

    def parameters(self) -> list[Parameter]:
        c, h = self.config, self.config.block.hidden_size
        out = [
            Parameter("patch", (h, c.channels * c.patch_size**2)),
            Parameter("patch_bias", (h,), "vector"),
            Parameter("position", (self.side**2, h), "vector"),
        ]
        for i in range(max(self._kept)):
            out += c.block.parameters(f"layers.{i}.")
        if not c.feature_layers:
            out += [Parameter(n, (h,), "vector") for n in ("norm", "norm_bias")]
        if c.pooled:
            # A probe attends to the rows, then an MLP: a layer's weights but for its first norm.
            skipped = ("head.norm_attn", "head.norm_attn_bias")
            out += [p for p in c.block.parameters("head.") if p.name not in skipped]
            out.append(Parameter("head.probe", (1, h), "vector"))
        return out

    def sources(self, layout: Layout, prefix: str) -> dict[str, Source]:
        """Our names to the hub's, which begin with `prefix`, e.g. `vision_tower.vision_model.`."""
        c, h = self.config, self.config.block.hidden_size
        embeddings, square = f"{prefix}embeddings.", (h, c.channels, c.patch_size, c.patch_size)
        out = {
            "patch": Source(f"{embeddings}patch_embedding.weight", stored=square),
            "patch_bias": Source(f"{embeddings}patch_embedding.bias"),
            "position": Source(f"{embeddings}position_embedding.weight"),
        }
        for i in range(max(self._kept)):
            out |= c.block.sources(f"layers.{i}.", f"{prefix}encoder.layers.{i}.", HUB_NAMES)
        if not c.feature_layers:
            out["norm"] = Source(f"{prefix}post_layernorm.weight")
            out["norm_bias"] = Source(f"{prefix}post_layernorm.bias")
        if c.pooled:
            theirs = f"{prefix}head."
            head = c.block.sources("head.", theirs, _HEAD_NAMES)
            for n in "qkv":  # stored as `in_proj_weight` and `in_proj_bias`
                for name, suffix in ((f"head.attn.{n}", "weight"), (f"head.attn.{n}_bias", "bias")):
                    head[name] = replace(head[name], name=f"{theirs}attention.in_proj_{suffix}")
            out |= {name: s for name, s in head.items() if not name.startswith("head.norm_attn")}
            out["head.probe"] = Source(f"{theirs}probe")
        return out

    def ignored(self, prefix: str) -> tuple[str, ...]:
        """Tensors of the tower that what is handed on does not need."""
        c = self.config
        unused = [f"{prefix}encoder.layers.{i}.*" for i in range(max(self._kept), c.layers)]
        if c.feature_layers:
            unused.append(f"{prefix}post_layernorm.*")
        if not c.pooled:
            unused.append(f"{prefix}head.*")
        return (f"{prefix}embeddings.position_ids", *unused)

    def encode(self, op: Ops[T], w: Mapping[str, Weight], pixels: T) -> T:
        """Pixels `(channels, height, width)` -> `(tokens, width)`."""
        c = self.config
        squares = op.patches(pixels, self.input_shape, c.patch_size)
        x = op.linear(squares, w["patch"], bias=(w["patch_bias"],))[0]
        states = [op.add(x, op.table(w["position"]))]
        for i in range(max(self._kept)):
            states.append(c.block.forward(op, w, f"layers.{i}.", states[-1]))
        features = [states[n] for n in self._kept]
        if not c.feature_layers:
            x = op.norm(states[-1], w["norm"], eps=c.block.norm_eps, bias=w["norm_bias"])
            features = [self._pool(op, w, x) if c.pooled else x]
        if c.select == "default" and not c.pooled:
            features = [op.take_rows(x, 1) for x in features]
        return features[0] if len(features) == 1 else op.concat(*features)

    def _pool(self, op: Ops[T], w: Mapping[str, Weight], x: T) -> T:
        """Attention of a learned probe to all rows, then a residual MLP: `(1, hidden)`."""
        b = self.config.block
        q = op.linear(op.table(w["head.probe"]), w["head.attn.q"], bias=(w["head.attn.q_bias"],))[0]
        biases = w["head.attn.k_bias"], w["head.attn.v_bias"]
        k, v = op.linear(x, w["head.attn.k"], w["head.attn.v"], bias=biases)
        scale = (b.hidden_size // b.heads) ** -0.5
        h = op.full_attention(q, k, v, heads=b.heads, scale=scale)
        pooled = op.linear(h, w["head.attn.o"], bias=(w["head.attn.o_bias"],))[0]
        h = op.norm(pooled, w["head.norm_mlp"], eps=b.norm_eps, bias=w["head.norm_mlp_bias"])
        h = op.linear(h, w["head.mlp.up"], bias=(w["head.mlp.up_bias"],))[0]
        h = op.activation(h, b.activation)
        return op.add(pooled, op.linear(h, w["head.mlp.down"], bias=(w["head.mlp.down_bias"],))[0])


_HEAD_NAMES = {
    "norm_attn": "-",
    "attn.qkv": "attention.in_proj",
    "attn.o": "attention.out_proj",
    "norm_mlp": "layernorm",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def own_buckets(side: int) -> bool:
    """Whether each of `side` rows of patches falls into its own bucket in Idefics3.

    Row i lies at `i * (1 / side)` in float32, and takes the bucket that the boundaries 1/side,
    2/side, ... put it into. torch makes those as many at a time as a vector register holds, the
    first of each run rounded to float32, so at some sizes it depends on the machine: those where
    any register (of 1, 4, 8 or 16) gives another bucket are not its own.
    """
    step, i = 1 / side, np.arange(int(np.ceil((1.0 - 1 / side) * side)))
    place = np.arange(side, dtype=np.float32) * (np.float32(1) / np.float32(side))
    for lanes in (1, 4, 8, 16):
        first = (step + step * (i // lanes * lanes)).astype(np.float32).astype(np.float64)
        whole = i < len(i) // lanes * lanes
        steps = np.where(whole, first + step * (i % lanes), step + step * i).astype(np.float32)
        if not np.array_equal(np.searchsorted(steps, place, side="right"), np.arange(side)):
            return False
    return True
